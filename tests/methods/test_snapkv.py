"""SnapKV: must-hold tests of its card."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, sealed_memory, stores, watching

import foveate
from foveate.heads.tap import Tap, Tapped
from foveate.methods import SnapKV

SMALL = {"budget": 24, "window": 5, "kernel": 3}


def window_truth(q: torch.Tensor, k: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    """Summed window attention [B, Hs, G, T - W] of q [B, H, T, D], k [B, Hs, T, D], by the plain formula."""
    t, group = q.shape[2], q.shape[1] // k.shape[1]
    logit = (q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale).masked_fill(
        torch.ones(t, t).triu(1).bool(), -torch.inf
    )
    mass = logit.softmax(-1)[:, :, -window:].sum(2)[..., :-window]
    return mass.unflatten(1, (k.shape[1], group))


def captured(ids: torch.Tensor, **model: int):
    """q, k, scale of each layer of a dense run."""
    with watching() as seen:
        applied(llama(**model), "dense", ids)
    out = []
    for read in seen:
        k = read["store"].bands[0].keys().unflatten(0, (ids.shape[0], -1))
        out.append((read["q"], k, read["how"].scale))
    return out


def test_room_for_all_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    got, cache = applied(model, SnapKV(budget=41), ids, steps)
    assert_close(got, want, TOLERANCE)
    assert isinstance(cache, foveate.engine.apply.FoveateCache)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_keeps_the_top_of_the_plain_formula(heads: int, kv_heads: int, reduce: str) -> None:
    """kernel=1: raw top-k; each head decides by its own group's window attention."""
    ids = prompt(2, 61)
    q, k, scale = captured(ids, heads=heads, kv_heads=kv_heads, layers=1)[0]
    _, cache = applied(
        llama(heads=heads, kv_heads=kv_heads, layers=1), SnapKV(budget=20, window=5, kernel=1, reduce=reduce), ids
    )
    mass = window_truth(q, k, 5, scale)
    mass = mass.mean(2) if reduce == "mean" else mass.amax(2)
    want = [sorted([*row.topk(15).indices.tolist(), *range(56, 61)]) for row in mass.flatten(0, 1)]
    assert held(stores(cache)[0]) == want


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_pooling_spreads_along_the_keys(pool: str, seed: int) -> None:
    """Beyond both ends there is nothing, which lowers averages there; the window is nothing, too. Of equal scores, as
    neighbours of a maximum have them, the first are kept."""
    ids = prompt(16, 61, seed % 10**6)
    q, k, scale = captured(ids, layers=1)[0]
    _, cache = applied(llama(layers=1), SnapKV(budget=20, window=5, kernel=7, pool=pool), ids)
    near = torch.nn.functional.pad(window_truth(q, k, 5, scale), (3, 3)).unfold(-1, 7, 1)
    pooled = near.mean(-1) if pool == "avg" else near.amax(-1)
    order = pooled.mean(2).flatten(0, 1).argsort(dim=-1, descending=True, stable=True)
    want = [sorted([*row[:15].tolist(), *range(56, 61)]) for row in order]
    assert held(stores(cache)[0]) == want


def test_the_window_is_always_held_and_decode_adds() -> None:
    ids, steps = prompt(2, 61), prompt(2, 6, seed=3)
    _, cache = applied(llama(), SnapKV(budget=20, window=7), ids, steps)
    for store in stores(cache):
        for positions in held(store):
            assert len(positions) == 26
            assert set(range(54, 67)) <= set(positions)


def test_steps_stand_behind_the_whole_prompt(seed: int) -> None:
    """A step's position counts what the prompt had, not what is left of it; it reads that, and the steps before it."""
    model, ids, steps = llama(layers=2), prompt(1, 61, seed % 10**6), prompt(1, 5, seed % 10**6 + 1)
    got, cache = applied(model, SnapKV(budget=20, window=7), ids, steps)
    left = [[set(x) for x in held(store)] for store in stores(cache)]

    def serve(layer: Tapped) -> torch.Tensor:
        mask = torch.ones(6, 66, 66).tril().bool()
        for head in range(6):
            kept = left[layer.shape.index][head // 3]
            mask[head, 61:, [j for j in range(61) if j not in kept]] = False
        k, v = (x.repeat_interleave(3, 1) for x in (layer.k, layer.v))
        return (layer.q @ k.transpose(2, 3) * layer.scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    with torch.no_grad(), Tap(model, serve):
        want = model(torch.cat([ids, steps], dim=1)).logits[:, 60:]
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("chunks", [1, 3, 30])
def test_chunks_keep_the_same(chunks: int) -> None:
    model, ids = llama(), prompt(1, 61)
    _, whole = applied(model, SnapKV(budget=20, window=7), ids)
    _, parts = applied(model, SnapKV(budget=20, window=7), ids, chunks=chunks)
    assert [held(s) for s in stores(whole)] == [held(s) for s in stores(parts)]


def test_heads_keep_different_tokens() -> None:
    _, cache = applied(llama(), SnapKV(budget=12, window=4), prompt(1, 61))
    assert any(a != b for store in stores(cache) for a in held(store) for b in held(store))


def test_a_prompt_shorter_than_the_window_stays_whole() -> None:
    model, ids, steps = llama(), prompt(1, 9), prompt(1, 4, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, SnapKV(budget=0.25), ids, steps)
    assert_close(got, want, TOLERANCE)


def test_defaults_are_the_released_ones() -> None:
    method = SnapKV()
    assert (method.window, method.kernel, method.pool, method.capacity) == (32, 5, "avg", 2048)


@pytest.mark.parametrize("bad", [{"window": 0}, {"kernel": 4}, {"pool": "sum"}, {"reduce": "median"}, {"budget": 0.0}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        SnapKV(**bad)


def test_a_quarter_of_2048_tokens_is_a_quarter_of_the_memory() -> None:
    """Held bytes are layers x kv heads x (budget tokens) x 2 D within one block, and the process shrinks as much."""
    model, ids = llama(layers=4, heads=4, kv_heads=2, head_dim=64, max_positions=2304), prompt(1, 2048)
    dense, dense_used = sealed_memory(model, "dense", ids)
    cache, used = sealed_memory(model, SnapKV(budget=0.25), ids)
    slot = 2 * 64 * 4
    assert dense.nbytes == pytest.approx(4 * 2 * 2048 * slot, abs=4 * 2 * 32)
    assert abs(cache.nbytes - 4 * 2 * 2048 * slot / 4) <= 4 * 2 * 16 * (slot + 4)  # a held slot knows its position
    assert dense_used - used == pytest.approx(dense.nbytes - cache.nbytes, rel=0.02)
