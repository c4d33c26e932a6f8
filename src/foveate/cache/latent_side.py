"""Latents and the rotated channels beside them, each packed as suits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cache.column import Side


@dataclass(frozen=True)
class LatentSide:
    """What latent attention (MLA) holds of a token: first a latent, which serves as key and as value, then a key with
    its position. Tokens leave the exact tail by the rule of `rotated`.

    Args:
        latent: packs the first `rank` channels; its own tail and flush say nothing.
        rotated: packs the others.
        rank: of the latent.
    """

    latent: Side
    rotated: Side
    rank: int

    @property
    def tail(self) -> int:
        return self.rotated.tail

    @property
    def flush(self) -> int:
        return self.rotated.flush

    @property
    def unit(self) -> int:
        return max(self.latent.unit, self.rotated.unit)

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """[P, n, rank + rope] -> the tensors of both, those of the latent first, as many of one as of the other."""
        latent, rotated = x[..., : self.rank].contiguous(), x[..., self.rank :].contiguous()
        return (*self.latent.pack(latent), *self.rotated.pack(rotated))

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        half = len(packed) // 2
        return torch.cat([self.latent.unpack(packed[:half], dtype), self.rotated.unpack(packed[half:], dtype)], dim=-1)
