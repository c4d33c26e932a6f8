"""Random invertible matrices that follow from a key."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyedMatrices:
    """Matrices that follow from a key alone, in float64. Each is asked for by a label of its own.

    Numbers come from SHAKE-256, so that no version of any library changes what a key means.

    Args:
        key: any text.
        condition: bound on the condition number of every matrix, at least 1.
        inverse: give the inverses of the matrices instead.
    """

    key: str
    condition: float
    inverse: bool

    def uniform(self, label: str, count: int) -> Tensor:
        """Numbers [count] between 0 and 1, both excluded."""
        if not count:
            return torch.zeros(0, dtype=torch.float64)
        data = hashlib.shake_256(f"{self.key}/{label}".encode()).digest(4 * count)
        words = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(count, 4).double()
        return (words @ torch.tensor([1.0, 2.0**8, 2.0**16, 2.0**24], dtype=torch.float64) + 0.5) / 2.0**32

    def scales(self, label: str, count: int) -> Tensor:
        """Factors [count] of which no two have a ratio above the condition."""
        return self.condition ** (self.uniform(label, count) - 0.5)

    def invertible(self, label: str, size: int) -> Tensor:
        """[size, size]: orthogonal, scales, orthogonal."""
        if not size:
            return torch.zeros(0, 0, dtype=torch.float64)
        made = self._orthogonal(f"{label}/left", size) * self.scales(f"{label}/scales", size)
        made = made @ self._orthogonal(f"{label}/right", size)
        return torch.linalg.inv(made) if self.inverse else made

    def turns(self, label: str, size: int) -> Tensor:
        """[size, size]: a turn and a scale for each half-split pair, which commute with every rotation of the pairs."""
        scale, angle = self.scales(f"{label}/scales", size // 2), self.uniform(f"{label}/angles", size // 2) * math.tau
        a, b = (torch.diag(scale * wave) for wave in (angle.cos(), angle.sin()))
        made = torch.cat([torch.cat([a, -b], dim=1), torch.cat([b, a], dim=1)], dim=0)
        return torch.linalg.inv(made) if self.inverse and size else made

    def _orthogonal(self, label: str, size: int) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * self.uniform(label, size * size) - 1).reshape(size, size)
        q, r = torch.linalg.qr(normal)
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)  # the one factorisation with a positive diagonal
