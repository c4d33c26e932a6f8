"""Rotation by positions as its definition says it, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.compat import rotary


def turn(model: Any, x: Tensor, delta: Tensor) -> Tensor:
    """x [..., n, D] turned by delta [n] positions, in float64."""
    angle = delta.double()[:, None] * rotary(model)[0].double()
    half = x.shape[-1] // 2
    a, b = x[..., :half].double(), x[..., half:].double()
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
