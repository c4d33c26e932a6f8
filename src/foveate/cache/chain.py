"""Sides in a chain: one thins tokens out, the next packs what is left of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cache.column import Observed, Side, fitted
from foveate.errors import Refused


@dataclass(frozen=True)
class Chained:
    """Two sides, one behind the other.

    Args:
        first: gives one tensor [P, n, D'] with a vector per token; it may be fitted.
        second: packs those vectors; it is the same for all heads.

    Raises:
        Refused: `second` differs from head to head; it was made for whole tokens.
    """

    first: Side
    second: Side

    def __post_init__(self) -> None:
        if getattr(self.second, "per_head", False):
            name = type(self.second).__name__
            raise Refused(f"{name} packs whole tokens of a kv head, and cannot pack what another format leaves of them")

    @property
    def per_head(self) -> bool:
        return getattr(self.first, "per_head", False)

    @property
    def tail(self) -> int:
        return max(self.first.tail, self.second.tail)

    @property
    def flush(self) -> int:
        """Once only if both say so; what one of them packs later passes through the other as well."""
        if not self.first.flush and not self.second.flush:
            return 0
        return math.lcm(self.first.flush or 1, self.second.flush or 1)

    @property
    def unit(self) -> int:
        return math.lcm(self.first.unit, self.second.unit)

    def fit(self, x: Tensor, lengths: Tensor, observed: Observed | None) -> tuple[Tensor, ...]:
        return fitted(self.first, x, lengths, observed)

    def pack(self, x: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        (vectors,) = self.first.pack(x, *learned)
        return self.second.pack(vectors)

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype, *learned: Tensor) -> Tensor:
        return self.first.unpack((self.second.unpack(packed, dtype),), dtype, *learned)


def chained(first: Side | None, second: Side | None) -> Side | None:
    """Both sides in this order; None stands for exact tokens."""
    return Chained(first, second) if first is not None and second is not None else first or second
