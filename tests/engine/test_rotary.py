"""The rotation of one token per row, against the model's own, to the bit: alone, and on the way into a store."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from tests.attention.test_triton_decode import DEVICE
from tests.attention.test_triton_decode_weights import Held
from tests.closeness import assert_close
from tests.contract.recorded import steps_in_place
from tests.contract.runs import left_padded, tokens
from tests.contract.subjects import CASES, applied, model
from tests.families import family_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foveate.attention import decoding
from foveate.attention.triton.arrive import Turn, arrive
from foveate.engine import fused as module
from foveate.engine.later import now, rotation_of

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


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(2, True), (6, False)])
def test_a_token_is_turned_on_its_way_in(heads: int, shared: bool, split: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, heads, 1, 40).to(DEVICE), torch.randn(2, 2, 1, 40).to(DEVICE)
    v, angle = torch.randn(2, 2, 1, 24).to(DEVICE), torch.rand(1 if shared else 2, 1, 40).to(DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()
    torch.manual_seed(seed)
    one = Held(split)
    torch.manual_seed(seed)
    other = Held(split)
    turned_q, turned_k = apply_rotary_pos_emb(q.clone(), k.clone(), cos, sin)
    arrive(turned_k, v, one.stores, one.counters)
    kept = k.clone()
    arrive(k, v, other.stores, other.counters, Turn(q, cos, sin))
    assert torch.equal(q, turned_q) and torch.equal(k, kept) and torch.equal(one.now, other.now)
    for part, same in zip(one.there, other.there, strict=True):
        assert all(torch.equal(part[name], same[name]) for name in part)
    assert not torch.equal(one.there[0]["k"].cpu(), one.parts[0]["k"])


@pytest.mark.parametrize("name", ["duo-attention", "quest", "kivi"])
def test_a_recorded_step_turns_what_comes_in(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launch that takes in the token, where it is one; of packed tokens before it."""
    if DEVICE.type != "cpu":
        pytest.skip("recorded on a GPU by tests/contract/test_capture_gpu.py")
    net, case = model("llama", 2), CASES[name]
    ids, mask = left_padded([tokens(seed, 33), tokens(seed + 1, 48)])
    new = torch.stack([tokens(seed + 2, 4), tokens(seed + 3, 4)])
    turned: list[Any] = []
    before: list[Any] = []
    plain, alone = decoding.Held.arrive, rotary.rotate

    def arrived(held: Any, k: Any, v: Any, turn: Any = None) -> None:
        turned.append(turn)
        plain(held, k, v, turn)

    with applied(net, case) as handle:
        _, want = steps_in_place(net, handle, ids, mask, new)
        monkeypatch.setattr(module, "available", lambda device: False)
        monkeypatch.setattr(module, "multiplies", lambda device: True)
        monkeypatch.setattr(decoding.Held, "arrive", arrived)
        with module.fused(net):
            pass  # probes
        monkeypatch.setattr(rotary, "rotate", lambda *args: before.append(args) or alone(*args))
        cache, got = steps_in_place(net, handle, ids, mask, new)
    assert cache.step is not None
    assert (None not in turned and turned and not before) if name != "kivi" else (before and not turned)
    assert_close(got, want, 1e-6)


def test_queries_and_keys_are_turned_once_whoever_asks_first(seed: int) -> None:
    torch.manual_seed(seed)
    angle = torch.rand(1, 1, 64, device=DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()

    def drawn() -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        q, k = torch.randn(2, 4, 1, 64, device=DEVICE), torch.randn(2, 2, 1, 64, device=DEVICE)
        want = apply_rotary_pos_emb(q.clone(), k.clone(), cos, sin)
        return rotary.Rotation(q, k, cos, sin, apply_rotary_pos_emb), want

    for order in ((0, 1), (1, 0)):
        rotation, want = drawn()
        both = rotation.laters()
        assert rotation_of(*both) is rotation
        for which in order:
            assert torch.equal(both[which] + 0, want[which])
            assert rotation_of(*both) is None
    rotation, want = drawn()
    both = rotation.laters()
    rotary.rotate(rotation.turn.q, rotation.k.clone(), cos, sin)  # as a store does it that takes the keys
    rotation.taken()
    assert torch.equal(now(both[0]), want[0]) and torch.equal(now(both[1]), want[1])
    other, _ = drawn()
    assert rotation_of(other.laters()[0], both[1]) is None
    assert rotation_of(other.laters()[0], want[1]) is None
    alive = weakref.ref(both[0])
    del both
    assert alive() is None  # without the collector, which rests while a step is recorded
