"""The rotation of one token per row, against the model's own, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.attention.test_triton_decode import DEVICE
from tests.closeness import assert_close
from tests.families import family_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foveate.engine import fused as module

rotary = pytest.importorskip("foveate.engine.rotary", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(DEVICE is None, reason="kernels need a GPU, or Triton's interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "stores", "dim", "shared"),
    [(1, 3, 1, 64, True), (2, 4, 4, 96, False), (3, 8, 1, 80, True), (2, 6, 2, 128, False), (1, 1, 1, 2, False)],
)
def test_it_turns_as_the_model_does(
    batch: int, heads: int, stores: int, dim: int, shared: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    # As projections leave them: heads side by side, here with something behind each row.
    wide = torch.randn(batch, 1, (heads + stores + 1) * dim).to(DEVICE, dtype)
    parts = wide.split([heads * dim, stores * dim, dim], -1)[:2]
    q, k = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in parts)
    angle = torch.rand(1 if shared else batch, 1, dim, device=DEVICE) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)  # halves of their own, as nothing says they are the same
    want = apply_rotary_pos_emb(q.clone(), k.clone(), cos, sin)
    behind = wide[..., -dim:].clone()
    assert rotary.suits(q, k, cos, sin)
    got = rotary.rotate(q, k, cos, sin)
    assert all(not torch.isnan(x).any() and torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert got[0] is q and torch.equal(wide[..., -dim:], behind)


def test_what_does_not_suit_is_left_to_others() -> None:
    q, k, cos = torch.zeros(2, 4, 1, 64), torch.zeros(2, 2, 1, 64), torch.zeros(2, 1, 64)
    assert rotary.suits(q, k, cos, cos)
    assert not rotary.suits(q.expand(2, 4, 3, 64), k.expand(2, 2, 3, 64), cos, cos)  # several tokens
    assert not rotary.suits(q, k, cos[..., :32], cos[..., :32])  # of the first channels alone
    assert not rotary.suits(q, k, torch.zeros(3, 1, 64), cos)
    assert not rotary.suits(q.transpose(2, 3).contiguous().transpose(2, 3)[:, :, :, ::2], k[..., ::2], cos, cos)


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_is_turned_by_it(count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one token each; of more tokens it is the model's own affair where Liger is not installed."""
    torch.manual_seed(seed)
    model = family_model("llama", layers=2).to(DEVICE)
    ids = torch.randint(0, 256, (3, count), device=DEVICE)
    turned: list[Any] = []
    plain = rotary.rotate
    monkeypatch.setattr(rotary, "rotate", lambda *args: turned.append(args) or plain(*args))
    monkeypatch.setattr(module, "available", lambda device: False)
    monkeypatch.setattr(module, "multiplies", lambda device: True)
    with torch.no_grad():
        want = model(ids).logits
        with module.fused(model):
            turned.clear()  # probes
            got = model(ids).logits
    assert len(turned) == (2 if count == 1 else 0)
    assert_close(got, want, 1e-6)
