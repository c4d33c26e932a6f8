"""Products with one token are those of torch, and stand in for a model's own while a step is recorded."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.families import family_model
from torch import Tensor, nn

from foveate.engine import fused as module
from foveate.models import tiny

pytest.importorskip("triton")
from foveate.engine import products as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize(("width", "sizes"), [(96, (40,)), (576, (33, 27)), (2049, (35, 23, 23)), (64, (38, 21, 22))])
@pytest.mark.parametrize("biased", [False, True])
def test_products(width: int, sizes: tuple[int, ...], biased: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = drawn(1, 1, width, dtype=dtype)
    weights = [drawn(n, width, dtype=dtype) for n in sizes]
    biases = [drawn(n, dtype=dtype) * 9 for n in sizes] if biased else None
    assert kernels.suits(x, *weights)
    for i, got in enumerate(kernels.products(x, weights, biases)):
        want = x.double() @ weights[i].double().T + (biases[i].double() if biases else 0)
        assert got.shape == (1, 1, sizes[i]) and got.dtype == dtype
        assert_close(got, want, ALLOWED[dtype])


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize(("width", "size"), [(96, 41), (576, 40), (2500, 33)])
def test_gated(width: int, size: int, dtype: torch.dtype, seed: int) -> None:
    """Rounded wherever the modules round, and nowhere else."""
    torch.manual_seed(seed)
    x, gate, up = drawn(1, width, dtype=dtype), *(drawn(size, width, dtype=dtype) / 8 for _ in "ab")
    opened, raised = ((x.double() @ w.double().T).to(dtype).double() for w in (gate, up))
    want = nn.functional.silu(opened).to(dtype).double() * raised
    assert_close(kernels.gated(x, gate, up), want, ALLOWED[dtype])


def test_what_does_not_suit() -> None:
    x, w = drawn(1, 64, dtype=torch.bfloat16), drawn(8, 64, dtype=torch.bfloat16)
    assert kernels.suits(x, w)
    assert not kernels.suits(x.expand(2, 64), w)  # two tokens
    assert not kernels.suits(x.float(), w.float())
    assert not kernels.suits(x, w.half())
    assert not kernels.suits(x, drawn(64, 8, dtype=torch.bfloat16).T)
    assert not kernels.suits(x, drawn(8, 32, dtype=torch.bfloat16))
    assert not kernels.suits(drawn(1, 128, dtype=torch.bfloat16)[:, ::2], w)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Matrices of each launch, of models on any device."""
    counts: list[int] = []
    plain, shut = kernels.products, kernels.gated

    def products(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None = None) -> list[Tensor]:
        counts.append(len(weights))
        return plain(x, weights, biases)

    def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        counts.append(-2)
        return shut(x, gate, up)

    monkeypatch.setattr(kernels, "products", products)
    monkeypatch.setattr(kernels, "gated", gated)
    monkeypatch.setattr(module, "multiplies", lambda device: True)
    module._products.clear()
    return counts


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_step_of_one_token(family: str, counted: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = family_model(family, layers=2, dtype=torch.bfloat16).to(DEVICE)
    ids = torch.randint(0, 256, (1, 1), device=DEVICE)
    with torch.no_grad():
        want = model(ids).logits
        with module.fused(model):
            counted.clear()
            got = model(ids).logits
        assert counted.count(3) == (0 if family == "phi3" else 2)  # its matrix is one already
        # Where Liger is installed, gate and up are one launch on a GPU.
        assert counted.count(1) + 2 * counted.count(-2) == 4 * 2 + 1
        assert_close(got.double(), want.double(), 3e-2)
        assert not any("forward" in m.__dict__ for m in model.modules())
        assert torch.equal(model(ids).logits, want)


def test_parts_of_which_some_have_biases_go_one_by_one(counted: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = family_model("qwen2", layers=2, dtype=torch.bfloat16).to(DEVICE)
    model.model.layers[0].self_attn.k_proj.bias = None
    ids = torch.randint(0, 256, (1, 1), device=DEVICE)
    with torch.no_grad():
        want = model(ids).logits
        with module.fused(model):
            counted.clear()
            got = model(ids).logits
    assert counted.count(3) == 1
    assert_close(got.double(), want.double(), 3e-2)


def test_more_tokens_go_the_models_own_way(counted: list[int]) -> None:
    model = tiny("llama").bfloat16().to(DEVICE)
    ids = torch.randint(0, 256, (2, 1), device=DEVICE)
    with torch.no_grad():
        want = model(ids).logits
        with module.fused(model):
            counted.clear()
            assert torch.equal(model(ids).logits, want)
    assert not counted


def test_what_is_more_than_a_matrix_is_left_alone(counted: list[int]) -> None:
    model = tiny("llama").bfloat16().to(DEVICE)
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *args: None)

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    odd = Scaled(model.config.hidden_size, 256, bias=False, dtype=torch.bfloat16, device=DEVICE)
    model.lm_head = odd
    with module.fused(model):
        assert "forward" not in odd.__dict__
        first, second = (model.model.layers[i].self_attn for i in (0, 1))
        assert "forward" not in first.k_proj.__dict__ and "forward" in second.k_proj.__dict__
        assert "forward" in first.q_proj.__dict__
    hook.remove()
