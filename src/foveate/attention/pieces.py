"""What the gathering backend fetches: for each block of queries its slots, and which query reads which of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.attention.kernel import any_of
from foveate.attention.request import Request
from foveate.attention.scores import to_heads
from foveate.attention.selection import Ints, Span

FETCHED = 1 << 20
"""Most numbers of K fetched at a time: few enough for a core's cache, enough to keep the kernels busy."""
FETCHED_GPU = 1 << 26
ROWS = 256
"""Most queries that share one fetch where the selection does not say (spans, or one list for all)."""


@dataclass(frozen=True)
class Piece:
    """Some blocks of `rows` queries each, X = B x blocks of them, and what they read.

    Args:
        start, stop: the queries.
        rows: queries of a block; the last block of all may be shorter.
        slots: int64 [X, h, S], what to fetch; a slot that no query of the block reads may be any number.
        seen: bool [X, h, rows, S], which query reads which.
    """

    start: int
    stop: int
    rows: int
    slots: Tensor
    seen: Tensor


def pieces(r: Request) -> Iterator[Piece]:
    """The whole read in pieces, queries in order."""
    by_position = r.visible if r.lists is None else (() if r.span is None else (r.span,))
    if by_position and r.geometry.k_positions is not None:
        yield from _permuted(r)
        return
    batch, _, k_heads, queries, _ = r.shape
    rows, per_list = _block(r)
    blocks = -(-queries // rows)
    heads = k_heads if r.lists is None else max(k_heads, r.lists.shape[1])
    scored = r.shape[1] if r.math else heads
    most = FETCHED if r.q.device.type == "cpu" else FETCHED_GPU
    scores = at_once(r.q.device)
    done = 0
    while done < blocks:
        count = blocks - done
        # Later blocks may read more than the first: size by the first, then by the longest of those.
        for last in (done + 1, done + count):
            width = batch * max(1, _width(r, done, last, rows, per_list))
            count = max(1, min(most // (heads * r.q.shape[3] * width), scores // (scored * rows * width), count))
        yield _piece(r, done, done + count, rows, per_list)
        done += count


def _block(r: Request) -> tuple[int, int]:
    """Queries per fetch, and fetches per list (0: one list for all)."""
    if r.lists is None:
        return span_rows(r), 0
    if r.q_block is None:
        return min(ROWS, r.q.shape[2]), 0
    parts = next((n for n in range(1, r.q_block + 1) if r.q_block % n == 0 and r.q_block // n <= 2 * ROWS), 1)
    return min(r.q_block // parts, r.q.shape[2]), parts


def span_rows(r: Request) -> int:
    """Queries per fetch for spans: few enough that what only some of them read stays small beside what all do."""
    reach = reach_of(tightest(r.visible))
    rows = ROWS if reach is None else min(ROWS, max(ROWS // 4, reach // 4))
    return min(rows, r.q.shape[2])


def _lists(r: Request, first: int, last: int, per_list: int) -> Tensor:
    """The lists of fetches first..last-1: [B, h, last - first or 1, K], cut behind the longest."""
    assert r.lists is not None
    if per_list == 0:
        lists = r.lists
    elif per_list == 1:
        lists = r.lists[:, :, first:last]
    else:
        index = torch.arange(first, last, device=r.lists.device) // per_list
        lists = r.lists.index_select(2, index)
    # One host number for the cut; on a GPU a decode step must not wait for it.
    if lists.device.type == "cpu" or r.q.shape[2] > 1:
        lists = lists[..., : longest(lists)]
    return lists


def longest(lists: Tensor) -> int:
    return int((lists >= 0).sum(-1).max()) if lists.numel() else 0


def _width(r: Request, first: int, last: int, rows: int, per_list: int) -> int:
    """About how many slots a fetch has."""
    width = 0
    if r.lists is not None:
        width += _lists(r, first, last, per_list).shape[-1] * r.k_block
    if r.lists is None or r.span is not None:
        reach = reach_of(tightest(r.visible) if r.lists is None else r.span)
        width += r.k.shape[2] if reach is None else min(r.k.shape[2], reach + rows)
    return width


def _piece(r: Request, first: int, last: int, rows: int, per_list: int) -> Piece:
    """Fetches first..last-1, from lists and from ranges of slots."""
    g, device = r.geometry, r.q.device
    batch, _, _, queries, keys = r.shape
    start, stop = first * rows, min(last * rows, queries)
    # Queries of a last, shorter block repeat the last query; what they give is cut off.
    query = torch.arange(start, first * rows + (last - first) * rows, device=device).clamp_(max=queries - 1)
    ends = g.ends()[..., query].unflatten(-1, (-1, rows))  # [1 or B, 1 or Hk, blocks, rows]
    if g.q_positions is None:
        at = (keys - queries + query).view(1, 1, -1, rows)
    else:
        at = g.q_positions[:, query].view(batch, 1, -1, rows)
    ends, at = (blocks_first(x, batch) for x in (ends, at))
    if r.lists is None and not r.visible:
        at = ends - 1  # no span: the range of slots follows from causality alone

    groups: list[tuple[Tensor, Tensor]] = []
    listed: Tensor | None = None
    if r.lists is not None:
        lists = _lists(r, first, last, per_list).expand(batch, -1, last - first, -1)
        listed = blocks_first(lists, batch).long()
        slots = (listed.unsqueeze(-1) * r.k_block + torch.arange(r.k_block, device=device)).flatten(-2)
        # Behind every query: what is not listed is seen by nobody.
        slots = torch.where(slots < 0, keys, slots)
        groups.append((slots, _before(slots, ends)))
    if r.lists is None or r.span is not None:
        span = (tightest(r.visible) or Span()) if r.lists is None else r.span
        assert span is not None
        slots = _range(span, at, keys)
        seen = _before(slots, ends)
        if r.lists is not None:
            assert listed is not None
            seen = _and(seen, span.sees(at, slots))
            seen = _and(seen, ~_among(slots, listed, r.k_block, keys).unsqueeze(-2))
        groups.append((slots, seen))
    if r.visible:
        k_at = g.k_positions
        groups = [(slots, _and(seen, _visible(r.visible, at, slots, k_at, last - first))) for slots, seen in groups]
    if len(groups) == 1 and groups[0][0].shape[1] == groups[0][1].shape[1]:
        return Piece(start, stop, rows, *groups[0])
    heads = max(x.shape[1] for group in groups for x in group)
    slots = torch.cat([to_heads(slots, heads).expand(-1, heads, -1) for slots, _ in groups], dim=-1)
    seen = torch.cat([to_heads(seen, heads).expand(-1, heads, -1, -1) for _, seen in groups], dim=-1)
    return Piece(start, stop, rows, slots, seen)


def _permuted(r: Request) -> Iterator[Piece]:
    """Spans over slots in no order: the mask of each query block says which slots it reads."""
    batch, _, _, queries, keys = r.shape
    rows, _ = _block(r)
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        seen = r.seen(start, stop)
        seen = seen.expand(batch, *seen.shape[1:])
        used = any_of(seen, -2)
        wide = queries == 1 and used.device.type != "cpu"
        count = keys if wide else int(used.sum(-1).max())
        place = torch.where(used, used.cumsum(-1) - 1, count)
        slots = torch.full((*used.shape[:-1], count + 1), keys, device=used.device)
        slots.scatter_(-1, place, torch.arange(keys, device=used.device).expand_as(place))
        slots = slots[..., :count]
        index = slots.clamp(max=keys - 1).unsqueeze(-2).expand(-1, -1, stop - start, -1)
        yield Piece(start, stop, stop - start, slots, seen.gather(-1, index) & (slots < keys).unsqueeze(-2))


def blocks_first(x: Tensor, batch: int) -> Tensor:
    """[1 or B, h, blocks, ...] -> [B x blocks, h, ...]."""
    return x.expand(batch, *x.shape[1:]).transpose(1, 2).flatten(0, 1)


def _before(slots: Tensor, ends: Tensor) -> Tensor:
    """[X, h, S] and [X, h', rows] -> bool [X, max(h, h'), rows, S]: the slot is there and not in the query's future."""
    heads = max(slots.shape[1], ends.shape[1])
    slots, ends = to_heads(slots, heads), to_heads(ends, heads)
    return slots.int().unsqueeze(-2) < ends.int().unsqueeze(-1)


def _and(a: Tensor, b: Tensor) -> Tensor:
    heads = max(a.shape[1], b.shape[1])
    return to_heads(a, heads) & to_heads(b, heads)


def _visible(spans: tuple[Span, ...], at: Tensor, slots: Tensor, k_at: Tensor | None, blocks: int) -> Tensor:
    """Whether each query sees each fetched slot by position: bool [X, h, rows, S]."""
    positions = slots
    if k_at is not None:
        heads = max(slots.shape[1], k_at.shape[1])
        table = to_heads(k_at.repeat_interleave(blocks, dim=0) if k_at.shape[0] > 1 else k_at, heads)
        table = table.expand(slots.shape[0], heads, -1)
        index = to_heads(slots, heads).expand(-1, heads, -1).clamp(max=table.shape[-1] - 1)
        positions = table.gather(-1, index)
    seen: Tensor | None = None
    for span in spans:
        one = _sees(span, at, positions)
        seen = one if seen is None else _and(seen, one)
    assert seen is not None
    return seen


def _sees(span: Span, at: Tensor, positions: Tensor) -> Tensor:
    """`Span.sees` where positions may be given per query head and the span per store head."""
    wide = [x.numel() for x in (span.sink, span.window, span.beyond) if isinstance(x, Tensor)]
    store, heads = max(wide, default=1), positions.shape[1]
    if 1 < store < heads:

        def spread(x: Ints) -> Ints:
            return x.repeat_interleave(heads // store) if isinstance(x, Tensor) and x.numel() > 1 else x

        span = Span(spread(span.sink), None if span.window is None else spread(span.window), spread(span.beyond))
    return span.sees(at, positions)


def tightest(spans: tuple[Span, ...]) -> Span | None:
    """The span with the smallest window: what all spans see, it sees."""
    return min(spans, key=lambda span: float("inf") if (reach := reach_of(span)) is None else reach, default=None)


def reach_of(span: Span | None) -> int | None:
    """Most slots that one query can read of a span; None: no bound but its length."""
    if span is None or span.window is None:
        return None
    return _most(span.sink) + max(0, _most(span.window) - _least(span.beyond))


def _most(x: Ints) -> int:
    return int(x.max()) if isinstance(x, Tensor) else x


def _least(x: Ints) -> int:
    return int(x.min()) if isinstance(x, Tensor) else x


def _range(span: Span, at: Tensor, keys: int) -> Tensor:
    """Slots that queries at positions [X, 1, rows] may see by a span, slots being positions: [X, h, S]."""
    device = at.device
    low, high = at.amin(-1, keepdim=True), at.amax(-1, keepdim=True)
    high = torch.clamp(high - max(0, _least(span.beyond)), max=keys - 1)
    if span.window is None:
        far = max(0, int(high.max()) + 1)
        slots = torch.arange(far, device=device).expand(*high.shape[:2], -1)
        return torch.where(slots <= high, slots, keys)
    sink = min(_most(span.sink), keys)
    low = torch.clamp(low - _most(span.window) + 1, min=sink)
    one = at.shape[-1] == 1
    # A single query spans its window; several may stand anywhere, and their spread is a host number.
    width = max(0, _most(span.window) - max(0, _least(span.beyond))) if one else max(0, int((high - low).max()) + 1)
    near = low + torch.arange(min(width, keys), device=device)
    near = torch.where(near <= high, near, keys)
    return torch.cat([torch.arange(sink, device=device).expand(*near.shape[:2], -1), near], dim=-1)


def _among(slots: Tensor, listed: Tensor, k_block: int, keys: int) -> Tensor:
    """Whether each slot [X, h, S] lies in a listed block [X, h', K]: bool [X, max(h, h'), S]."""
    heads = max(slots.shape[1], listed.shape[1])
    slots, listed = to_heads(slots, heads).expand(-1, heads, -1), to_heads(listed, heads).expand(-1, heads, -1)
    blocks = -(-keys // k_block) + 1
    flags = torch.zeros(*listed.shape[:-1], blocks + 1, dtype=torch.bool, device=slots.device)
    flags.scatter_(-1, torch.where(listed < 0, blocks, listed), True)
    return flags.gather(-1, slots // k_block)
