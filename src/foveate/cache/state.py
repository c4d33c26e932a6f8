"""What methods declare about the store: values per slot (tags) and per block of slots (summaries)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Fold = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(k [P, n, size, Dk], v [P, n, size, Dv], valid [P, n, size] bool) -> [P, n, F]."""


@dataclass(frozen=True)
class Tag:
    """One value per slot that moves with its token through eviction, growth, crop and reorder.

    Args:
        width: values per slot.
        dtype: of the values.
        fill: value of a token that just arrived.
    """

    width: int = 1
    dtype: torch.dtype = torch.float32
    fill: float = 0.0


@dataclass(frozen=True)
class Blocks:
    """One summary per block of `size` slots, refolded while the block fills and whenever its tokens change.

    Args:
        size: slots per block.
        fold: pure function of the block's present tokens; slots outside `valid` must not influence it.
    """

    size: int
    fold: Fold
