"""The skipping backend: for each block of queries, fetch the slots that it reads and attend to these alone.

Slots that nobody reads are never touched, so they may hold anything, NaN included. No buffer grows with N x M.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.attention.kernel import any_of, shares, softmax_attention
from foveate.attention.pieces import Piece, blocks_first, longest, pieces, reach_of, span_rows, tightest
from foveate.attention.request import Request
from foveate.attention.scores import score_attention, to_heads
from foveate.attention.selection import Ints, Partial, Span

name = "gather"

_OVERHEAD = 1.5
"""What a pair read here costs against one read in place."""


def can_run(request: Request) -> tuple[bool, str]:
    """Anything; but unless it is forced it leaves reads to others in which there is too little to skip."""
    r = request
    if r.forced or r.lists is not None:
        return True, ""
    if not r.visible:
        return False, "every pair is read, there is nothing to skip"
    reach = reach_of(tightest(r.visible))
    queries, keys = r.q.shape[2], r.k.shape[2]
    if reach is None or _OVERHEAD * (reach + span_rows(r) - 1) > keys - queries / 2:
        return False, "the spans leave too little to skip"
    return True, ""


def run(request: Request) -> Partial:
    """Block by block; heads and rows one by one where their lists are of very different length."""
    r = request
    if (
        r.lists is not None
        and r.q.shape[2] == 1
        and r.span is None
        and not r.visible
        and not r.math
        and r.lists.shape[3]
    ):
        return _decode(r)
    if not _uneven(r):
        return _run(r)
    assert r.lists is not None
    batch, heads = r.lists.shape[:2]
    rows = [[_run(_single(r, row, head)) for head in range(heads)] for row in range(batch)]
    out = torch.cat([torch.cat([part.out for part in parts], dim=1) for parts in rows])
    return Partial(out, torch.cat([torch.cat([part.lse for part in parts], dim=1) for parts in rows]))


def _run(r: Request) -> Partial:
    parts = [_attend(r, piece) for piece in pieces(r)]
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], dim=2), torch.cat([part.lse for part in parts], dim=2))


def _attend(r: Request, piece: Piece) -> Partial:
    batch, heads, k_heads, _, keys = r.shape
    q = r.q[:, :, piece.start : piece.stop]
    blocks = piece.slots.shape[0] // batch
    short = blocks * piece.rows - q.shape[2]
    if short:
        q = torch.cat([q, q[:, :, -1:].expand(-1, -1, short, -1)], dim=2)
    slots, seen = piece.slots, piece.seen
    if slots.shape[-1] == 0:
        # Nobody reads anything; one slot that is hidden from all keeps the shapes.
        slots, seen = slots.new_full((*slots.shape[:-1], 1), keys), seen.new_zeros(*seen.shape[:-1], 1)
    # A slot that no query of its block reads may hold NaN, which no mask stops: fetch one that is read instead.
    used = any_of(seen, -2)
    some = slots.gather(-1, used.int().argmax(-1, keepdim=True))
    slots = torch.where(used, slots, torch.where(used.any(-1, keepdim=True), some, 0))

    held = max(k_heads, slots.shape[1])
    k, v = _fetch(r.k, r.v, slots, held, blocks)
    rows = piece.rows
    q = q.unflatten(2, (blocks, rows)).permute(0, 2, 1, 3, 4).reshape(batch * blocks, heads, rows, -1)
    bias = None if r.bias is None else _bias(r.bias, piece, slots, heads, batch, blocks)
    if slots.shape[1] > 1:
        # Heads with slots of their own join the batch axis, so that no mask is repeated over the heads that share one.
        q = q.unflatten(1, (held, -1)).flatten(0, 1)
        k, v = k.flatten(0, 1).unsqueeze(1), v.flatten(0, 1).unsqueeze(1)
        seen = to_heads(seen, held).flatten(0, 1).unsqueeze(1)
        bias = None if bias is None else bias.unflatten(1, (held, -1)).flatten(0, 1)
    one = rows == 1 and bias is None
    if one:
        # The group of a single query: rows of one matrix.
        q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    if r.math:
        out, lse = score_attention(q, k, v, scale=r.scale, mask=seen, bias=bias, softcap=r.softcap)
    else:
        out, lse = softmax_attention(q, k, v, scale=r.scale, mask=seen)
        assert lse is not None
    out = out.reshape(batch, blocks, heads, rows, -1).transpose(1, 2).flatten(2, 3)
    lse = lse.reshape(batch, blocks, heads, rows).transpose(1, 2).flatten(2, 3)
    if short:
        out, lse = out[:, :, :-short], lse[:, :, :-short]
    return Partial(out, lse)


def _decode(r: Request) -> Partial:
    """One query and lists alone: `_attend` in a third of the steps, since at a decode step they are the time."""
    assert r.lists is not None
    batch, heads, k_heads, _, keys = r.shape
    lists, g = r.lists[:, :, 0], r.geometry
    whole = False
    if lists.device.type == "cpu":
        if int(lists[..., -1].max()) < 0:
            lists = lists[..., : max(1, longest(lists))]
        low, high = lists.aminmax()
        whole = g.plain and int(low) >= 0 and (int(high) + 1) * r.k_block <= keys
    slots = lists
    if r.k_block > 1:
        slots = (lists.unsqueeze(-1) * r.k_block + torch.arange(r.k_block, device=lists.device)).flatten(-2)
    seen = some = None
    if not whole:
        end: Tensor | int = keys
        if not g.plain:
            end = g.ends()
            wide = max(slots.shape[1], end.shape[1])
            slots, end = to_heads(slots, wide), to_heads(end, wide)
        seen = (slots >= 0) & (slots < end)
        # Lists ascend: if the first slot is hidden, all are.
        some = seen[..., :1]
        slots = torch.where(seen, slots, slots[..., :1].clamp(min=0))
    held = max(k_heads, slots.shape[1])
    k, v = _fetch(r.k, r.v, slots, held, 1)
    q = r.q.reshape(batch, held, heads // held, r.q.shape[3])
    mask = None if seen is None else seen.unsqueeze(2)
    out, lse = softmax_attention(q, k, v, scale=r.scale, mask=mask, some=some)
    assert lse is not None
    return Partial(out.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1))


def _fetch(k: Tensor, v: Tensor, slots: Tensor, held: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Rows of K and V at slots [B x blocks, 1 or held, S]: [B x blocks, held, S, D] each."""
    table, index = _table(k, slots, held, blocks)
    fetched = table.index_select(0, index.flatten()).view(*index.shape, k.shape[3])
    if shares(k, v):
        return fetched, fetched[..., : v.shape[3]]
    if v.stride() != k.stride() or v.shape != k.shape or _scattered(k):
        table, index = _table(v, slots, held, blocks)
    else:
        table = v.as_strided(table.shape, table.stride())
    return fetched, table.index_select(0, index.flatten()).view(*index.shape, v.shape[3])


def _table(x: Tensor, slots: Tensor, held: int, blocks: int) -> tuple[Tensor, Tensor]:
    """x [B, Hk, M, D] as one table of rows over batch and heads, and the rows of the slots in it.

    Without a copy unless rows are not contiguous, since index_select moves whole rows and indexing single numbers.
    """
    batch, heads, keys, dim = x.shape
    if _scattered(x):
        x = x.contiguous()
    row, by_head, by_batch = x.stride(2), x.stride(1) // x.stride(2), x.stride(0) // x.stride(2)
    table = x.as_strided(((batch - 1) * by_batch + (heads - 1) * by_head + keys, dim), (row, 1))
    index = slots
    if held > 1:
        head = torch.arange(held, device=x.device)
        index = index + ((head if held == heads else head // (held // heads)) * by_head).unsqueeze(-1)
    if batch > 1:
        base = torch.arange(batch, device=x.device)
        base = base if blocks == 1 else base.repeat_interleave(blocks)
        index = index + (base * by_batch).view(-1, 1, 1)
    return table, index


def _scattered(x: Tensor) -> bool:
    """Whether x [B, Hk, M, D] is no table of rows where it lies."""
    row = x.stride(2)
    return x.stride(3) != 1 or row < x.shape[3] or x.stride(0) % row != 0 or x.stride(1) % row != 0


def _bias(bias: Tensor, piece: Piece, slots: Tensor, heads: int, batch: int, blocks: int) -> Tensor:
    """The bias of the fetched slots: [B x blocks, H, 1 or rows, 1 or S]."""
    bias = to_heads(bias, heads).expand(batch, heads, -1, -1)
    if bias.shape[2] > 1:
        query = torch.arange(piece.start, piece.start + blocks * piece.rows, device=bias.device)
        bias = bias.index_select(2, query.clamp_(max=bias.shape[2] - 1))
        bias = blocks_first(bias.unflatten(2, (blocks, piece.rows)), batch)
    else:
        bias = bias.repeat_interleave(blocks, dim=0)
    if bias.shape[3] > 1:
        index = to_heads(slots, heads).unsqueeze(-2).expand(-1, heads, bias.shape[2], -1)
        bias = bias.gather(-1, index)
    return bias


def _uneven(r: Request) -> bool:
    """Whether lists that are cut at their own longest read much less than all cut at the longest of all."""
    if r.lists is None or r.lists.shape[0] * r.lists.shape[1] == 1 or r.q.shape[2] == 1 or r.lists.numel() == 0:
        return False
    longest = (r.lists >= 0).sum(-1).amax(-1)
    return bool(longest.max() * longest.numel() > 1.25 * longest.sum())


def _single(r: Request, row: int, head: int) -> Request:
    """What list head `head` says in one row of the batch, for its own query heads."""
    assert r.lists is not None
    _, heads, k_heads, _, _ = r.shape
    group = heads // r.lists.shape[1]
    one = head * group // (heads // k_heads)
    store = slice(0, k_heads) if r.lists.shape[1] == 1 else slice(one, one + 1)
    mine = slice(head * group, (head + 1) * group)

    def own(x: Tensor | None, which: slice) -> Tensor | None:
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[row : row + 1]
        return x if x.shape[1] == 1 else x[:, which]

    def ints(x: Ints) -> Ints:
        return x[store] if isinstance(x, Tensor) and x.numel() > 1 else x

    def span(x: Span) -> Span:
        return Span(ints(x.sink), None if x.window is None else ints(x.window), ints(x.beyond))

    g = r.geometry
    q_positions = (
        g.q_positions if g.q_positions is None or g.q_positions.shape[0] == 1 else g.q_positions[row : row + 1]
    )
    geometry = replace(
        g,
        batch=1,
        lengths=own(g.lengths, store),
        first=own(g.first, store),
        q_positions=q_positions,
        k_positions=own(g.k_positions, store),
    )
    return replace(
        r,
        q=r.q[row : row + 1, mine],
        k=r.k[row : row + 1, store],
        v=r.v[row : row + 1, store],
        geometry=geometry,
        lists=r.lists[row : row + 1, head : head + 1],
        counts=None,
        span=None if r.span is None else span(r.span),
        visible=tuple(span(x) for x in r.visible),
        bias=None if r.bias is None else own(to_heads(r.bias, heads), mine),
    )
