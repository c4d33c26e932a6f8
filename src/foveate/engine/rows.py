"""Rows begin at slot 0: padding is rolled away before a method sees q, k, v, and put back on the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.attention.sent import sent


@dataclass(frozen=True)
class Rows:
    """Where the real tokens of a forward stand.

    Args:
        fresh: real new tokens of each row, host int64 [B].
        order: column of the i-th real token of each row, int64 [B, N] (padding columns behind), or None when there is
            no padding.
    """

    fresh: np.ndarray
    order: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Every column holds a real token."""
        return self.order is None

    @property
    def counts(self) -> np.ndarray | None:
        """`fresh`, or None where that says nothing."""
        return None if self.order is None else self.fresh

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, queries: int) -> Rows:
        """From a 2-D padding mask [B, >= N] (None: no padding), of which the last N columns are this forward's."""
        if mask is None or queries == 1:
            return cls(np.full(batch, queries))
        valid = mask[:, -queries:].bool()
        fresh = valid.sum(1).cpu().numpy().astype(np.int64)
        if (fresh == queries).all():
            return cls(fresh)
        return cls(fresh, torch.argsort(~valid, dim=1, stable=True))

    def roll(self, x: Tensor) -> Tensor:
        """[B, H, N, D] with real tokens first."""
        if self.order is None:
            return x
        index = self.order.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    def unroll(self, x: Tensor) -> Tensor:
        """Inverse of `roll`; padding columns become 0."""
        if self.order is None:
            return x
        order = self.order.to(x.device)
        real = torch.arange(x.shape[2], device=x.device) < sent(self.fresh, x.device)[:, None]
        index = order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.zeros_like(x).scatter(2, index, x * real[:, None, :, None].to(x.dtype))
