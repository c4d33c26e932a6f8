"""H2O: must-hold tests of its card."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores, watching

import foveate
from foveate.methods import H2O

SMALL = {"budget": 24}


def test_room_for_all_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for method in (H2O(budget=48), H2O(budget=1.0)):
        got, cache = applied(model, method, ids, steps)
        assert_close(got, want, TOLERANCE)
        assert all(len(x) == 48 for store in stores(cache) for x in held(store))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("chunks", [None, 7])
def test_mass_is_the_column_sum_of_the_attention_map(heads: int, kv_heads: int, chunks: int | None) -> None:
    ids = prompt(2, 41)
    model = llama(heads=heads, kv_heads=kv_heads, layers=2)
    with watching() as seen:
        applied(model, "dense", ids)
    _, cache = applied(model, H2O(budget=1.0), ids, chunks=chunks)
    for read, store in zip(seen, stores(cache), strict=True):
        q = read["q"]
        k = read["store"].bands[0].keys().unflatten(0, (2, kv_heads)).repeat_interleave(heads // kv_heads, 1)
        logit = (q @ k.transpose(-1, -2) * read["how"].scale).masked_fill(torch.ones(41, 41).triu(1).bool(), -torch.inf)
        want = logit.softmax(-1).sum(2).unflatten(1, (kv_heads, -1)).sum(2)
        (band,) = store.bands
        got = band.tags["columns"].read(41).squeeze(-1).unflatten(0, (2, kv_heads))
        assert_close(got, want, TOLERANCE)


def test_recursion_against_a_plain_loop() -> None:
    """One layer: sums, evictions and survivors of prompt and decode, by an independent loop over the dense q, k."""
    ids, steps, budget = prompt(1, 41), prompt(1, 12, seed=1), 20
    model = llama(layers=1)
    with watching() as seen:
        applied(model, "dense", ids, steps)
    q = torch.cat([r["q"] for r in seen], dim=2)[0].double()
    k = seen[-1]["store"].bands[0].keys().double()
    scale, group, recent = seen[0]["how"].scale, 3, 10
    _, cache = applied(model, H2O(budget=budget), ids, steps)
    for head in range(2):
        acc, kept = {}, []
        for t in range(41 + 12):
            kept.append(t)
            acc[t] = 0.0
            for g in range(group):
                logit = torch.stack([q[head * group + g, t] @ k[head, j] for j in kept]) * scale
                for j, p in zip(kept, logit.softmax(0).tolist(), strict=True):
                    acc[j] += p
            if t >= 40:
                while len(kept) > budget:
                    kept.remove(min((j for j in kept if j <= t - recent), key=lambda j: acc[j]))
        assert held(stores(cache)[0])[head] == kept


def test_exactly_the_budget_for_every_head_and_scores_travel() -> None:
    _, cache = applied(llama(), H2O(budget=16), prompt(2, 41), prompt(2, 9, seed=1))
    for store in stores(cache):
        assert (store.lengths == 16).all()
        for band in store.bands:
            mass = band.tags["columns"].read(band.used)
            # A prompt key gathers mass from at least its own row; a tag lost on the way would be 0.
            old = band.slot_positions() < 41
            assert (mass.squeeze(-1)[old] > 0).all()


def test_rows_of_a_batch_evict_alone(seed: int) -> None:
    """The released cache that really drops adds up the mass of a whole batch."""
    model, ids, steps = llama(), prompt(3, 41, seed % 10**6), prompt(3, 9, seed % 10**6 + 1)
    _, together = applied(model, H2O(budget=16), ids, steps)
    for row in range(3):
        _, alone = applied(model, H2O(budget=16), ids[row : row + 1], steps[row : row + 1])
        for both, one in zip(stores(together), stores(alone), strict=True):
            assert held(both)[2 * row : 2 * row + 2] == held(one)


def test_recent_window_is_held_by_share() -> None:
    _, cache = applied(llama(), H2O(budget=16, heavy=0.25), prompt(1, 41))
    for store in stores(cache):
        for positions in held(store):
            assert set(range(41 - 12, 41)) <= set(positions)


def test_what_is_evicted_never_returns() -> None:
    model, ids, steps = llama(), prompt(1, 41), prompt(1, 8, seed=1)
    before = None
    with foveate.apply(model, H2O(budget=14)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(41)
        model(ids, past_key_values=cache)
        for i in range(8):
            now = [set(x) for s in stores(cache) for x in held(s)]
            if before is not None:
                assert all(new - {41 + i - 1} <= old for new, old in zip(now, before, strict=True))
            before = now
            model(steps[:, i : i + 1], past_key_values=cache)


def test_tokens_cannot_be_taken_back() -> None:
    model = llama()
    with foveate.apply(model, H2O(budget=14)) as handle, torch.no_grad():
        cache = handle.cache()
        model(prompt(1, 41), past_key_values=cache)
        with pytest.raises(foveate.Refused, match="h2o"):
            cache.crop(-1)


def test_half_of_the_budget_is_for_heavy_hitters() -> None:
    assert H2O().heavy == 0.5
    assert H2O().protect.recent == 0.5


def test_bad_parameters() -> None:
    with pytest.raises(foveate.BadArgument, match="heavy"):
        H2O(heavy=1.0)
