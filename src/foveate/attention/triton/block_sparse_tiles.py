"""Where the tiles of the block-sparse kernels start, stop and need a mask, and in which order they run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.selection import Span

jit: Any = triton.jit
"""`triton.jit`, whose types say nothing of launching."""


class Place(NamedTuple):
    """Where queries and keys stand, for kernels: int32 tensors on the device, or None for the plain case.

    Args:
        first: [B, 1 or Hk], slot of query 0; None: M - N.
        lengths: [B, 1 or Hk], readable slots; None: all M.
        positions: [B, N], logical positions of the queries; None: M - N + arange(N). Slots stand at their own number.
        span: read beside the lists; its fields are host integers.
        ends: int32 [B, N], one past the last slot that each query may read, instead of what `first` and `lengths` say;
            without a span, forward.
    """

    first: Tensor | None = None
    lengths: Tensor | None = None
    positions: Tensor | None = None
    span: Span | None = None
    ends: Tensor | None = None


class Tiling(NamedTuple):
    """How queries are cut into tiles.

    Args:
        rows: queries of one head in a tile.
        pack: query heads in a tile, which share their list.
        columns: keys of a tile.
    """

    rows: int
    pack: int
    columns: int


class Tiles(NamedTuple):
    """One number per tile, int32 [B x Hk, tiles]: entries begin..full-1 of its list need no mask, full..stop-1 (and
    those before begin) do, and the rest reads nothing. `order`: the heaviest tiles of each segment first."""

    begin: Tensor
    full: Tensor
    stop: Tensor
    order: Tensor


def tiles(
    lists: Tensor, q_block: int, k_block: int, shape: tuple[int, int, int, int, int], how: Tiling, at: Place
) -> Tiles:
    """Look through the lists once. Never waits for the device.

    Args:
        lists: int32 [B, h, nq, K], as in `Selection`.
        shape: B, H, Hk, N, M.
    """
    batch, heads, k_heads, queries, keys = shape
    group = heads // k_heads
    across = -(-queries // how.rows)
    count = group // how.pack * across
    made = torch.empty(3, batch * k_heads, count, dtype=torch.int32, device=lists.device)
    window, sink = near(at.span)
    chunk = 64 if lists.shape[3] <= 64 else 512
    _count[(batch * k_heads * count,)](
        lists,
        made,
        at.first,
        at.lengths,
        at.positions,
        at.ends,
        *(lists.stride(i) if lists.shape[i] > 1 else 0 for i in range(3)),
        *strides(at.first),
        *strides(at.lengths),
        0 if at.positions is None or at.positions.shape[0] == 1 else at.positions.stride(0),
        0 if at.ends is None or at.ends.shape[0] == 1 else at.ends.stride(0),
        queries,
        keys,
        lists.shape[3],
        made[0].numel(),
        across,
        count,
        window,
        sink,
        k_heads,
        GROUP=group,
        LIST_GROUP=heads // lists.shape[1],
        Q_BLOCK=q_block,
        K_BLOCK=k_block,
        ROWS=how.rows,
        PACK=how.pack,
        CHUNK=chunk,
        SPAN=at.span is not None,
        num_warps=4,
    )
    order = torch.sort(made[2], dim=1, descending=True, stable=True).indices.int()
    return Tiles(made[0], made[1], made[2], order)


def near(span: Span | None) -> tuple[int, int]:
    """Window and sink of a span as host integers; a window of everything is 2^30."""
    if span is None:
        return 0, 0
    window = 1 << 30 if span.window is None else span.window
    assert isinstance(window, int) and isinstance(span.sink, int)
    return min(window, 1 << 30), min(span.sink, 1 << 30)


def strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of a [B, 1 or Hk] tensor, 0 along an axis of one."""
    if x is None:
        return 0, 0
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in range(2))  # type: ignore[return-value]


@jit
def row_ends(i, b, h, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys):
    """One past the last slot that query i of row b and store head h may read; 0 for queries that do not exist."""
    first = keys - queries
    if first_ptr is not None:
        first = tl.load(first_ptr + b * fsb + h * fsh).to(tl.int32)
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b * lsb + h * lsh).to(tl.int32), keys)
    ends = tl.maximum(tl.minimum(first + i + 1, length), 0)
    return tl.where(i < queries, ends, 0)


@jit
def given_ends(i, b, h, ends_ptr, esb, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys):
    """`row_ends`, or those that are given for each query."""
    if ends_ptr is None:
        return row_ends(i, b, h, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys)
    else:
        return tl.minimum(tl.load(ends_ptr + b * esb + i, mask=i < queries, other=0), keys)


# Lists are of another width in each layer of a prompt: a kernel that knew it would be compiled again and again.
@jit(do_not_specialize=["sb", "sh", "sq", "width", "total", "across", "count", "window", "sink", "k_heads"])
def _count(
    lists_ptr, made_ptr, first_ptr, lengths_ptr, positions_ptr, ends_ptr,
    sb, sh, sq, fsb, fsh, lsb, lsh, psb, esb,
    queries, keys, width, total, across, count, window, sink, k_heads,
    GROUP: tl.constexpr, LIST_GROUP: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    segment = pid // count
    index = pid % count
    b = segment // k_heads
    h = segment % k_heads
    head = h * GROUP + index // across * PACK
    row = index % across * ROWS
    i = row + tl.arange(0, ROWS)
    ends = given_ends(i, b, h, ends_ptr, esb, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys)
    low = tl.min(tl.where(i < queries, ends, 2147483647), 0)
    high = tl.max(ends, 0)
    far = low
    if SPAN:
        # Beyond the sink and before the oldest window nothing can be in both the list and the span.
        if positions_ptr is None:
            oldest = keys - queries + row
        else:
            at = tl.load(positions_ptr + b * psb + i, mask=i < queries, other=2147483647).to(tl.int32)
            oldest = tl.min(at, 0)
        far = tl.minimum(far, oldest - window + 1)
    base = lists_ptr + b.to(tl.int64) * sb + (head // LIST_GROUP).to(tl.int64) * sh + (row // Q_BLOCK).to(tl.int64) * sq
    begin = tl.zeros((CHUNK,), tl.int32)
    full = tl.zeros((CHUNK,), tl.int32)
    stop = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, width, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        block = tl.load(base + entry, mask=entry < width, other=-1)
        listed = block >= 0
        slot = block * K_BLOCK
        stop += (listed & (slot < high)).to(tl.int32)
        full += (listed & (slot + K_BLOCK <= far)).to(tl.int32)
        if SPAN:
            begin += (listed & (slot < sink)).to(tl.int32)
    last = tl.sum(stop, 0)
    tl.store(made_ptr + pid, tl.minimum(tl.sum(begin, 0), last))
    tl.store(made_ptr + total + pid, tl.minimum(tl.sum(full, 0), last))
    tl.store(made_ptr + 2 * total + pid, last)
