"""Weights of a decode step, and the token that leaves behind it, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import DEVICE, bound, made, on, spoiled
from tests.closeness import assert_close
from torch import Tensor

from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.arrive import arrive, counters, reached, tags_of
from foveate.attention.triton.decode import Stores, decode_ragged
from foveate.attention.triton.decode_weights import add_mass, decode_scored, page_weights, probabilities
from foveate.attention.triton.evict import Guard, evict

LENGTHS = torch.tensor([130, 1, 0, 77], dtype=torch.int32)


def weights(
    q: Tensor, k: Tensor, lengths: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Probabilities [B, H, 1, C] in float64, 0 behind the lengths [P]."""
    batch, heads = q.shape[:2]
    k = k.double().view(batch, -1, *k.shape[1:]).repeat_interleave(heads * batch // k.shape[0], 1)
    logits = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    group = heads * batch // len(lengths)
    seen = torch.arange(k.shape[2]) < lengths.view(batch, -1).repeat_interleave(group, 1)[..., None, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(1, -1, 1, 1).expand(batch, -1, 1, 1)], -1)
    return logits.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]


@pytest.mark.parametrize(
    ("dtype", "group", "dim"),
    [(torch.float32, 1, 48), (torch.bfloat16, 3, 64), (torch.float32, 8, 80), (torch.bfloat16, 8, 32)],
)
@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (5.0, True)])
def test_weights_of_ragged_stores(
    seed: int, dtype: torch.dtype, group: int, dim: int, softcap: float | None, sunk: bool
) -> None:
    torch.manual_seed(seed)
    q, k, v = made(dtype, 2, 2 * group, 1, dim, factor=2), made(dtype, 4, 131, dim), made(dtype, 4, 131, 24)
    sinks = torch.randn(2 * group) if sunk else None
    want = weights(q, k, LENGTHS, 0.2, softcap, sinks)
    columns = torch.randn(4, 135)  # of a store with room for a few more
    mass = columns[:, :131].double() + want.view(4, group, 131).sum(1)
    q, k, v, held, column = on(q, spoiled(k, LENGTHS), spoiled(v, LENGTHS), LENGTHS, columns)
    stores = Stores(k, v, held)
    sinks = None if sinks is None else sinks.to(DEVICE)
    out, lse, scores = decode_scored(q, stores, 131, 0.2, softcap, sinks)
    same = decode_ragged(q, stores, 0.2, softcap, sinks)
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])
    add_mass(scores, lse, stores, *given(reached([column], [4], DEVICE)))
    assert_close(column[:, :131].cpu(), mass, bound(torch.float32))
    assert torch.equal(column[:, 131:].cpu(), columns[:, 131:])
    got = probabilities(scores, lse, stores).cpu()
    assert got.shape == want.shape and not got[want == 0].any()
    assert_close(got, want, bound(torch.float32))


def given(found: tuple[Tensor | None, Tensor]) -> tuple[Tensor, Tensor]:
    base, start = found
    assert base is not None
    return base, start


def test_weights_of_several_bands_of_long_rows(seed: int) -> None:
    """Bands of different widths in pairs of their own, more slots than one program sees, values within the keys."""
    torch.manual_seed(seed)
    lengths, pairs, sizes = torch.tensor([1500, 1100, 40, 9], dtype=torch.int32), ([3, 0], [2, 1]), (1500, 48)
    q = made(torch.float32, 2, 6, 1, 32)
    whole, place = torch.zeros(4, 1500, 32), torch.zeros(4, dtype=torch.int32)
    bands, columns, held = [], [], lengths.split(2)
    for numbers, count, capacity in zip(pairs, held, sizes, strict=True):
        k = made(torch.float32, 2, capacity, 32)
        whole[numbers, :capacity], place[numbers] = k, count
        k = spoiled(k, count).to(DEVICE)
        bands.append((k, k[..., :24], torch.tensor(numbers, device=DEVICE)))
        columns.append(torch.zeros(2, capacity, 1, device=DEVICE))
    want = weights(q, whole, place, 0.3)
    stores = Stores.of(bands, lengths.to(DEVICE))
    _, lse, scores = decode_scored(q.to(DEVICE), stores, 1500, 0.3)
    add_mass(scores, lse, stores, *given(reached(columns, [2, 2], DEVICE)))
    summed = want.view(4, 3, 1500).sum(1)
    for numbers, capacity, column in zip(pairs, sizes, columns, strict=True):
        assert_close(column[..., 0].cpu(), summed[numbers, :capacity], bound(torch.float32))
    assert_close(probabilities(scores, lse, stores).cpu(), want, bound(torch.float32))


@pytest.mark.parametrize(("heads", "page", "recent"), [(6, 16, 2), (1, 1, 3), (5, 32, 40)])
def test_what_pages_weigh(seed: int, heads: int, page: int, recent: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.tensor([[1211, 9], [9, 9]], dtype=torch.int32)[:, 0]
    probs = torch.rand(2, heads, 1, 1300)[..., :1211]
    probs = probs.masked_fill(torch.arange(1211) >= lengths.view(2, 1, 1, 1), 0.0)
    count = -(-1211 // page)
    mass = torch.nn.functional.pad(probs.double().amax(1), (0, count * page - 1211)).view(2, count, page).sum(-1)
    age = (lengths[:, None] - 1) // page - torch.arange(count)
    want = mass.masked_fill(age < recent, torch.inf).masked_fill(age < 0, -torch.inf)
    room = torch.zeros(2, heads, 1, 1300)
    room[..., :1211] = probs
    got = page_weights(room.to(DEVICE)[..., :1211], lengths.to(DEVICE), page, recent).cpu()
    assert torch.equal(got.isinf() * got.sign(), (want.isinf() * want.sign()).float())
    assert_close(got[got.isfinite()], want[want.isfinite()], bound(torch.float32))


WORDS = [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)]
"""Types of tags, of 4 bytes and of 2."""


class Held:
    """Four pairs of two rows in one band or two, with a tag of two numbers and one of whole numbers."""

    def __init__(self, split: bool, words: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.int32)) -> None:
        numbers = [[2, 0], [1, 3]] if split else [[0, 1, 2, 3]]
        self.sizes = [len(x) for x in numbers]
        self.pairs = [torch.tensor(x) for x in numbers]
        self.order = torch.cat(self.pairs)
        self.capacity, capacity = 1300, [1300, 1290][: len(numbers)]
        self.lengths = torch.tensor([[1210, 7, 1210, 1030]], dtype=torch.int32).view(4)[self.order]
        self.parts = [
            {
                "k": torch.randn(n, c, 40),
                "v": torch.randn(n, c, 24),
                "positions": torch.stack([torch.randperm(c) for _ in range(n)]).int(),
                "pair": torch.randn(n, c, 2).to(words[0]),
                "whole": torch.randint(0, 99, (n, c, 1), dtype=words[1]),
            }
            for n, c in zip(self.sizes, capacity, strict=True)
        ]
        self.there = [{name: x.clone().to(DEVICE) for name, x in part.items()} for part in self.parts]
        self.seen = torch.tensor([1400, 1350])[self.order // 2]
        bands = [(part["k"], part["v"], on(p)[0]) for part, p in zip(self.there, self.pairs, strict=True)]
        self.now = self.lengths.clone().to(DEVICE)
        self.stores = Stores.of(bands, self.now)
        tags = tags_of([[(part["pair"], 0.5), (part["whole"], 7)] for part in self.there])
        turn = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        where = [part["positions"] for part in self.there]
        self.counters = counters(
            self.now, self.seen.to(DEVICE), turn, [None] * len(where), list(where), self.sizes, tags
        )

    def each(self) -> list[tuple[int, dict[str, Tensor], dict[str, Tensor], int]]:
        """Pair number, what it held, what it holds now, and which it is in its band."""
        bands = zip(self.parts, self.there, self.sizes, strict=True)
        found = [(part, now, i) for part, now, n in bands for i in range(n)]
        return [(int(self.order[u]), part, now, i) for u, (part, now, i) in enumerate(found)]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("newest", "words"), [(False, WORDS[0]), (True, WORDS[0]), (False, WORDS[1])], ids=["", "newest", "short words"]
)
def test_the_least_free_token_goes_and_the_newest_takes_its_slot(seed: int, split: bool, newest: bool, words) -> None:
    torch.manual_seed(seed)
    held = Held(split, words)
    scores = torch.randn(2, 2, held.capacity).mul(8).round()  # ties
    recent, sink = torch.tensor([200, 150]), 3
    for unit, (pair, before, _, i) in enumerate(held.each()):  # those next to the free ones are the least of all
        row, position = pair // 2, before["positions"][i]
        guarded = (position == sink - 1) | (position == held.seen[unit] - recent[row])
        scores[row, pair % 2, : len(position)][guarded] = -99
    slots = evict(scores.to(DEVICE), Guard(sink, recent.to(DEVICE)), held.stores, held.counters, newest=newest)
    assert torch.equal(held.now.cpu(), held.lengths - 1)
    for unit, (pair, before, now, i) in enumerate(held.each()):
        length, position = int(held.lengths[unit]), before["positions"][i]
        free = (position >= sink) & (position < held.seen[unit] - recent[pair // 2])
        free &= torch.arange(len(position)) < length
        score = scores[pair // 2, pair % 2, : len(position)].masked_fill(~free, torch.inf)
        slot = length - 1 if newest else int(score.argmin())
        assert int(slots[unit]) == slot and (newest or free.any())
        for name, x in before.items():
            want = x[i].clone()
            want[slot] = want[length - 1]
            assert torch.equal(now[name][i].cpu(), want), name


def test_where_all_is_guarded_the_first_slot_goes(seed: int) -> None:
    torch.manual_seed(seed)
    held = Held(False)
    guard = Guard(0, torch.full((2,), 5000, device=DEVICE))
    assert not evict(torch.randn(2, 2, held.capacity, device=DEVICE), guard, held.stores, held.counters).any()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("words", WORDS, ids=str)
def test_tags_of_a_token_that_arrives_are_filled(seed: int, split: bool, words) -> None:
    torch.manual_seed(seed)
    held = Held(split, words)
    arrive(torch.randn(2, 2, 1, 40, device=DEVICE), torch.randn(2, 2, 1, 24, device=DEVICE), held.stores, held.counters)
    for unit, (_, before, now, i) in enumerate(held.each()):
        for name, fill in (("pair", 0.5), ("whole", 7)):
            want = before[name][i].clone()
            want[int(held.lengths[unit])] = fill
            assert torch.equal(now[name][i].cpu(), want)


def test_positions_of_a_token_that_arrives_are_noted_wherever_they_lie(seed: int) -> None:
    """Memory is given out in any order: those of a second band may lie in front of the first's. One may have none."""
    torch.manual_seed(seed)
    held = Held(True)
    pool = torch.full((2, 2, 1300), -1, dtype=torch.int32, device=DEVICE)
    new = torch.randn(2, 2, 1, 40, device=DEVICE), torch.randn(2, 2, 1, 24, device=DEVICE)
    for places in ([pool[1], pool[0, :, :1290]], [None, pool[0, :, :1290]], [pool[1], None]):
        pool.fill_(-1)
        turn = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        held.now.copy_(held.lengths)
        arrive(
            *new, held.stores, counters(held.now, held.seen.clone().to(DEVICE), turn, [None] * 2, places, held.sizes)
        )
        assert (pool >= 0).sum() == 2 * sum(x is not None for x in places)
        for unit, (band, i) in enumerate((band, i) for band in range(2) for i in range(2)):
            x = places[band]
            assert x is None or x[i, int(held.lengths[unit])] == held.seen[unit]


def test_what_cannot_be_served() -> None:
    held = Held(False)
    with pytest.raises(BadArgument, match="positions"):
        evict(torch.zeros(2, held.capacity), Guard(0, torch.zeros(2)), held.stores, held.counters)
    with pytest.raises(BadArgument, match="one query"):
        decode_scored(torch.zeros(2, 2, 2, 40, device=DEVICE), held.stores, 1300, 1.0)
    with pytest.raises(BadArgument, match="power of two"):
        page_weights(torch.zeros(1, 2, 1, 24), torch.zeros(1, dtype=torch.int32), 12, 1)
    assert tags_of([[(torch.zeros(1, 2, 1, dtype=torch.int8), 0.0)]]) is None
    assert tags_of([[(torch.zeros(1, 2, 1, dtype=x), 0.0) for x in (torch.int16, torch.int32)]]) is None
