"""How much a selection reads: query-key pairs and bytes, exactly, without one mask over everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.attention.scores import to_heads
from foveate.attention.selection import Geometry, Ints, Selection, Span, needed, per_head


def pairs(
    selection: Selection,
    geometry: Geometry,
    num_heads: int,
    visible: Sequence[Span] = (),
    real: Tensor | None = None,
) -> Tensor:
    """Number of pairs that are read, int64 [B, H]: the sum of `selection.mask(...)`.

    Args:
        real: int64 [B], how many queries of each row count, its first ones; None: all.

    Causality, one span and lists are counted by arithmetic; what else there is (two spans, slots in no order) by masks
    of a few queries at a time.
    """
    g, visible = geometry, needed(visible)
    lists, span = selection.lists, selection.span
    if span is not None and span.unbounded:
        lists = span = None
    if lists is None and span is not None:
        visible, span = needed((*visible, span)), None
    bounded = [*visible, *([span] if span is not None else [])]
    if len(bounded) > 1 or (bounded and g.k_positions is not None):
        count = sum(seen.sum((-1, -2)) for _, seen in _masks(selection, g, num_heads, visible, real=real))
        assert isinstance(count, Tensor)
    elif lists is None:
        count = _in_range(bounded[0] if bounded else None, g, real).sum(-1)
    elif not bounded:
        count = _listed(lists, selection, g, real)
    else:
        both = _listed_in_range(lists, selection, g, bounded[0], real)
        if span is None:
            count = both
        else:
            near = _in_range(span, g, real).sum(-1)
            heads = max(near.shape[1], both.shape[1])
            alone = _listed(lists, selection, g, real)
            count = to_heads(alone, heads) + to_heads(near, heads) - to_heads(both, heads)
    return to_heads(count, num_heads).expand(g.batch, num_heads).contiguous()


def density(selection: Selection, geometry: Geometry, num_heads: int, visible: Sequence[Span] = ()) -> Tensor:
    """Pairs read over causal pairs, float64 [B, H]; 1 where there is nothing to read."""
    read = pairs(selection, geometry, num_heads, visible).double()
    causal = to_heads(_in_range(None, geometry).sum(-1), num_heads).expand_as(read).double()
    return torch.where(causal > 0, read / causal, 1.0)


def bytes_read(
    selection: Selection, geometry: Geometry, num_heads: int, store_heads: int, slot: int, visible: Sequence[Span] = ()
) -> int:
    """Bytes of K and V that a kernel must fetch: every slot once per store head and block of `q_block` queries that
    read it (all N queries are one block without `q_block`), whichever query heads of the group do.

    Args:
        slot: bytes of one slot of one store head, K and V: (Dk + Dv) * element size.
    """
    slots = 0
    group = num_heads // store_heads
    block = selection.q_block if selection.lists is not None and selection.q_block else geometry.queries
    used: Tensor | None = None
    last = -1
    for start, seen in _masks(selection, geometry, num_heads, visible, within=block):
        if start // block != last:
            slots += 0 if used is None else int(used.sum())
            used, last = None, start // block
        some = to_heads(seen.any(-2), num_heads).expand(geometry.batch, num_heads, -1)
        some = some.unflatten(1, (store_heads, group)).any(2)
        used = some if used is None else used | some
    slots += 0 if used is None else int(used.sum())
    return slots * slot


def _masks(
    selection: Selection,
    geometry: Geometry,
    heads: int,
    visible: Sequence[Span],
    within: int | None = None,
    real: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Masks of a few queries at a time, with the number of their first; none crosses a multiple of `within`."""
    step = max(1, at_once(geometry.device) // max(1, geometry.batch * heads * geometry.keys))
    within = geometry.queries if within is None else within
    for begin in range(0, geometry.queries, max(1, within)):
        end = min(begin + within, geometry.queries)
        for start in range(begin, end, step):
            stop = min(start + step, end)
            seen = selection.rows(start, stop).seen(geometry.rows(start, stop), visible)
            if real is not None:
                seen = seen & _counts(real, start, stop)[..., None]
            # Rows of the batch that are all alike come as one.
            yield start, seen.expand(geometry.batch, -1, -1, -1)


def _counts(real: Tensor, start: int, stop: int) -> Tensor:
    """Which of the queries start..stop-1 count: bool [B, 1, N]."""
    return (torch.arange(start, stop, device=real.device) < real[:, None]).unsqueeze(1)


def _ranges(span: Span | None, g: Geometry, real: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """The one or two ranges of slots [low, high) that each query sees, [1 or B, 1 or Hs, N]; slots are positions."""
    end = g.ends()
    if real is not None:
        end = torch.where(_counts(real, 0, g.queries), end, 0)
    zero = torch.zeros_like(end)
    if span is None:
        return [(zero, end)]
    at = g.positions()[0]
    end = torch.minimum(end, at + 1 - torch.clamp(_row(span.beyond, at), min=0))
    if span.window is None:
        return [(zero, end)]
    sink = torch.clamp(_row(span.sink, at), min=0)
    return [(zero, torch.minimum(end, sink)), (torch.maximum(sink, at - _row(span.window, at) + 1), end)]


def _row(x: Ints, like: Tensor) -> Tensor:
    x = per_head(x)
    return x.squeeze(-1) if isinstance(x, Tensor) else torch.tensor(x, device=like.device)


def _in_range(span: Span | None, g: Geometry, real: Tensor | None = None) -> Tensor:
    """Slots seen by each query without lists: int64 [1 or B, 1 or Hs, N]."""
    return sum((torch.clamp(high - low, min=0) for low, high in _ranges(span, g, real)), start=torch.tensor(0))


def _listed(lists: Tensor, selection: Selection, g: Geometry, real: Tensor | None = None) -> Tensor:
    """Listed pairs that are readable and not in the future: int64 [B, h], by the sum of a clamped ramp."""
    step = g.queries if selection.q_block is None else selection.q_block
    first = torch.tensor([[g.keys - g.queries]], device=g.device) if g.first is None else g.first
    length = torch.tensor([[g.keys]], device=g.device)
    length = length if g.lengths is None else torch.minimum(g.lengths, length)
    heads = max(lists.shape[1], first.shape[1], length.shape[1])
    first, length = (to_heads(x, heads)[..., None, None] for x in (first, length))
    lists = to_heads(lists, heads).long()
    low = lists * selection.k_block
    width = torch.clamp(torch.minimum(length - low, torch.tensor(selection.k_block, device=g.device)), min=0)
    start = torch.arange(0, g.queries, step, device=g.device).unsqueeze(-1)
    stop = torch.clamp(start + step, max=g.queries)
    if real is not None:
        start, stop = (torch.minimum(x, real.view(-1, 1, 1, 1)) for x in (start, stop))

    def ramp(x: Tensor) -> Tensor:
        """Sum of clamp(t, 0, width) over all t <= x."""
        x = x.clamp(min=0)
        short = torch.minimum(x, width)
        return short * (short + 1) // 2 + (x - short) * width

    # Query i of the block reads clamp(first + i + 1 - low, 0, width) slots of it.
    read = ramp(first + stop - low) - ramp(first + start - low)
    return torch.where(lists >= 0, read, 0).sum((-1, -2))


def _listed_in_range(
    lists: Tensor, selection: Selection, g: Geometry, span: Span, real: Tensor | None = None
) -> Tensor:
    """Listed pairs inside a span: int64 [B, h]. What of an ordered list lies in front of a slot is looked up: no buffer
    grows with N x K where all queries have one list."""
    k_block = selection.k_block
    step = g.queries if selection.q_block is None else selection.q_block
    ranges = _ranges(span, g, real)
    heads = max(lists.shape[1], *(x.shape[1] for pair in ranges for x in pair))
    lists = to_heads(lists, heads).expand(-1, heads, -1, -1)
    lists = torch.where(lists < 0, g.keys, lists.long()).sort(-1).values  # behind the end stands what nobody reaches
    short = lists.shape[2] * step - g.queries  # the last block's missing queries, which see nothing

    def before(slot: Tensor) -> Tensor:
        """Listed slots in front of slots [1 or B, h, N]: [B, h, nq, q_block]."""
        slot = F.pad(to_heads(slot, heads).expand(g.batch, heads, -1), (0, short)).unflatten(2, (-1, step))
        block = slot // k_block
        place = torch.searchsorted(lists, block.contiguous())
        inside = lists.gather(3, place.clamp_max(lists.shape[3] - 1)) == block
        return place * k_block + torch.where(inside & (place < lists.shape[3]), slot - block * k_block, 0)

    count = torch.zeros(g.batch, heads, dtype=torch.int64, device=g.device)
    for low, high in ranges if lists.shape[3] else ():
        low = low.clamp_min(0)
        count += (before(torch.maximum(high, low)) - before(low)).sum((2, 3))
    return count
