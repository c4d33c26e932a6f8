"""What a selection means, pair by pair."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tests.attention.reads import Read, random_read

from foveate.attention import ALL, Geometry, Selection, Span
from foveate.attention.selection import needed


def sees(span: Span, store: int, i: int, j: int) -> bool:
    one = span.for_head(store)
    assert isinstance(one.sink, int)
    assert isinstance(one.beyond, int)
    near = one.window is None or j < one.sink or i - j < one.window
    return j <= i and i - j >= one.beyond and near


def by_hand(read: Read) -> torch.Tensor:
    """The mask, one pair at a time, from the words of the docstrings alone."""
    g, s, heads = read.places(), read.selection, read.heads
    store_heads = read.k.shape[1]

    def at(x: torch.Tensor | None, b: int, store: int, default: int) -> int:
        return default if x is None else int(x[b, store if x.shape[1] > 1 else 0])

    mask = torch.zeros(g.batch, heads, g.queries, g.keys, dtype=torch.bool)
    past = g.keys - g.queries
    for b in range(g.batch):
        for h in range(heads):
            store = h // (heads // store_heads)
            for i in range(g.queries):
                q_at = past + i if g.q_positions is None else int(g.q_positions[b, i])
                end = min(at(g.first, b, store, past) + i + 1, at(g.lengths, b, store, g.keys), g.keys)
                for j in range(end):
                    k_at = j if g.k_positions is None else at(g.k_positions[..., j], b, store, 0)
                    if not all(span.unbounded or sees(span, store, q_at, k_at) for span in read.visible):
                        continue
                    chosen = s.lists is None and s.span is None
                    if s.lists is not None:
                        lists = s.lists[b, h // (heads // s.lists.shape[1]), 0 if s.q_block is None else i // s.q_block]
                        chosen = j // s.k_block in lists.tolist()
                    if s.span is not None and not chosen:
                        chosen = s.span.unbounded or sees(s.span, store, q_at, k_at)
                    mask[b, h, i, j] = chosen
    return mask


@pytest.mark.parametrize("number", range(25))
def test_the_mask_is_what_the_words_say(seed: int, number: int) -> None:
    read = random_read(seed)
    while read.q.shape[1] * read.q.shape[2] * read.k.shape[2] > 4000:
        seed += 1
        read = random_read(seed)
    mask = read.selection.mask(read.places(), read.heads, read.visible)
    assert torch.equal(mask, by_hand(read))


@pytest.mark.parametrize("number", range(12))
def test_rows_of_a_selection_are_rows_of_its_mask(seed: int, number: int) -> None:
    read = random_read(seed)
    g = read.places()
    whole = read.selection.mask(g, read.heads, read.visible)
    for start, stop in ((0, 1), (0, g.queries), (g.queries // 3, g.queries // 2 + 1), (g.queries - 1, g.queries)):
        part = read.selection.rows(start, stop).mask(g.rows(start, stop), read.heads, read.visible)
        assert torch.equal(part, whole[:, :, start:stop])


def test_span_hides_by_position() -> None:
    g = Geometry(1, 6, 6)
    mask = Selection(span=Span(sink=1, window=2)).mask(g, 1)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]
    assert ALL.mask(g, 1)[0, 0].equal(torch.ones(6, 6).tril().bool())


def test_near_and_far_partition_the_causal_pairs(seed: int) -> None:
    torch.manual_seed(seed)
    g = Geometry(2, 30, 57)
    near, far = Selection(span=Span(window=9)).mask(g, 4), Selection(span=Span(beyond=9)).mask(g, 4)
    assert not (near & far).any()
    assert torch.equal(near | far, ALL.mask(g, 4))


def test_needed_spans_see_what_all_of_them_see(seed: int) -> None:
    """And of spans of which one lies within the other only that one is left."""
    rng = random.Random(seed)
    positions = torch.arange(20).view(1, 1, -1)
    fewer = 0
    for _ in range(200):
        spans = [
            Span(rng.randrange(4), rng.choice([None, 0, 1, 5, 9]), rng.choice([0, 0, 3, 7]))
            for _ in range(rng.randrange(4))
        ]
        spans += [Span(window=torch.tensor([rng.randrange(9)]))] * rng.choice([0, 0, 1, 2])
        left = needed(spans)
        fewer += len(left) < len([span for span in spans if not span.unbounded])

        def seen(some: Sequence[Span]) -> torch.Tensor:
            whole = Span().sees(positions, positions)
            for span in some:
                whole = whole & span.sees(positions, positions)
            return whole

        assert torch.equal(seen(left), seen(spans))
        assert not any(a is not b and a.within(b) for a in left for b in left)
    assert fewer > 20
    assert needed([Span(4, 100), Span(window=100)]) == (Span(window=100),)
    assert needed([Span(4, 100), Span(4, 0, beyond=100)]) == (Span(4, 0, beyond=100),)
