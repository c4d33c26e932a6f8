"""Reads whose keys stand elsewhere: the listed keys are gathered, each copy is turned to its own place, and read there.

What is held never moves; only the gathered copies do. This serves methods that close the gaps between the keys they
selected, so that no distance exceeds what the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import grouped, turned
from foveate.attention.angles import Angles
from foveate.attention.at_once import at_once
from foveate.attention.kernel import any_of, ends_with_keys, softmax_attention
from foveate.attention.selection import Geometry, Partial, Selection, Span

Move = Callable[[Tensor, Tensor], Tensor]
"""(rotated x [B, H, n, D], delta [B, H, n] in positions) -> x turned."""


class Piece(NamedTuple):
    """Some query blocks of a read.

    Args:
        start, stop: the queries.
        slots: int64 [B, h, t, n], the slots that are listed, 0 where nothing is.
        scores: [B, H, t, q_block, n], scaled and capped, -inf where nothing is read.
    """

    start: int
    stop: int
    slots: Tensor
    scores: Tensor


def pieces(
    q: Tensor,
    k: Tensor,
    selection: Selection,
    geometry: Geometry,
    visible: Sequence[Span],
    *,
    scale: float,
    softcap: float | None,
    move: Move,
) -> Iterator[Piece]:
    """Scores of the listed pairs under `selection.frame.keys`, block of queries by block of queries.

    Args:
        q: [B, H, N, D], standing where the frame wants them; k: [B, 1, M, D], where they are held.
    """
    lists, target, size = selection.lists, selection.frame.keys, selection.k_block
    assert lists is not None and target is not None and selection.span is None, "a frame of keys needs lists alone"
    (batch, _, queries, dim), keys = q.shape, k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, blocks, width = lists.shape[1:]
    rows, ends, q_positions, k_positions = _blocks(q, selection, geometry)
    rows, per = rows.to(wide), rows.shape[3]
    table = k.reshape(batch * keys, dim)
    together = geometry.k_positions is None and per < size  # all keys of a block move alike: cheaper to turn the query
    step = max(1, at_once(q.device) // max(1, batch * heads * width * size * dim))
    for first in range(0, blocks, step):
        some = slice(first, min(first + step, blocks))
        listed = lists[:, :, some].long()
        slots, there, real = _slots(listed, target[:, :, some], size, keys)
        slots = torch.where(real, slots, 0)
        flat = slots.flatten(1)
        here = k_positions.gather(1, flat).view(slots.shape)
        turned = _rows(table, flat, keys).view(batch, heads, -1, dim)
        if together:
            back = (listed * size - target[:, :, some]).masked_fill(listed < 0, 0)
            scores = _turn_queries(rows[:, :, some], turned.to(wide), back, size, move)
        else:
            turned = move(turned, torch.where(real, there - here, 0).flatten(2)).view(*slots.shape, dim).to(wide)
            scores = rows[:, :, some] @ turned.transpose(-1, -2)
        seen = real.unsqueeze(-2) & (slots.unsqueeze(-2) < ends[:, :, some].unsqueeze(-1))
        for span in visible:
            if not span.unbounded:
                seen = seen & span.sees(q_positions[:, :, some], here)
        scores = scores * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        yield Piece(
            first * per, min(some.stop * per, queries), slots, torch.where(seen.expand_as(scores), scores, -torch.inf)
        )


def _blocks(q: Tensor, selection: Selection, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries in the blocks that share a list, filled up behind the last one.

    Returns:
        Queries [B, H, t, q, D]; one past the last slot that each may read, and where each stands, [B, 1, t, q]; where
        the keys stand, int64 [B, M].
    """
    assert selection.lists is not None
    blocks, queries = selection.lists.shape[2], q.shape[2]
    per = queries if selection.q_block is None else selection.q_block
    pad = blocks * per - queries
    q_positions, k_positions = geometry.positions()
    ends, own = (
        F.pad(x, (0, pad)).unflatten(-1, (blocks, per)) for x in (geometry.ends(), q_positions.expand(-1, 1, queries))
    )
    rows = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, per))
    return rows, ends, own, k_positions.expand(q.shape[0], 1, geometry.keys).squeeze(1).long()


def _slots(lists: Tensor, places: Tensor, size: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of listed blocks of `size`, the places at which they are read, and whether they are among the keys, each
    [..., K * size]."""
    inside = torch.arange(size, device=lists.device)
    slots, there = ((x.long().unsqueeze(-1) * by + inside).flatten(-2) for x, by in ((lists, size), (places, 1)))
    return slots, there, (lists >= 0).repeat_interleave(size, -1) & (slots < keys)


def _rows(table: Tensor, index: Tensor, keys: int) -> Tensor:
    """Rows of table [B * keys, D] that index [B, n] names within each batch row: [B * n, D], whole rows at a time."""
    first = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * keys
    return table.index_select(0, (index + first).flatten())


def _turn_queries(rows: Tensor, k: Tensor, back: Tensor, size: int, move: Move) -> Tensor:
    """Scores [B, H, t, q, K * size] of rows [B, H, t, q, D], turned by back [B, h, t, K] for each block, with keys as
    they are held, k [B, h, t * K * size, D]."""
    (batch, heads, blocks, per, dim), width = rows.shape, back.shape[-1]
    delta = back.unsqueeze(4).expand(-1, heads, -1, -1, per)
    turned = rows.unsqueeze(3).expand(-1, -1, -1, width, -1, -1).reshape(batch, heads, -1, dim)
    turned = move(turned, delta.reshape(batch, heads, -1)).view(batch, heads, blocks, width, per, dim)
    keys = k.view(batch, -1, blocks, width, size, dim)
    return (turned @ keys.transpose(-1, -2)).transpose(3, 4).flatten(-2)


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    geometry: Geometry,
    visible: Sequence[Span],
    *,
    scale: float,
    softcap: float | None,
    move: Move,
    angles: Angles | None = None,
) -> Partial:
    """Softmax attention of q over the listed pairs under `selection.frame.keys`, as in `pieces`, with v [B, 1, M, Dv].

    Args:
        angles: by how much `move` turns, where that is known.
    """
    lists, places, size = selection.lists, selection.frame.keys, selection.k_block
    assert lists is not None and places is not None and selection.span is None, "a frame of keys needs lists alone"
    bounded = any(not span.unbounded for span in visible)
    single = q.shape[2] == 1 and lists.shape[2] == 1 and geometry.k_positions is None and not bounded
    if single and angles is not None and turned.serves(q, angles):
        units = q.unflatten(1, (lists.shape[1], -1)).flatten(0, 1)
        rows = lists.flatten(0, 2).int(), places.flatten(0, 2).int(), _lengths(geometry)
        out, lse, _ = turned.read(units, k[:, 0], v[:, 0], *rows, angles, page=size, scale=scale, softcap=softcap)
        return Partial(out.view(*q.shape[:3], -1), lse.view(q.shape[:3]))
    per = q.shape[2] if selection.q_block is None else selection.q_block
    if softcap is None and per >= size and lists.shape[-1]:
        return _fused(q, k, v, selection, geometry, visible, scale=scale, move=move)
    if grouped.serves(selection, geometry, bounded):
        return grouped.read(q, k, v, selection, geometry, scale=scale, softcap=softcap, move=move, angles=angles)
    return attend(q, v, pieces(q, k, selection, geometry, visible, scale=scale, softcap=softcap, move=move))


def _lengths(geometry: Geometry) -> Tensor:
    """Slots that the one query of each row may read, int32 [B]."""
    g = geometry
    if g.first is None and g.lengths is None:
        return torch.full((g.batch,), g.keys, dtype=torch.int32, device=g.device)
    ends = g.lengths if g.first is None else g.ends()[..., 0]
    assert ends is not None
    return ends.int().expand(g.batch, 1).flatten()


_MASKED, _ALL, _OWN = range(3)
"""Which pairs of a block of queries are read: some; all; all but those in the future, where the queries' own keys are
the last ones that are listed."""


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    geometry: Geometry,
    visible: Sequence[Span],
    *,
    scale: float,
    move: Move,
) -> Partial:
    """`read` by the kernels for attention, over copies of the listed keys and values."""
    lists, places, size = selection.lists, selection.frame.keys, selection.k_block
    assert lists is not None and places is not None
    (batch, heads, queries, dim), keys, own = q.shape, k.shape[2], lists.shape[1]
    rows, ends, q_positions, k_positions = _blocks(q, selection, geometry)
    rows, (blocks, per) = rows.transpose(1, 2), rows.shape[2:4]
    slots_of_all, places_of_all, real = _slots(lists, places, size, keys)
    spans = [span for span in visible if not span.unbounded]
    kinds = [_MASKED] * blocks
    if queries > 1 and not spans:
        kinds = _kinds(slots_of_all, real, ends, ends_with_keys(q, v))
    outs, totals = [], []
    step = max(1, at_once(q.device) // max(1, batch * own * real.shape[-1] * dim))
    first = 0
    while first < blocks:
        stop = first + 1
        while stop < min(first + step, blocks) and kinds[stop] == kinds[first]:
            stop += 1
        some, kind = slice(first, stop), kinds[first]
        slots, there, mask = slots_of_all[:, :, some], places_of_all[:, :, some], None
        if kind == _MASKED:
            seen = real[:, :, some].unsqueeze(-2) & (slots.unsqueeze(-2) < ends[:, :, some].unsqueeze(-1))
            slots = torch.where(real[:, :, some], slots, 0)
            here = k_positions.gather(1, slots.flatten(1)).view(slots.shape)
            for span in spans:
                seen = seen & span.sees(q_positions[:, :, some], here)
            # Who is listed but not read may hold anything, which no mask stops: another one is read in its place.
            used = any_of(seen, -2)
            other = used.int().argmax(-1, keepdim=True)
            slots = torch.where(used, slots, slots.gather(-1, other))
            there = torch.where(used, there, there.gather(-1, other))
            mask = seen.transpose(1, 2).flatten(0, 1)
        here = k_positions.gather(1, slots.flatten(1)).view(slots.shape)
        flat, shape = slots.flatten(1), (batch, own, -1, dim)
        copied = move(_rows(k.reshape(batch * keys, dim), flat, keys).view(shape), (there - here).flatten(2))
        copied = copied.view(*slots.shape, dim).transpose(1, 2).flatten(0, 1)
        values = _rows(v.reshape(-1, v.shape[-1]), flat, keys).view(*slots.shape, -1).transpose(1, 2).flatten(0, 1)
        part = rows[:, some].flatten(0, 1)
        if per == 1 and own == 1:
            part = part.transpose(1, 2)  # the heads of a single query: rows of one matrix
        out, total = softmax_attention(part, copied, values, scale=scale, mask=mask, causal=kind == _OWN)
        assert total is not None
        outs.append(out.reshape(batch, stop - first, heads, per, -1))
        totals.append(total.reshape(batch, stop - first, heads, per))
        first = stop
    out, total = (torch.cat(x, dim=1).transpose(1, 2).flatten(2, 3)[:, :, :queries] for x in (outs, totals))
    return Partial(out, total)


def _kinds(slots: Tensor, real: Tensor, ends: Tensor, causal: bool) -> list[int]:
    """Which pairs are read of each block of queries; the host waits once for all of them.

    Args:
        slots, real: [B, h, t, n], ascending; ends: [B, 1, t, q], one past the last slot that a query may read.
        causal: whether kernels can leave out the future.
    """
    per, width = ends.shape[-1], slots.shape[-1]
    full = real.all(-1)
    kinds = torch.where(full & (slots[..., -1] < ends[..., 0]), _ALL, _MASKED)
    if causal and width > per > 1:
        at_end = (slots[..., -per:] == ends - 1).all(-1) & (slots[..., -per - 1] < ends[..., 0])
        kinds = torch.where(full & at_end, _OWN, kinds)
    low, high = kinds.flatten(0, 1).aminmax(dim=0)
    agreed: list[int] = torch.where(low == high, low, _MASKED).tolist()
    return agreed


def attend(q: Tensor, v: Tensor, parts: Iterator[Piece]) -> Partial:
    """Softmax attention over the pieces of q [B, H, N, D] with values v [B, 1, M, Dv]."""
    outs, totals = [], []
    table = v.reshape(-1, v.shape[-1])
    for piece in parts:
        live = (piece.scores > -torch.inf).any(-2)  # who is listed but not read may hold anything
        live = live if piece.slots.shape[1] == live.shape[1] else live.any(1, keepdim=True)
        values = _rows(table, piece.slots.flatten(1), v.shape[2]).view(*piece.slots.shape, -1).to(piece.scores.dtype)
        values = values.masked_fill(~live.unsqueeze(-1), 0.0)
        total = piece.scores.logsumexp(-1)
        anchor = torch.where(total == -torch.inf, 0.0, total)
        out = (piece.scores - anchor.unsqueeze(-1)).exp() @ values
        count = piece.stop - piece.start
        outs.append(out.flatten(2, 3)[:, :, :count])
        totals.append(total.flatten(2, 3)[:, :, :count])
    return Partial(torch.cat(outs, dim=2).to(q.dtype), torch.cat(totals, dim=2))


def probabilities(q: Tensor, keys: int, total: Tensor, parts: Iterator[Piece]) -> Tensor:
    """exp(score - total) of every slot, [B, H, N, M], for few queries; total [B, H, N] is the lse of the whole read."""
    batch, heads, queries, _ = q.shape
    out = torch.zeros(batch, heads, queries, keys, device=q.device, dtype=total.dtype)
    for piece in parts:
        count, width = piece.stop - piece.start, piece.scores.shape[-1]
        scores = piece.scores.flatten(2, 3)[:, :, :count].to(total.dtype)
        mass = total[:, :, piece.start : piece.stop].unsqueeze(-1)
        weights = (scores - torch.where(mass == -torch.inf, 0.0, mass)).exp()
        per = piece.scores.shape[3]
        slots = piece.slots.unsqueeze(3).expand(-1, heads, -1, per, width).flatten(2, 3)[:, :, :count]
        out[:, :, piece.start : piece.stop].scatter_add_(-1, slots, weights)
    return out


def columns(keys: int, total: Tensor, parts: Iterator[Piece], valid: Tensor) -> Tensor:
    """What `foveate.attention.columns` gives, for these pieces: [B, 1, M], summed over queries and heads."""
    batch, heads, _ = total.shape
    out = torch.zeros(batch, 1, keys, device=total.device, dtype=total.dtype)
    for piece in parts:
        count, per = piece.stop - piece.start, piece.scores.shape[3]
        mass = total[:, :, piece.start : piece.stop]
        counts = torch.arange(piece.start, piece.stop, device=total.device) < valid.view(-1, 1, 1)
        mass = torch.where(counts & (mass > -torch.inf), mass, torch.inf)
        mass = F.pad(mass, (0, piece.scores.shape[2] * per - count), value=torch.inf).view(batch, heads, -1, per, 1)
        weights = (piece.scores.to(total.dtype) - mass).exp().sum(3)
        if piece.slots.shape[1] != heads:
            weights = weights.sum(1, keepdim=True)
        out[:, 0].scatter_add_(-1, piece.slots.flatten(1), weights.flatten(1))
    return out
