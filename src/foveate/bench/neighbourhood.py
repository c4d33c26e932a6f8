"""How much of its promise a neighbourhood mask keeps in tiles: the simulator of generalized neighborhood attention.

Every query of a grid of any number of axes sees a box of `window` keys about itself; with a stride s, s queries side by
side share the box of one of them. A kernel visits every tile of keys that any query of its tile of queries sees, and
the slowest tile of queries decides (2504.16922; its simulator was not released, the rule is that of the paper). For
selections of a language model see `bench.tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Literal

from foveate.errors import BadArgument

Tiling = Literal["static", "dynamic"]
"""Tiles of keys on a grid of their own, as tensor descriptors fetch them, or cut from where the box begins."""


@dataclass(frozen=True)
class Axis:
    """One axis of the grid.

    Args:
        extent: tokens along it.
        window: keys that a query sees along it, 1 <= window <= extent.
        stride: queries that share a window, 1 <= stride <= window.
        causal: no key behind the query is seen, as along the axis of time.
        q_tile, k_tile: queries and keys of a tile along it.
    """

    extent: int
    window: int
    stride: int = 1
    causal: bool = False
    q_tile: int = 1
    k_tile: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window <= self.extent:
            given = f"extent {self.extent}, window {self.window}, stride {self.stride}"
            raise BadArgument("axis", given, "give 1 <= stride <= window <= extent")
        if min(self.q_tile, self.k_tile) < 1:
            raise BadArgument("axis", f"tiles {self.q_tile}, {self.k_tile}", "tiles hold at least one token")

    def sees(self, i: int) -> tuple[int, int]:
        """First key of query i, and the end of its keys."""
        n, w, s = self.extent, self.window, self.stride
        if self.causal:
            leader = min(i // s * s + s - 1, n - 1)
            return max(leader - w + 1, 0), i + 1
        # An even window has no middle: its left side is the longer one.
        leader = min(i // s * s + s // 2, n - 1)
        start = min(max(leader - w // 2, 0), n - w)
        return start, start + w

    def visits(self, tiling: Tiling) -> list[int]:
        """Tiles of keys that each tile of queries visits along this axis."""
        found = []
        for first in range(0, self.extent, self.q_tile):
            seen = [self.sees(i) for i in range(first, min(first + self.q_tile, self.extent))]
            low, high = min(start for start, _ in seen), max(end for _, end in seen)
            if tiling == "static":
                found.append(-(-high // self.k_tile) - low // self.k_tile)
            else:
                found.append(-(-(high - low) // self.k_tile))
        return found

    @property
    def tiles(self) -> int:
        """Tiles of keys along this axis, which dense attention visits."""
        return -(-self.extent // self.k_tile)


@dataclass(frozen=True)
class Bound:
    """What a mask can gain over dense attention.

    Args:
        worst, mean: tiles of keys that the slowest tile of queries visits, and those of all on the average.
        dense: tiles of keys in all.
        pairs: what the number of pairs promises: all keys over those in a window (causal axes count as others).
    """

    worst: int
    mean: float
    dense: int
    pairs: float

    @property
    def speed_up(self) -> float:
        """The most that can be gained, if all tiles of queries take as long as the slowest."""
        return self.dense / self.worst

    @property
    def perfect(self) -> bool:
        """Whether tiles lose nothing: no tile is visited that is not needed whole."""
        return abs(self.speed_up - self.pairs) < 1e-9

    def end_to_end(self, share: float) -> float:
        """The gain of a whole model of whose time attention takes this share (Amdahl)."""
        return 1 / (1 - share + share / self.speed_up)


def simulate(axes: Sequence[Axis], tiling: Tiling = "static") -> Bound:
    """The bound of a mask: axes are independent, so that counts multiply."""
    if not axes:
        raise BadArgument("axes", axes, "give at least one")
    visits = [axis.visits(tiling) for axis in axes]
    return Bound(
        prod(max(each) for each in visits),
        prod(sum(each) / len(each) for each in visits),
        prod(axis.tiles for axis in axes),
        prod(axis.extent for axis in axes) / prod(axis.window for axis in axes),
    )


def search_strides(axes: Sequence[Axis], tiling: Tiling = "static") -> Iterator[tuple[tuple[int, ...], Bound]]:
    """Strides worth having, each with its bound: of each axis those that visit fewer tiles than any smaller one."""
    kept: list[list[int]] = []
    for axis in axes:
        best, own = axis.tiles + 1, []
        for stride in range(1, axis.window + 1):
            worst = max(replace(axis, stride=stride).visits(tiling))
            if worst < best:
                best = worst
                own.append(stride)
        kept.append(own)
    for strides in product(*kept):
        yield strides, simulate([replace(a, stride=s) for a, s in zip(axes, strides, strict=True)], tiling)
