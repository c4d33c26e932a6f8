"""By how much a model turns queries and keys at each position.

Source: rotary position embedding, RoFormer (2104.09864), section 3.2; pairs lie half a rotation's width apart.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention import decoding

WIDEST = 256
"""Most pairs of rotated channels, and most channels that are not rotated, that kernels turn."""


class Angles(NamedTuple):
    """How a model turns its queries and keys.

    Args:
        frequencies: float32 [F], angle per position of each pair of channels, which lie F apart.
        last: the 2 F rotated channels are the last ones, not the first.
    """

    frequencies: Tensor
    last: bool = False

    def fit(self, dim: int) -> bool:
        """Whether kernels can turn keys of `dim` channels by these."""
        pairs = self.frequencies.numel()
        return 0 < 2 * pairs <= dim and max(pairs, dim - 2 * pairs) <= WIDEST

    def move(self, x: Tensor, delta: Tensor) -> Tensor:
        """Turn rotated x [B, H, N, D] by delta [B, N] or [B, H, N] positions; by minus its position, x is unrotated."""
        if self.fit(x.shape[-1]) and not x.requires_grad and decoding.serves(x)[0]:
            made: Tensor = import_module("foveate.attention.triton.turn").turn(x, delta, self)
            return made
        if self.last:
            width = 2 * self.frequencies.numel()
            turned = Angles(self.frequencies).move(x[..., -width:], delta)
            return torch.cat([x[..., :-width], turned], dim=-1)
        angle = delta.unsqueeze(-1).float() * self.frequencies.to(x.device)
        angle = angle.unsqueeze(1) if angle.dim() == 3 else angle
        cos, sin = (torch.cat([t, t], dim=-1) for t in (angle.cos(), angle.sin()))
        width = cos.shape[-1]
        head, rest = x[..., :width].float(), x[..., width:]
        half = torch.cat([-head[..., width // 2 :], head[..., : width // 2]], dim=-1)
        return torch.cat([(head * cos + half * sin).to(x.dtype), rest], dim=-1)
