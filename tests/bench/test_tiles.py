"""Counted tiles against masks, and what they leave of a speed-up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.attention import Geometry, Selection, Span
from foveate.attention.selection import ALL
from foveate.bench.tiles import tiles
from foveate.errors import BadArgument

HEADS = 4


def brute(selection: Selection, g: Geometry, q_tile: int, k_tile: int, unit: int) -> tuple[int, int, int]:
    """Visited, gathered and causal tiles, tile by tile over the mask."""
    mask, causal = selection.mask(g, HEADS), ALL.mask(g, HEADS)
    visited = gathered = every = 0
    for row in mask.flatten(0, 1).split(q_tile, dim=1):
        visited += sum(int(tile.any((1, 2)).sum()) for tile in row.split(k_tile, dim=2))
        units = torch.stack([piece.any((1, 2)) for piece in row.split(unit, dim=2)]).sum(0) * unit
        gathered += int((-(-units // k_tile)).sum())
    for row in causal.flatten(0, 1).split(q_tile, dim=1):
        every += sum(int(tile.any((1, 2)).sum()) for tile in row.split(k_tile, dim=2))
    return visited, gathered, every


@settings(max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(0, 25),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(4, 4), (8, 2), (3, 5), (16, 8)]),
    st.sampled_from([(4, 4), (8, 8), (6, 10), (16, 4)]),
    st.sampled_from(["lists", "both", "span", "all"]),
    st.integers(0, 999),
)
def test_counts_are_those_of_the_mask(
    queries: int, past: int, heads: int, blocks: tuple[int, int], tile: tuple[int, int], kind: str, seed: int
) -> None:
    keys = queries + past
    draw = torch.Generator().manual_seed(seed)
    count = -(-keys // blocks[1])
    lists = torch.rand(2, heads, -(-queries // blocks[0]), count, generator=draw).argsort(-1)[..., : max(1, count // 2)]
    lists = lists.masked_fill(torch.rand(lists.shape, generator=draw) < 0.2, -1).int()
    span = Span(sink=2, window=5)
    selection = {
        "lists": Selection(lists, *blocks),
        "both": Selection(lists, *blocks, span),
        "span": Selection(span=span),
        "all": ALL,
    }[kind]
    g = Geometry(2, queries, keys)
    found = tiles(selection, g, HEADS, *tile)
    unit = torch.gcd(torch.tensor(selection.k_block), torch.tensor(tile[1])).item()
    assert (found.visited, found.gathered, found.causal) == brute(selection, g, *tile, int(unit))
    assert found.pairs == selection.mask(g, HEADS).sum()
    assert 0 <= found.worst <= 1


def test_bounds() -> None:
    g = Geometry(1, 64, 64)
    dense = tiles(ALL, g, 2, 8, 8)
    assert dense.speed_up == dense.gathered_speed_up == dense.pair_speed_up == 1.0 and dense.worst == 1.0
    # One block of two slots in every tile: all tiles are visited, though a quarter of the keys is read.
    lists = (torch.arange(8) * 4).expand(1, 1, 8, 8).int()
    few = tiles(Selection(lists, 8, 2), g, 2, 8, 8)
    assert few.speed_up == 1.0 and few.gathered_speed_up > 2.9 and few.pair_speed_up > 3.5
    whole = tiles(Selection((torch.arange(8).view(1, 1, 8, 1)).int(), 8, 8), g, 2, 8, 8)
    assert whole.speed_up == 36 / 8 and whole.worst == 1.0


def test_tiles_that_are_none() -> None:
    with pytest.raises(BadArgument, match="at least one"):
        tiles(ALL, Geometry(1, 4, 4), 1, 0, 4)
