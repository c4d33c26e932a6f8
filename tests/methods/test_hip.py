"""HiP: must-hold tests of its card."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from torch import Tensor

import foveate
from foveate.attention import decoding
from foveate.methods import HiP, SnapKV
from foveate.methods import hip as module
from foveate.methods.policies.lists import close_gaps
from foveate.methods.policies.tree import descend
from foveate.models import tiny

SMALL = {
    "tokens": 8,
    "q_block": 8,
    "k_block": 2,
    "sink": 3,
    "window": 6,
    "refresh": 3,
    "dense_layers": 1,
}


def slow_search(low: int, high: int, slots: int, value: Any) -> set[int]:
    """The tree search in words of one range: groups, halves, the best by their first block."""
    n = max(0, high - low)
    edges = [low + n * s // slots for s in range(slots + 1)]
    groups = [(a, b) for a, b in pairwise(edges) if b > a]
    while any(b - a > 1 for a, b in groups):
        halves = []
        for a, b in groups:
            middle = a + (b - a) // 2
            halves += [(x, y) for x, y in ((a, middle), (middle, b)) if y > x]
        halves.sort(key=lambda half: (-value(half[0]), half[0]))
        groups = halves[:slots]
    return {a for a, _ in groups}


def listed(selection: Any, *where: int) -> list[int]:
    row = selection.lists[where]
    return row[row >= 0].tolist()


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [64, 77])
@pytest.mark.parametrize("slots", [2, 5])
def test_finds_the_one_peak(blocks: int, slots: int) -> None:
    """Logits that fall with the distance from one block: found wherever it stands."""
    low, high = torch.full((blocks,), 3), torch.full((blocks,), 3 + blocks)
    peak = 3 + torch.arange(blocks)
    found = descend(low, high, slots, lambda at: -(at - peak[:, None]).abs().float())
    assert (found == peak[:, None]).any(-1).all()


@pytest.mark.parametrize("levels", [0, 3])
def test_equals_the_slow_search(levels: int, seed: int) -> None:
    """Of equal scores the earlier ones: with three levels nearly all are equal."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randint(0, levels, (60,), generator=g).float() if levels else torch.randn(60, generator=g)
    low = torch.randint(0, 20, (40,), generator=g)
    high = low + torch.randint(-2, 40, (40,), generator=g)
    for slots in (1, 3, 8):
        found = descend(low, high, slots, lambda at: value[at.clamp_max(59)])
        for row, a, b in zip(found.tolist(), low.tolist(), high.tolist(), strict=True):
            got = [x for x in row if x >= 0]
            assert got == sorted(set(got))
            assert len(got) == max(0, min(slots, b - a))
            assert set(got) == slow_search(a, b, slots, lambda at: value[at])


def test_groups_overlook_no_block() -> None:
    """Whatever is best alone and first in its half is found, at any place: with as many slots as blocks, all are."""
    for n in range(1, 40):
        for slots in (n, n + 3):
            found = descend(torch.tensor([5]), torch.tensor([5 + n]), slots, lambda at: at.float())
            assert close_gaps(found)[0, :n].tolist() == list(range(5, 5 + n))
        edges = 5 + n * torch.arange(8) // 7
        assert set(edges.diff().tolist()) <= {n // 7, -(-n // 7)}


@pytest.mark.parametrize(("blocks", "slots"), [(64, 8), (65, 8), (100, 7), (8, 8)])
def test_logits_looked_at_grow_with_the_logarithm(blocks: int, slots: int) -> None:
    looked = 0

    def score(at: Tensor) -> Tensor:
        nonlocal looked
        looked += at.numel()
        return torch.rand(at.shape)

    descend(torch.tensor([0]), torch.tensor([blocks]), slots, score)
    assert looked <= 2 * slots * math.ceil(math.log2(blocks / slots))


@pytest.mark.parametrize(("length", "q_stride", "tokens"), [(256, 1, 16), (205, 2, 8), (133, 3, 10)])
def test_a_prompt_looks_at_so_many_logits_a_block(
    length: int, q_stride: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 2K · keys of a block · queries asked · log2(T/k) for each head and block of queries."""
    looked, original = 0, HiP._search

    def searched(self: HiP, asking: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        def counting(low: Tensor, high: Tensor, slots: int, score: Any, most: int) -> Tensor:
            def counted(at: Tensor) -> Tensor:
                nonlocal looked
                looked += at.numel() * self.k_block * asking.shape[3]
                return score(at)

            return descend(low, high, slots, counted, most)

        monkeypatch.setattr(module, "descend", counting)
        return original(self, asking, keys, *rest)

    monkeypatch.setattr(HiP, "_search", searched)
    run(llama(layers=1), prompt(1, length), dense_layers=0, q_stride=q_stride, tokens=tokens)
    lists, asked = 6 * -(-length // 8), len(range(q_stride - 1, 8, q_stride))
    assert 0 < looked <= lists * 2 * tokens * asked * math.ceil(math.log2(length / tokens))


def test_defaults_are_the_papers() -> None:
    method = HiP()
    assert (method.tokens, method.q_block, method.k_block, method.q_stride) == (512, 32, 2, 2)
    assert (method.dense_layers, method.refresh) == (3, 8)


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "heads", "kv_heads"), [("llama", 4, 4), ("llama", 8, 1), ("deepseek-v3", 6, 2)])
def test_room_for_all_is_dense(family: str, heads: int, kv_heads: int) -> None:
    model = tiny(family, heads=heads, kv_heads=kv_heads)
    ids, steps = prompt(2, 61), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, steps)
    for kwargs in ({"tokens": 80}, {"budget": 1.0}):
        got, _ = applied(model, HiP(**{**SMALL, **kwargs}), ids, steps)
        assert_close(got, want, TOLERANCE)


def run(model: Any, ids: Tensor, steps: Tensor | None = None, **kwargs: Any) -> list[dict[str, Any]]:
    """Reads of the sparse layers."""
    with watching() as seen:
        applied(model, HiP(**{**SMALL, **kwargs}), ids, steps)
    return [read for read in seen if not read["parts"].dense]


@pytest.mark.parametrize("q_stride", [1, 2, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
def test_prompt_lists_equal_a_slow_search(heads: int, kv_heads: int, q_stride: int) -> None:
    length = 93
    model = llama(layers=1, heads=heads, kv_heads=kv_heads)
    read = run(model, prompt(1, length), dense_layers=0, q_stride=q_stride)[0]
    q, k = read["q"][0], read["store"].bands[0].keys().repeat_interleave(heads // kv_heads, 0)
    for head in range(heads):
        logit = q[head] @ k[head].T
        for i in range(12):
            rows = [min(8 * i + r, length - 1) for r in range(q_stride - 1, 8, q_stride)]
            begin = max(0, 8 * i - 5) // 2
            best = slow_search(2, begin, 4, lambda at, rows=rows, logit=logit: logit[rows, 2 * at : 2 * at + 2].max())
            last = min(8 * i + 7, length - 1)
            want = best | set(range(min(2, begin))) | set(range(begin, last // 2 + 1))
            assert listed(read["parts"], 0, head, i) == sorted(want)


@pytest.mark.parametrize(("count", "rows"), [(5, 3), (4, 1)])
def test_kernels_find_what_words_find(count: int, rows: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of queries of a prompt, some at a time, at the first ones of which there is little to search."""
    pytest.importorskip("triton")
    if torch.cuda.is_available() or not decoding._interpreted():
        pytest.skip("needs Triton's interpreter")
    torch.manual_seed(seed)
    asking, keys = torch.randn(2, 4, count, rows, 24), torch.randn(2, 2, 149, 24)
    begin = torch.randint(0, 70, (2, 2, count)).sort(dim=-1).values
    method = HiP()
    want = close_gaps(method._search(asking, keys, begin, 6))
    monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
    monkeypatch.setattr(module, "at_once", lambda device: 2 * 4 * 2 * 6 * 4 * 2)  # two sets
    assert torch.equal(close_gaps(method._search(asking, keys, begin, 6)), want)


def test_the_last_block_is_asked_by_real_queries() -> None:
    """Padding of a partial block has no say: the lists of a prompt are those of the same prompt in a padded batch."""
    model, ids = llama(layers=2), prompt(1, 89)
    alone = run(model, ids)[0]["parts"].lists
    both = torch.cat([torch.zeros(1, 12, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(101) >= 12).long()[None]
    long = prompt(1, 101, seed=4)
    with foveate.apply(model, HiP(**SMALL)) as handle, torch.no_grad(), watching() as seen:
        cache = handle.cache()
        cache.expect(101)
        full = torch.cat([mask, torch.ones_like(mask)])
        model(torch.cat([both, long]), attention_mask=full, past_key_values=cache)
    together = next(r["parts"] for r in seen if not r["parts"].dense)
    for head in range(6):
        for i in range(12):
            row = alone[0, head, i]
            assert listed(together, 0, head, i) == row[row >= 0].tolist()


def test_lists_hold_sinks_window_and_as_many_blocks_as_asked() -> None:
    model, ids, steps = llama(layers=3), prompt(2, 101), prompt(2, 7, seed=1)
    reads = run(model, ids, steps)
    assert len(reads) == 2 * 8
    for number, read in enumerate(reads):
        lists = read["parts"].lists
        assert lists.shape[1] == 6
        for i in range(lists.shape[2]):
            first, last = (8 * i, min(8 * i + 7, 100)) if number < 2 else (99 + number // 2 + 1,) * 2
            for row in range(2):
                for head in range(6):
                    blocks = listed(read["parts"], row, head, i)
                    assert blocks == sorted(set(blocks))
                    assert {0, min(1, last // 2)} <= set(blocks)
                    assert set(range(max(0, first - 5) // 2, last // 2 + 1)) <= set(blocks)
                    if number < 2:
                        between = max(0, max(0, first - 5) // 2 - 2)
                        window = [b for b in blocks if 2 <= b < max(0, first - 5) // 2]
                        assert len(window) == min(4, between)


def far_blocks(read: dict[str, Any], begin: int) -> list[list[int]]:
    return [[b for b in listed(read["parts"], 0, head, 0) if 2 <= b < begin] for head in range(6)]


@pytest.mark.parametrize("refresh", [1, 3])
def test_a_search_serves_so_many_steps(refresh: int) -> None:
    """In between the list stays and the window grows, so that everything behind it is read."""
    model, ids, steps = llama(layers=2), prompt(1, 101), prompt(1, 9, seed=1)
    reads = run(model, ids, steps, refresh=refresh)[1:]
    found = []
    for step, read in enumerate(reads):
        searched = 101 + step // refresh * refresh
        begin = (searched - 5) // 2
        found.append(far_blocks(read, begin))
        for head in range(6):
            assert listed(read["parts"], 0, head, 0)[-1] == (101 + step) // 2
            assert set(range(begin, (101 + step) // 2 + 1)) <= set(listed(read["parts"], 0, head, 0))
            assert len(found[-1][head]) == 4
    for step in range(1, 9):
        if step % refresh:
            assert found[step] == found[step - 1]
    assert found[0] != found[3]


def test_refreshing_always_is_searching_anew() -> None:
    model, ids, steps = llama(layers=2), prompt(1, 101), prompt(1, 5, seed=1)
    for step, read in enumerate(run(model, ids, steps, refresh=1)[1:]):
        begin = (101 + step - 5) // 2
        q, k = read["q"][0, :, 0], read["store"].bands[0].keys().repeat_interleave(3, 0)
        for head in range(6):
            logit = k[head, : 102 + step] @ q[head]
            want = slow_search(2, begin, 4, lambda at, logit=logit: logit[2 * at : 2 * at + 2].max())
            assert set(far_blocks(read, begin)[head]) == want


def test_tokens_cannot_be_taken_back() -> None:
    """The query whose search is in use may be older than what is taken back, or among it."""
    with foveate.apply(llama(layers=2), HiP(**SMALL)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(101)
        handle.model(prompt(1, 101), past_key_values=cache)
        handle.model(prompt(1, 1), past_key_values=cache)
        with pytest.raises(foveate.Refused, match="hip"):
            cache.crop(-1)


def test_works_on_what_another_method_holds() -> None:
    model, ids, steps = llama(layers=2), prompt(2, 101), prompt(2, 6, seed=1)
    got, cache = applied(model, HiP(**SMALL) | SnapKV(budget=60, window=5), ids, steps)
    assert got.isfinite().all()
    assert {int(n) for store in stores(cache) for band in store.bands for n in band.lengths} == {66}


def test_pieces_of_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(layers=2), prompt(1, 101)
    want = run(model, ids)[0]["parts"].lists
    monkeypatch.setattr(module, "at_once", lambda device: 1)
    assert torch.equal(run(model, ids)[0]["parts"].lists, want)


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(layers=4), "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(HiP(**SMALL), budget=0.276).check(400)
    least = 2 * 2 + 6 + 1 + 2 + 2 * 2  # sinks, window in whole blocks and grown, two blocks
    assert error.value.floor == pytest.approx((400 + 3 * least) / (4 * 400))


@pytest.mark.parametrize(
    "bad",
    [{"tokens": 3}, {"q_block": 0}, {"k_block": 0}, {"q_stride": 0}, {"sink": -1}, {"window": 0}, {"refresh": 0}],
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        HiP(**bad)
