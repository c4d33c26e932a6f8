"""How many tiles a kernel visits for a selection, and the speed-up that leaves of what its pairs promise.

A kernel computes whole tiles of queries and keys. One pair in a tile costs as much as all of them, so that a selection
of a tenth of the pairs need not be ten times as fast; how far it can be is counted here (the bound of generalized
neighborhood attention's simulator, 2504.16922, for any selection).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from foveate.attention.scores import to_heads
from foveate.attention.selection import ALL, Geometry, Selection
from foveate.errors import BadArgument


@dataclass(frozen=True)
class Tiles:
    """Tiles and pairs of all query heads together.

    Args:
        visited: tiles of adjacent keys that hold a pair of the selection.
        gathered: tiles, if each is filled with listed keys wherever they lie, as kernels do that fetch blocks smaller
            than their tile.
        causal: tiles that hold a causal pair, which dense attention visits.
        worst: largest share of its causal tiles that any tile of queries visits.
        pairs, causal_pairs: single pairs.
    """

    visited: int
    gathered: int
    causal: int
    worst: float
    pairs: int
    causal_pairs: int

    @property
    def speed_up(self) -> float:
        """What a kernel of aligned tiles can gain at most."""
        return self.causal / max(1, self.visited)

    @property
    def gathered_speed_up(self) -> float:
        """What a kernel that fills its tiles can gain at most."""
        return self.causal / max(1, self.gathered)

    @property
    def pair_speed_up(self) -> float:
        """What the pairs promise."""
        return self.causal_pairs / max(1, self.pairs)

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "speed_up": self.speed_up,
            "gathered_speed_up": self.gathered_speed_up,
            "pair_speed_up": self.pair_speed_up,
        }


def tiles(selection: Selection, geometry: Geometry, num_heads: int, q_tile: int, k_tile: int) -> Tiles:
    """Count the tiles of a selection, head by head.

    Args:
        q_tile, k_tile: queries and keys of a tile; tiles start at query 0 and slot 0.
    """
    if q_tile < 1 or k_tile < 1:
        raise BadArgument("q_tile, k_tile", (q_tile, k_tile), "tiles hold at least one query and one key")
    g = geometry
    unit = gcd(selection.k_block, k_tile)
    rows = -(-g.queries // q_tile)
    last = torch.arange(1, rows + 1, device=g.device).mul(q_tile).clamp(max=g.queries) - 1
    ends = g.ends()
    ends = to_heads(ends.expand(g.batch, -1, -1), num_heads).expand(g.batch, num_heads, -1)[..., last]
    causal = -(-ends // k_tile)  # [B, H, rows]
    listed = selection.lists is not None and selection.span is None
    found = _listed(selection, g, num_heads, q_tile, unit) if listed else _masked(selection, g, num_heads, q_tile, unit)
    visited = gathered = 0
    worst = 0.0
    for batch, head, table in found:
        wide = torch.nn.functional.pad(table, (0, -table.shape[1] % (k_tile // unit)))
        some = wide.unflatten(1, (-1, k_tile // unit)).any(-1).sum(-1)
        filled = -(-table.sum(-1) * unit // k_tile)
        visited, gathered = visited + int(some.sum()), gathered + int(filled.sum())
        worst = max(worst, float((some / causal[batch, head].clamp(min=1)).max()))
    every = int(ALL.pairs(g, num_heads).sum())
    return Tiles(visited, gathered, int(causal.sum()), worst, int(selection.pairs(g, num_heads).sum()), every)


Table = tuple[int, int, Tensor]
"""Row, query head, and which units of keys its tiles of queries read: bool [tiles, units]."""


def _listed(selection: Selection, g: Geometry, heads: int, q_tile: int, unit: int) -> Iterator[Table]:
    """From the lists, without a mask."""
    assert selection.lists is not None
    q_block = selection.q_block or max(1, g.queries)
    step = gcd(q_block, q_tile)  # these queries have one list, and stand in one tile
    start = torch.arange(0, g.queries, step, device=g.device)
    last = (start + step).clamp(max=g.queries) - 1
    ends = to_heads(g.ends(), heads).expand(g.batch, heads, -1)[..., last]
    units, pieces = -(-g.keys // unit), selection.k_block // unit
    lists = selection.lists
    row = (start // q_tile).view(-1, 1, 1) * (units + 1)
    for batch in range(g.batch):
        for head in range(heads):
            own = lists[batch, head * lists.shape[1] // heads].long()[start // q_block].unsqueeze(-1)  # [steps, K, 1]
            number = own * pieces + torch.arange(pieces, device=g.device)
            seen = (own >= 0) & (number * unit < ends[batch, head].view(-1, 1, 1))
            table = torch.zeros(-(-g.queries // q_tile) * (units + 1), dtype=torch.bool, device=g.device)
            table[(row + torch.where(seen, number, units)).flatten()] = True
            yield batch, head, table.view(-1, units + 1)[:, :units]


def _masked(selection: Selection, g: Geometry, heads: int, q_tile: int, unit: int) -> Iterator[Table]:
    """From the mask of one tile of queries at a time."""
    rows = []
    for start in range(0, g.queries, q_tile):
        stop = min(start + q_tile, g.queries)
        seen = selection.rows(start, stop).seen(g.rows(start, stop)).any(-2)
        seen = torch.nn.functional.pad(seen, (0, -g.keys % unit)).unflatten(-1, (-1, unit)).any(-1)
        rows.append(to_heads(seen, heads).expand(g.batch, heads, -1))
    table = torch.stack(rows, dim=2)
    for batch in range(g.batch):
        for head in range(heads):
            yield batch, head, table[batch, head]
