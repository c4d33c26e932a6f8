"""Where tiles of the block-sparse kernels start, stop and need a mask, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import on

from foveate.attention import Span

pytest.importorskip("triton")

from foveate.attention.triton.block_sparse_tiles import Place, Tiling, tiles


@pytest.mark.parametrize("span", [None, Span(window=40, sink=21)])
@pytest.mark.parametrize("width", [5, 64, 65, 700])
def test_entries_are_counted_by_what_they_hold(seed: int, width: int, span: Span | None) -> None:
    """Lists are ascending, and may be wider than what is looked at in one go."""
    torch.manual_seed(seed)
    queries, block, rows, heads, k_heads = 50, 16, 16, 4, 2
    keys = 16 * 800
    lists = torch.full((1, heads, -(-queries // rows), width), -1, dtype=torch.int32)
    for of_head in lists[0]:
        for entries in of_head:
            some = torch.randperm(keys // block)[: int(torch.randint(width // 2, width + 1, ()))].sort().values
            entries[: len(some)] = some
    (given,) = on(lists)
    found = tiles(given, rows, block, (1, heads, k_heads, queries, keys), Tiling(rows, 1, 64), Place(span=span))
    first = keys - queries
    for head in range(heads):
        for tile in range(lists.shape[2]):
            entries = lists[0, head, tile]
            slots = entries[entries >= 0].long() * block
            low = first + rows * tile + 1
            high = first + min(queries, rows * (tile + 1))
            far = low if span is None else min(low, first + rows * tile - 40 + 1)
            stop = int((slots < high).sum())
            begin = 0 if span is None else min(int((slots < 21).sum()), stop)
            want = [begin, min(int((slots + block <= far).sum()), stop), stop]
            at = head // k_heads, (head % k_heads) * lists.shape[2] + tile
            assert [int(x[at]) for x in found[:3]] == want
    stops = found.stop.cpu()
    assert (stops.gather(1, found.order.cpu().long()).diff(dim=1) <= 0).all()
