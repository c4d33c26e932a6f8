"""Reads in which every query lists blocks of its own, whose keys stand elsewhere: seen from the blocks.

Query by query, blocks would have to be fetched as often as they are listed. Here all (query, block) entries of a block
are brought together, the query of each turned to where that block is held: keys stay where they are, and one matrix
product serves many queries. What a query finds in each of its blocks is merged at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import turned
from foveate.attention.angles import Angles
from foveate.attention.at_once import at_once
from foveate.attention.attend import attend
from foveate.attention.kernel import softmax_attention
from foveate.attention.scores import score_attention
from foveate.attention.selection import Geometry, Partial, Selection

TILE = 64
"""Entries that meet a block together."""
LEAST = 16
"""Slots of a block that is worth it."""
ENTRIES = 1 << 22
"""Numbers of queries, one for each entry, that are alive at once on a processor, and on a GPU without its kernel."""
ENTRIES_GPU = 1 << 27

Move = Callable[[Tensor, Tensor], Tensor]


def serves(selection: Selection, geometry: Geometry, bounded: bool) -> bool:
    """Whether these are many queries with lists of few each, of blocks that move as a whole."""
    lists, size = selection.lists, selection.k_block
    if lists is None or bounded or geometry.k_positions is not None or size < LEAST or lists.shape[-1] == 0:
        return False
    return geometry.queries >= TILE and selection.q_block is not None and selection.q_block * 2 <= size


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    geometry: Geometry,
    *,
    scale: float,
    softcap: float | None,
    move: Move,
    angles: Angles | None = None,
) -> Partial:
    """Softmax attention of q [B, H, N, Dk] over the listed pairs of k [B, 1, M, Dk] and v [B, 1, M, Dv] under
    `selection.frame.keys`; see `framed.read`. No buffer grows with N."""
    lists, places, per = selection.lists, selection.frame.keys, selection.q_block
    assert lists is not None and places is not None and per is not None
    batch, heads, queries, dim = q.shape
    ends = geometry.ends().expand(batch, 1, queries)
    kernel = angles is not None and turned.serves(q, angles)
    alive = 4 * at_once(q.device) if kernel else ENTRIES if q.device.type == "cpu" else ENTRIES_GPU
    step = max(1, alive // (batch * heads * lists.shape[-1] * dim))
    parts = []
    for first in range(0, queries, step):
        last = min(first + step, queries)
        some = torch.arange(first, last, device=q.device) // per
        block, place = (x.index_select(2, some).expand(-1, heads, -1, -1) for x in (lists, places))
        rows, end = q[:, :, first:last], ends[:, :, first:last]
        how = {"size": selection.k_block, "scale": scale, "softcap": softcap}
        if kernel:
            assert angles is not None
            parts.append(turned.read_grouped(rows, k[:, 0], v[:, 0], block, place, end[:, 0], angles, **how))
        else:
            parts.append(_some(rows, k, v, block.long(), place.long(), end, move=move, **how))
    return Partial(torch.cat([part.out for part in parts], dim=2), torch.cat([part.lse for part in parts], dim=2))


def _some(
    q: Tensor, k: Tensor, v: Tensor, block: Tensor, place: Tensor, ends: Tensor, *, size: int, scale: float,
    softcap: float | None, move: Move,
) -> Partial:  # fmt: skip
    """`read` for queries that fit: block and place [B, H, n, K], ends [B, 1, n]."""
    end = ends.unsqueeze(-1)
    some = (block >= 0) & (block * size < end)
    whole = some & ((block + 1) * size <= end)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(block.shape, -torch.inf, dtype=wide, device=q.device)
    out = q.new_zeros(block.numel(), v.shape[3])
    table, delta = q.reshape(-1, q.shape[3]), (block * size - place).flatten()
    for taken, everything in ((whole, True), (some & ~whole, False)):
        entries = _Entries.of(taken, block, -(-k.shape[2] // size))
        if entries is None:
            continue
        moved = move(
            table.index_select(0, entries.which // block.shape[3]).view(1, 1, -1, q.shape[3]),
            delta.index_select(0, entries.which).unsqueeze(0),
        )
        rows = q.new_zeros(entries.count * q.shape[0], q.shape[3]).index_copy_(0, entries.row, moved[0, 0])
        rows = rows.view(q.shape[0], 1, entries.count, q.shape[3])
        if everything:
            found = _whole(rows, k, v, entries, size, scale, softcap)
        else:
            end_of = end.expand_as(block).flatten().index_select(0, entries.which)
            found = _cut(rows, k, v, entries, end_of, size, scale, softcap)
        out.index_copy_(0, entries.which, found.out.flatten(0, 2).index_select(0, entries.row))
        lse.view(-1).index_copy_(0, entries.which, found.lse.flatten().index_select(0, entries.row).to(wide))
    total = lse.logsumexp(-1)
    weight = (lse - torch.where(total == -torch.inf, 0.0, total).unsqueeze(-1)).exp().unsqueeze(-2)
    mixed = (weight @ out.view(*block.shape, -1).to(wide)).squeeze(-2)
    return Partial(mixed.to(q.dtype), total)


@dataclass(frozen=True)
class _Entries:
    """(query, block) entries ordered by block, in tiles of one block each.

    Args:
        which: numbers of the entries in [B, H, n, K], int64 [e].
        row: where each of them stands among B x `count` rows, int64 [e].
        count: rows of each batch row, tiles of TILE.
        blocks: the block of each tile, int32 [B, count / TILE], -1 behind the last.
    """

    which: Tensor
    row: Tensor
    count: int
    blocks: Tensor

    @classmethod
    def of(cls, taken: Tensor, block: Tensor, blocks: int) -> _Entries | None:
        """Those that are taken, [B, H, n, K], of so many blocks; None: there are none."""
        which = taken.flatten().nonzero().squeeze(1)
        if not len(which):
            return None
        batch, device = taken.shape[0], taken.device
        group = block.flatten().index_select(0, which) + which // taken[0].numel() * blocks
        group, order = group.sort()
        which = which.index_select(0, order)
        begin = torch.searchsorted(group, torch.arange(batch * blocks + 1, device=device))
        tiles = (begin.diff() + TILE - 1).div(TILE, rounding_mode="floor").view(batch, blocks)
        ends = tiles.cumsum(1)
        most = int(ends[:, -1].max())
        base = (torch.arange(batch, device=device).unsqueeze(1) * most + ends - tiles).flatten() * TILE
        row = torch.arange(len(which), device=device) + (base - begin[:-1]).index_select(0, group)
        number = torch.arange(most, device=device).expand(batch, -1).contiguous()
        owner = torch.searchsorted(ends, number, right=True)
        return cls(which, row, most * TILE, torch.where(number < ends[:, -1:], owner, -1).int())


def _whole(
    rows: Tensor, k: Tensor, v: Tensor, entries: _Entries, size: int, scale: float, softcap: float | None
) -> Partial:
    """Entries of which all slots are read."""
    batch, keys = rows.shape[0], k.shape[2]
    behind = torch.full((1, 1), keys, dtype=torch.int32, device=rows.device)  # in front of which are all keys
    geometry = Geometry(batch, entries.count, keys, first=behind, device=rows.device)
    selection = Selection(entries.blocks[:, None, :, None], TILE, size)
    return attend(rows, k, v, selection, geometry, scale=scale, softcap=softcap)


def _cut(
    rows: Tensor, k: Tensor, v: Tensor, entries: _Entries, end_of: Tensor, size: int, scale: float,
    softcap: float | None,
) -> Partial:  # fmt: skip
    """Entries of which only the slots in front of end_of [e] are read."""
    batch, keys = rows.shape[0], k.shape[2]
    ends = end_of.new_zeros(batch * entries.count).index_copy_(0, entries.row, end_of).view(-1, TILE, 1)
    slots = (entries.blocks.long().clamp_min(0).unsqueeze(-1) * size + torch.arange(size, device=k.device)).flatten(1)
    slots = slots.clamp_max(keys - 1)
    slots = (slots + torch.arange(batch, device=k.device).unsqueeze(1) * keys).view(-1, size)
    inside = slots % keys
    seen = (inside.unsqueeze(1) < ends) & (inside.diff(prepend=inside[:, :1] - 1) > 0).unsqueeze(1)
    hidden = ~seen.any(1).view(-1, 1, size, 1)  # who is read by nobody may hold anything
    near, values = (
        x.reshape(-1, x.shape[3]).index_select(0, slots.flatten()).view(-1, 1, size, x.shape[3]).masked_fill(hidden, 0)
        for x in (k, v)
    )
    tiles = rows.view(-1, 1, TILE, rows.shape[3])
    if softcap is None:
        out, lse = softmax_attention(tiles, near, values, scale=scale, mask=seen.unsqueeze(1))
    else:
        out, lse = score_attention(tiles, near, values, scale=scale, mask=seen.unsqueeze(1), softcap=softcap)
    assert lse is not None
    return Partial(out.reshape(batch, 1, entries.count, -1), lse.reshape(batch, 1, entries.count))
