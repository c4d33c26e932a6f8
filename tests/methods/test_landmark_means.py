"""Landmark attention with means: must-hold tests of its card, as far as they need no training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded
from tests.contract.runs import prompt as announced
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from tests.rotation import turn

import foveate
from foveate.methods import LandmarkMeans
from foveate.methods.policies.complete import SPARE
from foveate.models import tiny

SMALL = {"budget": 24, "block": 4, "recent": 2}


def slow(model: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, method: LandmarkMeans, scale: float):
    """Retrieved blocks and outputs of one head by the card: q, k, v [T, D] as the model has them, rotated by place."""
    at = torch.arange(len(k))
    q, k, v = turn(model, q, -at), turn(model, k, -at), v.double()
    size, most, recent = method.block, method.k, method.recent
    lists, outs = [], []
    for i in range(len(k)):
        edge = max(0, i // size - recent + 1)
        query = turn(model, q[i : i + 1], torch.tensor([recent * size]))[0]
        score = {n: float(query @ k[n * size : (n + 1) * size].mean(0)) * scale for n in range(edge)}
        chosen = sorted(sorted(score, key=score.__getitem__, reverse=True)[:most])
        # a layout with k + 1 free blocks before the local ones
        laid = {}
        for back, n in enumerate(reversed(chosen), start=1):
            laid[n] = (most + 1 - back - (0 if n >= edge - most else 1)) * size
        start = (most + 1) * size
        if not method.reposition:
            laid, start = {n: n * size for n in chosen}, edge * size
        query = turn(model, q[i : i + 1], torch.tensor([start + i - edge * size]))
        own = list(range(edge * size, i + 1))
        groups = [(query @ turn(model, k[own], start + torch.arange(len(own))).T * scale)[0]]
        values = [v[own]]
        for n in chosen:
            inside = slice(n * size, (n + 1) * size)
            groups.append((query @ turn(model, k[inside], laid[n] + torch.arange(size)).T * scale)[0])
            values.append(v[inside])
        if method.softmax == "plain":
            weights = torch.cat(groups).softmax(-1)
        else:
            shared = torch.cat([groups[0], torch.tensor([score[n] for n in chosen], dtype=torch.float64)]).softmax(-1)
            won = shared[len(own) :]
            weights = torch.cat(
                [shared[: len(own)], *(g.softmax(-1) * w for g, w in zip(groups[1:], won, strict=True))]
            )
        assert abs(float(weights.sum()) - 1) < 1e-12
        outs.append(weights @ torch.cat(values))
        lists.append(chosen)
    return lists, torch.stack(outs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("options", [{}, {"softmax": "grouped"}, {"reposition": False}], ids=str)
def test_every_query_equals_the_slow_algorithm(heads: int, kv_heads: int, options: dict) -> None:
    model, method = llama(layers=1, heads=heads, kv_heads=kv_heads), LandmarkMeans(block=4, k=3, recent=2, **options)
    with watching() as seen:
        _, cache = applied(model, method, prompt(1, 38), prompt(1, 5, seed=1), chunks=19)
    (store,) = stores(cache)
    q = torch.cat([read["q"] for read in seen], dim=2)[0]
    out = torch.cat([read["result"].out for read in seen], dim=2)[0]
    k, v = store.bands[0].keys(), store.bands[0].values()
    for h in range(heads):
        own = h // (heads // kv_heads)
        lists, want = slow(model, q[h], k[own], v[own], method, seen[0]["how"].scale)
        assert_close(out[h], want, TOLERANCE)
        first = 0
        for read in seen:
            count, parts = read["q"].shape[2], read["parts"]
            if isinstance(parts, list) and method.softmax == "plain":
                got = [[n for n in row if n >= 0] for row in parts[0].lists[0, h].tolist()]
                assert got == lists[first : first + count]
            first += count


@pytest.mark.parametrize("pieces", [None, 7, 19])
def test_retrieving_all_is_the_full_grouped_softmax(pieces: int | None, seed: int) -> None:
    """Every past block is a group of its own, nothing is chosen, and it makes no difference how the tokens arrive."""
    model, method = llama(layers=1), LandmarkMeans(block=4, k=11, recent=1, softmax="grouped")
    with watching() as seen:
        _, cache = applied(model, method, prompt(1, 38, seed), prompt(1, 5, seed + 1), chunks=pieces)
    q, out = (torch.cat(x, dim=2)[0] for x in zip(*((r["q"], r["result"].out) for r in seen), strict=True))
    band = stores(cache)[0].bands[0]
    for h in range(6):
        lists, want = slow(model, q[h], band.keys()[h // 3], band.values()[h // 3], method, seen[0]["how"].scale)
        assert all(chosen == list(range(i // 4)) for i, chosen in enumerate(lists))
        assert_close(out[h], want, TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_retrieving_all_is_dense(family: str) -> None:
    model, ids, steps = tiny(family, heads=6, kv_heads=2), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for options in ({"k": 11, "recent": 1}, {"budget": 1.0}, {"k": 11, "recent": 1, "reposition": False}):
        got, _ = applied(model, LandmarkMeans(block=4, **options), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_all_blocks_retrieved_one_by_one_are_dense() -> None:
    """A short row beside a long one goes through landmarks, layout and lists, with nothing left out."""
    model = llama()
    rows = [prompt(1, 17)[0], prompt(1, 61, seed=2)[0]]
    ids, mask = left_padded(rows)
    want, _ = logits(model, rows[0][None])
    with foveate.apply(model, LandmarkMeans(block=4, k=3, recent=2)) as handle, watching() as seen:
        got = announced(model, handle.cache(), ids, mask)
    assert all(read["parts"][0].frame.keys is not None for read in seen)
    assert_close(got[:1, -1:], want, TOLERANCE)


@pytest.mark.parametrize("softmax", ["plain", "grouped"])
def test_one_block_is_causal_attention(softmax: str) -> None:
    model, ids, steps = llama(), prompt(1, 30), prompt(1, 2, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, LandmarkMeans(block=32, recent=1, softmax=softmax), ids, steps)
    assert_close(got, want, TOLERANCE)


def test_no_distance_exceeds_the_layout() -> None:
    with watching() as seen:
        applied(llama(), LandmarkMeans(block=4, k=3, recent=2), prompt(1, 121), prompt(1, 3, seed=1))
    for read in seen[-9:]:
        frame = read["parts"][0].frame
        assert int(frame.query.max()) < (3 + 1 + 2) * 4
        assert int(frame.keys.min()) >= 0
        assert int(frame.keys.max()) <= 3 * 4


def test_means_are_made_once_held_and_counted() -> None:
    model, ids = llama(), prompt(1, 61)
    with foveate.apply(model, LandmarkMeans(block=4, k=3, recent=2)) as handle, torch.no_grad():
        cache = handle.cache()
        model(ids, past_key_values=cache)
        held = [layer.mine["landmark-means"]["means"] for layer in cache.couriers()]
        assert [tuple(x.shape) for x in held] == [(1, 2, 15 + SPARE // 4, 16)] * 3
        model(prompt(1, 1), past_key_values=cache)
        cache.crop(-1)
        assert not any(layer.mine for layer in cache.couriers())
        model(prompt(1, 1), past_key_values=cache)
    for layer, before in zip(cache.couriers(), held, strict=True):
        assert_close(layer.mine["landmark-means"]["means"], before, 1e-6)


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(), "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(LandmarkMeans(block=4, recent=2), budget=0.05).check(200)
    assert error.value.floor == pytest.approx(12 / 200)


@pytest.mark.parametrize("bad", [{"block": 0}, {"k": 0}, {"recent": 0}, {"softmax": "sum"}], ids=str)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        LandmarkMeans(**bad)


def test_defaults_are_the_papers() -> None:
    method = LandmarkMeans()
    assert (method.block, method.k, method.softmax, method.reposition) == (50, 5, "plain", True)
