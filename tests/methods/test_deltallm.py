"""DeltaLLM: must-hold tests of its card."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from torch import Tensor

import foveate
from foveate.attention import Partial
from foveate.methods import DeltaLLM
from foveate.methods.policies.deltas import changes, follow
from foveate.models import tiny

SMALL = {"theta": 0.5, "window": 8}
FULL = {"theta": 0.0}


def plainly(keys: Tensor, theta: float) -> Tensor:
    """Channel by channel, token by token."""
    out = keys.clone()
    for c in range(keys.shape[1]):
        reference = float(keys[0, c])
        for t in range(keys.shape[0]):
            if t and abs(float(keys[t, c]) - reference) >= theta:
                reference = float(keys[t, c])
            out[t, c] = reference
    return out


def references(cache: Any, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, references [P, C, D] and counts [P, C] that a layer holds."""
    (band,) = stores(cache)[layer].bands
    reference, changed = (band.tags[name].data[:, : band.used] for name in ("deltallm", "deltallm changes"))
    return band.keys(), reference, changed.squeeze(-1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_theta_zero_is_exact(heads: int, kv_heads: int) -> None:
    model, ids, steps = llama(heads=heads, kv_heads=kv_heads), prompt(2, 61), prompt(2, 5, seed=1)
    want, _ = logits(model, ids, steps)
    with watching() as seen:
        got, _ = applied(model, DeltaLLM(theta=0.0, window=8), ids, steps)
    assert_close(got, want, TOLERANCE)
    assert all(isinstance(r["parts"], list) for r in seen)


def test_a_window_for_all_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 5, seed=1)
    want, _ = logits(model, ids, steps)
    with watching() as seen:
        got, _ = applied(model, DeltaLLM(theta=9.0, window=66), ids, steps)
    assert_close(got, want, TOLERANCE)
    assert all(r["parts"].dense for r in seen)


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0, 50.0])
def test_no_channel_is_further_than_theta_and_errors_do_not_add_up(theta: float) -> None:
    keys = torch.randn(3, 97, 8).cumsum(1) * 0.3
    made = torch.zeros(3, 97, dtype=torch.bool)
    got = follow(keys, theta, torch.zeros_like(keys), made)
    assert ((got - keys).abs() < max(theta, 1e-12)).all()
    for row, want in zip(got, keys, strict=True):
        assert torch.equal(row, plainly(want, theta))
    assert torch.equal(got[:, 0], keys[:, 0])
    # Followed in two goes, and where some rows are ahead of others.
    known, made = got.clone(), made.clone()
    for row, upto in enumerate((0, 40, 97)):
        known[row, upto:] = -1
        made[row, :upto] = True
    assert torch.equal(follow(keys, theta, known, made), got)


@pytest.mark.parametrize(
    ("theta", "ahead", "dtype"),
    [
        (0.0, False, torch.bfloat16),
        (1.001, True, torch.bfloat16),
        (1.001, False, torch.bfloat16),
        (0.3, True, torch.float32),
    ],
)
def test_the_kernel_follows_as_the_loop_does(theta: float, ahead: bool, dtype: torch.dtype) -> None:
    """Bit for bit: what is close to theta is rounded alike."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    from foveate.attention.triton.follow import follow as walk

    keys = (torch.randn(2, 40, 37).transpose(1, 2).cumsum(1) * 0.3).to(dtype)
    before = torch.randn(2, 40).to(dtype)
    made = torch.rand(2, 37) < 0.2 if ahead else None
    got = walk(keys.to(device), theta, before.to(device), None if made is None else made.to(device)).cpu()
    for t in range(37):
        jumps = (keys[:, t] - before).abs() >= theta
        jumps = jumps if made is None else jumps | made[:, t, None]
        before = torch.where(jumps, keys[:, t], before)
        assert torch.equal(got[:, t], before)
    assert theta == 0 or (got[:, 1:] == got[:, :-1]).any()


def test_sums_of_changes_are_the_logits() -> None:
    """s_t = s_(t-1) + q·δ_t, at the cost of the numbers that are not 0; off by at most θ times the sum of |q|."""
    q, keys, theta = torch.randn(8, dtype=torch.float64), torch.randn(60, 8, dtype=torch.float64).cumsum(0), 1.2
    r = follow(keys[None], theta, torch.zeros(1, 60, 8, dtype=torch.float64), torch.zeros(1, 60, dtype=torch.bool))[0]
    delta = torch.cat([r[:1], r.diff(dim=0)])
    assert_close((delta @ q).cumsum(0), r @ q, 1e-10)
    assert torch.equal(changes(r), (delta != 0).sum(-1))
    assert 0 < changes(r)[1:].sum() < 59 * 8
    assert ((keys - r) @ q).abs().max() <= theta * q.abs().sum()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_near_is_exact_and_far_is_by_reference(heads: int, kv_heads: int) -> None:
    """Prompt and decode against one softmax over logits made of both kinds of keys."""
    model, ids, steps = llama(layers=1, heads=heads, kv_heads=kv_heads), prompt(1, 45), prompt(1, 1, seed=1)
    with watching() as seen:
        _, cache = applied(model, DeltaLLM(**SMALL), ids, steps)
    group, (band,) = heads // kv_heads, stores(cache)[0].bands
    k, r = (x.repeat_interleave(group, 0) for x in references(cache)[:2])
    v = band.values().repeat_interleave(group, 0)
    for read, first, last in ((seen[0], 0, 45), (seen[1], 45, 46)):
        distance = torch.arange(first, last)[:, None] - torch.arange(last)
        q = read["q"][0]
        logit = torch.where(distance < 8, q @ k[:, :last].mT, q @ r[:, :last].mT) * read["how"].scale
        want = logit.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v[:, :last]
        assert_close(read["result"].out[0], want, 1e-5)


def test_decode_goes_on_where_the_prompt_ended() -> None:
    """References after a prompt and steps are those of all tokens at once, and tell each token's kind by distance."""
    model, ids, steps = llama(), prompt(1, 45), prompt(1, 6, seed=1)
    with watching() as seen:
        _, cache = applied(model, DeltaLLM(**SMALL), ids, steps)
    for layer in range(3):
        keys, r, counts = references(cache, layer)
        whole = follow(keys, 0.5, torch.zeros_like(keys), torch.zeros(keys.shape[:2], dtype=torch.bool))
        assert torch.equal(r, whole)
        assert torch.equal(counts.long(), changes(whole))
        assert (counts[:, 1:] < 16).any()
    near, far = seen[-1]["parts"]
    assert near.span.window == far.over.span.beyond == 8
    assert isinstance(far, Partial)


def test_a_long_window_in_the_prompt_is_caught_up_with() -> None:
    """While all is near nobody follows keys; references are made of all tokens once the window is left."""
    model, ids, steps = llama(), prompt(1, 30), prompt(1, 6, seed=1)
    _, cache = applied(model, DeltaLLM(theta=0.5, window=33), ids, steps)
    keys, r, counts = references(cache)
    assert torch.equal(r, follow(keys, 0.5, torch.zeros_like(keys), torch.zeros(keys.shape[:2], dtype=torch.bool)))
    assert (counts >= 0).all()


def test_multiplications_are_counted() -> None:
    """nnz of far differences and all channels of near keys, for every query head; the dense count beside it."""
    model, ids, steps = llama(layers=1), prompt(1, 40), prompt(1, 3, seed=1)
    with foveate.apply(model, DeltaLLM(**SMALL)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.meter = {}
        cache.expect(40)
        model(ids, past_key_values=cache)
        for i in range(3):
            model(steps[:, i : i + 1], past_key_values=cache)
    _, r, _ = references(cache)
    count = changes(r)  # [2, 43], 3 query heads each
    for phase, rows in (("prompt", range(40)), ("decode", range(40, 43))):
        macs = sum(3 * int(count[:, : max(0, i - 7)].sum()) + 6 * 16 * min(8, i + 1) for i in rows)
        dense = sum(6 * 16 * (i + 1) for i in rows)
        assert cache.meter[f"{phase}_macs"] == macs
        assert cache.meter[f"{phase}_macs_dense"] == dense
        assert macs < dense
        assert cache.meter[f"{phase}_read"] == dense / 16


def test_a_larger_theta_skips_more_and_is_further_off() -> None:
    model, ids = llama(), prompt(1, 93)
    want, _ = logits(model, ids)
    shares, errors = [], []
    for theta in (0.0, 0.2, 0.6, 2.0):
        with foveate.apply(model, DeltaLLM(theta=theta, window=8)) as handle, torch.no_grad():
            cache = handle.cache()
            cache.meter = {}
            got = model(ids, past_key_values=cache).logits[:, -1:]
        shares.append(cache.meter["prompt_macs"] / cache.meter["prompt_macs_dense"])
        errors.append(float((got - want).norm()))
    assert all(a > b for a, b in pairwise(shares))
    assert all(a < b for a, b in pairwise(errors))
    assert shares[0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("bad", [{"theta": -0.1}, {"theta": float("nan")}, {"window": 0}, {"budget": 0.5}])
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        DeltaLLM(**bad)


def test_latents_are_refused() -> None:
    with pytest.raises(foveate.Refused, match="latents"):
        foveate.apply(tiny("deepseek-v3", heads=4, kv_heads=2), DeltaLLM())
