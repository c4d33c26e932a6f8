"""Keys that hold some of their channels: which, how many, and what that saves.

Source: ThinK (2407.21018), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cache import Observed
from foveate.methods.budget import PAIR_BYTES
from foveate.models.shape import LayerShape

INDEX = torch.int16
"""What a kept channel is named by."""


def kept(dim: int, ratio: float) -> int:
    """Channels that are left of `dim` when the share `ratio` is dropped; one at least."""
    return max(1, dim - int(ratio * dim + 1e-9))


def saved(layer: LayerShape, itemsize: int, tokens: int, ratio: float) -> int:
    """Bytes that a layer holds less when so many tokens lose the share `ratio` of their channels."""
    left = kept(layer.head_dim, ratio)
    if left == layer.head_dim:
        return 0
    lost = left * INDEX.itemsize + PAIR_BYTES
    return layer.store_heads * (max(0, tokens) * (layer.head_dim - left) * itemsize - lost)


@dataclass(frozen=True)
class Thinned:
    """Keys with `kept` channels of each pair, chosen when the prompt is over; `tail` newest ones stay whole."""

    kept: int
    dim: int
    window: int
    tail: int
    flush: int = 0
    unit: int = 1

    def fit(self, x: Tensor, lengths: Tensor, observed: Observed | None) -> tuple[Tensor, ...]:
        """The channels to keep, [P, kept], ascending."""
        assert observed is not None, "channels are weighed by Needs(window=...)"
        q = observed.q[:, :, -self.window :].float()
        q = q * observed.real[:, None, -self.window :, None]
        there = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        k = x.float().masked_fill(~there.unsqueeze(-1), 0.0)
        energy = q.square().sum((1, 2)) * k.square().sum(1)
        order = energy.argsort(dim=-1, descending=True, stable=True)[:, : self.kept]
        return (order.sort(dim=-1).values.to(INDEX),)

    def channels(self, *fitted: Tensor) -> Tensor:
        """Which channels the packed tensor holds, [P, kept]."""
        return fitted[0]

    def pack(self, x: Tensor, *fitted: Tensor) -> tuple[Tensor, ...]:
        """[P, n, D] -> ([P, n, kept],)."""
        return (x.gather(2, self._index(fitted, x.shape[1])),)

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype, *fitted: Tensor) -> Tensor:
        (x,) = packed
        whole = x.new_zeros(*x.shape[:2], self.dim, dtype=dtype)
        return whole.scatter_(2, self._index(fitted, x.shape[1]), x.to(dtype))

    def _index(self, fitted: tuple[Tensor, ...], tokens: int) -> Tensor:
        return fitted[0].long().unsqueeze(1).expand(-1, tokens, -1)
