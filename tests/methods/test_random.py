"""Random selection: by chance, and always the same chance."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import decode, left_padded, run
from tests.contract.runs import prompt as announced
from tests.contract.trace import same_reads, tracing
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores, watching

import foveate
from foveate.methods import Quest, RandomChoice, SnapKV
from foveate.methods.policies.chance import draw
from foveate.models import tiny

SMALL = {"budget": 24, "part": "both"}


def test_chances_are_even() -> None:
    """Over keys and over queries; equal numbers draw equally, and each number matters."""
    q, k = torch.arange(400).view(-1, 1), torch.arange(500)
    chance = draw(torch.tensor(3), q, k)
    assert chance.min() >= 0
    assert chance.max() < 1
    assert abs(chance.mean() - 0.5) < 3e-3
    for axis in (0, 1):
        assert (chance.mean(axis) - 0.5).abs().max() < 0.07  # 4.5 standard deviations of 400 draws
    assert chance.flatten().unique().numel() > 0.98 * chance.numel()
    centred = chance - 0.5
    assert ((centred[1:] * centred[:-1]).mean() * 12).abs() < 0.015
    assert ((centred[:, 1:] * centred[:, :-1]).mean() * 12).abs() < 0.015
    assert torch.equal(chance, draw(torch.tensor(3), q, k))
    assert not torch.equal(chance, draw(torch.tensor(4), q, k))
    assert not torch.equal(chance[:, :400], chance[:, :400].T)


def test_each_key_is_read_about_equally_often() -> None:
    model, ids, steps = llama(layers=4, heads=8, kv_heads=8), prompt(1, 61), prompt(1, 30, seed=1)
    with tracing(91) as trace:
        applied(model, RandomChoice(tokens=12), ids, steps)
    reads = torch.stack([pairs[0, :, 61:, :61] for pairs in trace.pairs.values()])
    assert all((pairs[0, :, 61:].sum(-1) == 12).all() for pairs in trace.pairs.values())
    assert all(pairs[0, :, i, i].all() for pairs in trace.pairs.values() for i in range(61, 91))
    share = reads.float().mean((0, 1, 2))
    assert (share - share.mean()).abs().max() < 4.5 * (share.mean() * (1 - share.mean()) / 960) ** 0.5


@pytest.mark.parametrize("part", ["decode", "prefill", "both"])
def test_sinks_and_recent_tokens_are_always_read(part: str) -> None:
    model, ids, steps = llama(), prompt(1, 41), prompt(1, 5, seed=1)
    with tracing(46) as trace:
        applied(model, RandomChoice(part=part, sink=2, recent=5, tokens=11), ids, steps)
    i, j = torch.arange(46)[:, None], torch.arange(46)
    always = (j <= i) & ((j < 2) | (i - j < 5))
    for pairs in trace.pairs.values():
        assert pairs[0][:, always].all()
        limited = {"decode": slice(41, 46), "prefill": slice(0, 41), "both": slice(0, 46)}[part]
        want = torch.arange(1, 47).clamp_max(11)[limited]
        assert (pairs[0].sum(-1)[:, limited] == want).all()


def test_seed_layer_head_and_query_draw_apart() -> None:
    model, ids, steps = llama(heads=4, kv_heads=4), prompt(1, 61), prompt(1, 2, seed=1)
    found = []
    for seed in (0, 1):
        with tracing(63) as trace:
            applied(model, RandomChoice(seed=seed, tokens=12), ids, steps)
        found += [pairs[0, head, i, :61] for pairs in trace.pairs.values() for head in range(4) for i in (61, 62)]
    rows = {tuple(row.tolist()) for row in found}
    assert len(rows) == len(found) == 2 * 3 * 4 * 2


def test_batch_padding_pieces_beams_and_resumed_texts_draw_the_same() -> None:
    """A pair's chance depends on nothing but seed, layer, head and positions."""
    model, method = llama(), RandomChoice(part="both", tokens=9)
    ids, steps = prompt(1, 41), prompt(1, 6, seed=1)
    with foveate.apply(model, method) as handle:

        def reads(work) -> dict[int, torch.Tensor]:
            with tracing(47) as trace:
                work(handle.cache())
            return {layer: pairs[-1:] for layer, pairs in trace.pairs.items()}

        want = reads(lambda cache: run(model, cache, ids, steps))
        batch, mask = left_padded([prompt(1, 5, seed=4)[0], ids[0]])
        same_reads(reads(lambda cache: run(model, cache, batch, steps.expand(2, -1), mask)), want)
        for size in (1, 7, 40):
            same_reads(reads(lambda cache, size=size: run(model, cache, ids, steps, chunk=size)), want)

        def beams(cache) -> None:
            announced(model, cache, ids.expand(2, -1))
            decode(model, cache, steps[:, :3].expand(2, -1))
            cache.reorder_cache(torch.tensor([1, 0]))
            decode(model, cache, steps[:, 3:].expand(2, -1))

        same_reads(reads(beams), want)

        def resumed(cache) -> None:
            announced(model, cache, ids)
            decode(model, cache, steps[:, :4])
            cache.crop(-2)
            decode(model, cache, steps[:, 2:])

        same_reads(reads(resumed), want)


def test_over_a_kept_set_chances_stay_those_of_the_positions() -> None:
    """Evicted keys drop out; among the others the draw is what it was."""
    model, ids, steps = llama(layers=1, heads=2, kv_heads=2), prompt(1, 61), prompt(1, 1, seed=1)
    with watching() as seen:
        _, cache = applied(model, SnapKV(budget=20, window=5) | RandomChoice(tokens=6), ids, steps)
    read = seen[-1]
    positions = torch.tensor(held(stores(cache)[0]))
    lists = read["parts"].lists[0, :, 0].long()
    with watching() as plain:
        applied(model, RandomChoice(tokens=61), ids, steps)  # all but one of 62
    everything = plain[-1]["parts"].lists[0, :, 0].tolist()
    for head in range(2):
        chosen = {int(positions[head, slot]) for slot in lists[head]}
        assert 61 in chosen
        assert len(chosen) == 6
        left_out = (set(range(62)) - set(everything[head])).pop()  # the least of all chances
        assert left_out not in chosen


@pytest.mark.parametrize("part", ["decode", "prefill", "both", "keep"])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3", "gemma3"])
def test_reading_all_is_dense(part: str, family: str) -> None:
    model = tiny(family, heads=4, kv_heads=2)
    ids, steps = prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for settings in ({"tokens": 48}, {"budget": 1.0}):
        got, _ = applied(model, RandomChoice(part=part, **settings), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_kept_tokens_are_drawn_once_per_head() -> None:
    model, ids = llama(heads=4, kv_heads=4), prompt(2, 61)
    _, cache = applied(model, RandomChoice(part="keep", sink=2, recent=5, budget=20), ids, prompt(2, 3, seed=1))
    kept = [tuple(x) for store in stores(cache) for x in held(store)]
    assert all(len(x) == 23 and {0, 1, *range(56, 64)} <= set(x) for x in kept)
    assert [held(store)[:4] for store in stores(cache)] == [held(store)[4:] for store in stores(cache)]  # the two rows
    assert len(set(kept)) == 3 * 4
    _, again = applied(model, RandomChoice(part="keep", sink=2, recent=5, budget=20), ids[:1], chunks=16)
    first = [[p for p in x if p < 61] for store in stores(cache) for x in held(store)[:4]]
    assert [x for store in stores(again) for x in held(store)] == first


def test_a_slot_that_is_not_filled_is_free() -> None:
    assert (RandomChoice() | SnapKV()).id == "random|snapkv"
    assert (RandomChoice(part="keep") | Quest()).id == "random|quest"
    with pytest.raises(foveate.BadArgument, match="keep"):
        RandomChoice(part="keep") | SnapKV()


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(layers=2), "dense") as handle:
        for part, floor in (("decode", 7 / 200), ("both", (7 * 200 - 21) / (200 * 201 / 2))):
            with pytest.raises(foveate.Infeasible) as error:
                handle.bind(RandomChoice(part=part, sink=3, recent=4, budget=0.033)).check(200)
            assert error.value.floor == pytest.approx(floor)


@pytest.mark.parametrize(
    "bad", [{"part": "all"}, {"sink": -1}, {"recent": 0}, {"tokens": 0}, {"tokens": 5, "sink": 4, "recent": 2}]
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        RandomChoice(**bad)
