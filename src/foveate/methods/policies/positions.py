"""Positions that are not those of the text: who may move them, and tokens at one position for all."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import Refused
from foveate.methods.context import Rope
from foveate.models.shape import ModelShape


def refuse_fixed_positions(shape: ModelShape, name: str) -> None:
    """Refuse a model whose queries and keys cannot be turned to other positions.

    Raises:
        Refused: without a rotary embedding, or where its angles depend on the length.
    """
    if shape.rope.get("type") in (None, "none", "dynamic", "longrope"):
        raise Refused(f"{name} counts positions anew, which the position embedding of {shape.name} does not allow")


def at_position(x: Tensor, now: Tensor, position: int, rope: Rope) -> Tensor:
    """Rotated x [B, H, n, D] that stands at `now` ([B, n] or [B, H, n]), as if all of it stood at one position."""
    return rope.move(x, position - now.to(x.device, torch.int64))
