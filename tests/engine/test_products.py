"""Products with one token are those of torch, and stand in for a model's own while a step is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.families import family_model
from torch import Tensor, nn

from foveate.engine import fused as module
from foveate.engine.later import Later, Norm, now
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

    def products(
        x: Tensor | Norm, weights: list[Tensor], biases: list[Tensor] | None = None, plus: Tensor | None = None
    ) -> list[Tensor]:
        counts.append(len(weights))
        return plain(x, weights, biases, plus)

    def gated(x: Tensor | Norm, gate: Tensor, up: Tensor) -> Tensor:
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


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize(("width", "sizes"), [(96, (40,)), (576, (33, 27)), (2049, (35, 23, 23))])
def test_products_make_the_norm_on_the_way(width: int, sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, scale = 7 * drawn(1, 1, width, dtype=dtype), drawn(width, dtype=dtype)
    weights = [drawn(n, width, dtype=dtype) for n in sizes]
    normed = nn.functional.rms_norm(x.double(), (width,), scale.double(), 1e-2)
    for got, w in zip(kernels.products(Norm(x, scale, 1e-2), weights), weights, strict=True):
        assert_close(got, normed @ w.double().T, ALLOWED[dtype])
    gate, up = (drawn(21, width, dtype=dtype) / 8 for _ in "ab")
    opened, raised = ((normed @ w.double().T).to(dtype).double() for w in (gate, up))
    want = nn.functional.silu(opened).to(dtype).double() * raised
    assert_close(kernels.gated(Norm(x, scale, 1e-2), gate, up), want, ALLOWED[dtype])


@pytest.mark.parametrize("dtype", ALLOWED)
def test_products_are_rounded_before_something_is_added(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, w, plus = drawn(1, 96, dtype=dtype), drawn(40, 96, dtype=dtype), 50 * drawn(1, 40, dtype=dtype)
    made = kernels.products(x, [w])[0]
    assert torch.equal(kernels.products(x, [w], plus=plus)[0], plus + made)


@pytest.mark.parametrize(
    ("family", "guard"), [("llama", torch.no_grad), ("phi3", torch.inference_mode), ("gemma2", torch.no_grad)]
)
def test_a_step_norms_and_adds_within_its_products(
    family: str, guard: type, counted: list[int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model does with a result is its own affair: the last norm stands before a slice, and Gemma 2 has norms of
    another kind, and behind its blocks."""
    torch.manual_seed(seed)
    model = family_model(family, layers=1, dtype=torch.bfloat16).to(DEVICE)
    ids = torch.randint(0, 256, (1, 1), device=DEVICE)
    monkeypatch.setattr(module, "available", lambda device: True)
    made: list[int] = []

    def norm(one: Any, x: Tensor) -> Tensor:
        made.append(x.shape[-1])
        return nn.functional.rms_norm(x, x.shape[-1:], one.weight, module._epsilon(one))

    monkeypatch.setattr(module, "_norm", norm)
    monkeypatch.setattr(module, "_same_rotation", lambda *args: False)
    gate = lambda name, function: lambda a, b: nn.functional.silu(a) * b  # noqa: E731
    monkeypatch.setattr(module, "_liger", gate)
    module._known.clear()
    added: list[Tensor] = []
    plain = kernels.products

    def products(*args: object) -> list[Tensor]:
        if len(args) > 3 and isinstance(args[3], Tensor):
            added.append(args[3])
        return plain(*args)  # type: ignore[arg-type]

    with guard():
        want = model(ids).logits
        with module.fused(model):  # probes
            model(ids)
        monkeypatch.setattr(kernels, "products", products)
        made.clear()
        with module.fused(model):
            got = now(model(ids).logits)
    assert_close(got.double(), want.double(), 3e-2)
    assert (made, len(added)) == (([], 0) if family == "gemma2" else ([model.config.hidden_size], 2))
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.fixture
def later() -> tuple[Later, Tensor, list[str]]:
    made: list[str] = []
    there = torch.randn(1, 1, 6)

    def make() -> Tensor:
        made.append("make")
        return there.clone()

    def plus(other: Tensor) -> Tensor:
        made.append("plus")
        return there + other

    return Later(torch.empty(1, 1, 9), 6, make, plus=plus), there, made


def test_a_later_tensor_is_known_before_it_is_made(later: tuple[Later, Tensor, list[str]]) -> None:
    x, there, made = later
    assert x.shape == (1, 1, 6) and x.size(-1) == 6 and x.numel() == 6 and x.dim() == x.ndim == 3
    assert x.dtype == there.dtype and x.device == there.device and not x.requires_grad and x.is_contiguous()
    assert not made


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * 2,
        lambda x: x[:, -1:, 1:4],
        lambda x: torch.cat([x, x], dim=1),
        lambda x: nn.functional.linear(x, torch.ones(2, 6)),
        lambda x: x.view(2, 3).T,
        lambda x: torch.add(x, x, alpha=3),
        lambda x: torch.zeros(1, 1, 6).copy_(x),
        lambda x: torch.zeros(1, 1, 6).add_(x),
        lambda x: x.clone().mul_(3) + x.mT.sum(),
        lambda x: torch.where(x > 0, x, -x).max(),
        lambda x: torch.tensor(x.tolist()),
    ],
)
def test_whatever_is_done_with_a_later_tensor_makes_it_once(later: tuple[Later, Tensor, list[str]], use) -> None:
    x, there, made = later
    got = use(x)
    assert type(got) is Tensor
    assert torch.equal(got, use(there.clone()))
    assert torch.equal(now(x), there) and made == ["make"]


def test_a_sum_takes_a_later_tensor_along(later: tuple[Later, Tensor, list[str]]) -> None:
    x, there, made = later
    other = torch.randn(1, 1, 6)
    for got in (other + x, x + other, torch.add(other, x)):
        assert type(got) is Tensor and torch.equal(got, there + other)
    assert made == ["plus"] * 3
    odd = [torch.randn(1, 6), torch.randn(1, 1, 6).double(), torch.randn(1, 1, 1).expand(1, 1, 6), 2.0, x]
    for each in odd:  # of another shape or kind, or strided, or no tensor, or not there either
        made.clear()
        x.made = None
        assert torch.equal(x + each, there + (there if each is x else each))
        assert made == ["make"]
    made.clear()
    assert torch.equal(x + other, there + other) and not made  # it is there by now
