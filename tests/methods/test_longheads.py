"""LongHeads: must-hold tests of its card."""

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
from foveate.attention.angles import Angles
from foveate.compat import rotary
from foveate.methods import LongHeads
from foveate.methods.policies.complete import SPARE
from foveate.models import tiny

SMALL = {"budget": 40, "chunk": 8}


def feature(model: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Of one chunk and head, from unrotated q, k [w, D] and v [w, D]."""
    place = torch.arange(len(k))
    turned = turn(model, k, place)
    inside = (turn(model, q, place) @ turned.T * scale).softmax(-1) @ v
    return (inside.mean(0) @ turned.T * scale).softmax(-1) @ turned


def slow(model: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int, chunks: int, scale: float):
    """Lists and outputs of one head, by the card: q, k, v [T, D] as the model has them, rotated by place."""
    place = torch.arange(len(k))
    q, k, v = turn(model, q, -place), turn(model, k, -place), v.double()
    parts = [slice(n * size, (n + 1) * size) for n in range(len(k) // size)]
    features = [feature(model, q[s], k[s], v[s], scale) for s in parts]
    lists, outs = [], []
    for i in range(len(k)):
        own = i // size
        chosen = list(range(own + 1))
        if i >= chunks * size:
            rank = {n: float(q[i] @ features[n]) for n in range(1, own - 1)}
            best = sorted(rank, key=rank.__getitem__, reverse=True)[: chunks - 3]
            chosen = sorted({0, own - 1, own, *best})
        keys = [j for n in chosen for j in range(n * size, min((n + 1) * size, i + 1))]
        at = torch.arange(len(keys))
        query = turn(model, q[i : i + 1], at[-1:])
        outs.append((query @ turn(model, k[keys], at).T * scale).softmax(-1) @ v[keys])
        lists.append(chosen)
    return lists, torch.cat(outs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("pieces", [None, 5])
def test_prompt_and_decode_equal_the_slow_algorithm(heads: int, kv_heads: int, pieces: int | None) -> None:
    """Chosen chunks and outputs of every query, its own key included, however the tokens arrive."""
    model, method = llama(layers=1, heads=heads, kv_heads=kv_heads), LongHeads(chunk=4, tokens=17)
    with watching() as seen:
        _, cache = applied(model, method, prompt(1, 38), prompt(1, 9, seed=1), chunks=pieces)
    (store,) = stores(cache)
    q = torch.cat([read["q"] for read in seen], dim=2)[0]
    out = torch.cat([read["result"].out for read in seen], dim=2)[0]
    k, v = store.bands[0].keys(), store.bands[0].values()
    for h in range(heads):
        own = h // (heads // kv_heads)
        lists, want = slow(model, q[h], k[own], v[own], 4, 4, seen[0]["how"].scale)
        assert_close(out[h], want, TOLERANCE)
        first = 0
        for read in seen:
            count, parts = read["q"].shape[2], read["parts"]
            if parts.lists is not None:
                got = [[n for n in row if n >= 0] for row in parts.lists[0, h].tolist()]
                assert got == lists[first : first + count]
            first += count


def test_features_do_not_depend_on_the_place() -> None:
    class Plain:
        scale, softcap = 0.25, None
        rope = Angles(*rotary(llama()))

    q, k, v = (torch.randn(1, heads, 6, 16) for heads in (4, 2, 2))
    here = LongHeads(chunk=6)._feature(q, k, v, torch.zeros(len(q), dtype=torch.long), Plain())
    delta = torch.full((1, 6), 48)
    there = LongHeads(chunk=6)._feature(
        Plain.rope.move(q, delta), Plain.rope.move(k, delta), v, torch.full((len(q),), 48), Plain()
    )
    assert_close(there, here, 1e-5)
    model, back = llama(), -torch.arange(6)
    want = [
        feature(model, turn(model, q[0, h], back), turn(model, k[0, h // 2], back), v[0, h // 2].double(), 0.25)
        for h in range(4)
    ]
    assert_close(here, torch.stack(want)[None], 1e-5)


@pytest.mark.parametrize("numbers", [1, 1500])
def test_features_are_those_of_any_number_of_chunks_at_a_time(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows of different length and a prompt in pieces: one chunk at a time, two or three, all."""
    model, rows = llama(), [prompt(1, 29)[0], prompt(1, 61, seed=2)[0]]
    ids, mask = left_padded(rows)
    found = []
    for most in (1 << 24, numbers):
        monkeypatch.setattr("foveate.methods.longheads.at_once", lambda device, most=most: most)
        with foveate.apply(model, LongHeads(chunk=4, tokens=16)) as handle, torch.no_grad():
            cache = handle.cache()
            first = announced(model, cache, ids[:, :50], mask[:, :50])
            rest = model(ids[:, 50:], attention_mask=mask, past_key_values=cache).logits
        found.append(torch.cat([first, rest], dim=1)[mask.bool()])
    assert_close(found[1], found[0], 1e-6)


def test_up_to_the_attended_length_it_is_the_model() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for options in ({"tokens": 48}, {"budget": 1.0}):
        got, _ = applied(model, LongHeads(chunk=4, **options), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_the_first_queries_of_a_long_prompt_are_the_models() -> None:
    """Chunk lists with ranks for positions, but nothing left out."""
    model, ids = llama(), prompt(1, 61)
    with foveate.apply(model, LongHeads(chunk=4, tokens=40)) as handle, torch.no_grad():
        got = announced(model, handle.cache(), ids)[:, :40]
    with torch.no_grad():
        want = model(ids).logits
    assert_close(got, want[:, :40], TOLERANCE)


def test_a_row_that_fits_beside_one_that_does_not() -> None:
    model = llama()
    rows = [prompt(1, 13)[0], prompt(1, 61, seed=2)[0]]
    ids, mask = left_padded(rows)
    want, _ = logits(model, rows[0][None])
    with foveate.apply(model, LongHeads(chunk=4, tokens=16)) as handle:
        got = announced(model, handle.cache(), ids, mask)
    assert_close(got[:1, -1:], want, TOLERANCE)


def test_forced_chunks_and_positions_that_the_model_knows() -> None:
    with watching() as seen:
        applied(llama(), LongHeads(chunk=4, tokens=16), prompt(2, 61), prompt(2, 8, seed=1))
    heads = set()
    for read in seen:
        if read["parts"].dense:
            continue
        parts, count = read["parts"], read["q"].shape[2]
        first = 0 if count == 61 else 61
        own = torch.arange(first, first + count) // 4 if count == 61 else None
        assert int(parts.frame.query.max()) < 16
        assert int(parts.frame.keys.max()) + 4 <= 16
        if own is not None:
            lists = parts.lists
            assert (lists == 0).any(-1).all()
            assert (lists == own[:, None]).any(-1).all()
            assert (lists == (own[:, None] - 1).clamp_min(0)).any(-1).all()
            heads |= {tuple(lists[0, h, -1].tolist()) for h in range(lists.shape[1])}
    assert len(heads) > 1, "heads choose for themselves"


def test_queries_of_one_chunk_are_held() -> None:
    _, cache = applied(llama(layers=1), LongHeads(chunk=4, tokens=16), prompt(1, 61))
    (layer,) = cache.couriers()
    assert {name: tuple(x.shape) for name, x in layer.mine["longheads"].items()} == {
        "features": (1, 6, 15 + SPARE // 4, 16),
        "queries": (1, 6, 4, 16),
    }


def test_tokens_are_not_taken_back() -> None:
    model = llama()
    with foveate.apply(model, LongHeads(chunk=4, tokens=16)) as handle, torch.no_grad():
        cache = handle.cache()
        model(prompt(1, 61), past_key_values=cache)
        with pytest.raises(foveate.Refused, match="longheads"):
            cache.crop(-1)
        cache = handle.cache()
        cache.expect(61)
        model(prompt(1, 30), past_key_values=cache)
        with pytest.raises(foveate.Refused, match="longheads"):
            cache.crop(-1)


def test_latent_attention_is_refused() -> None:
    with pytest.raises(foveate.Refused, match="other dimensions"):
        foveate.apply(tiny("deepseek-v3"), LongHeads())


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(), "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(LongHeads(chunk=4), budget=0.05).check(200)
    assert error.value.floor == pytest.approx(12 / 200)


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"tokens": 767}, {"budget": 0.0}], ids=str)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        LongHeads(**bad)


def test_defaults_are_the_released_ones() -> None:
    assert (LongHeads().chunk, LongHeads().tokens) == (256, 4096)
