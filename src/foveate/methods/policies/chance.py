"""Chances that follow from numbers alone, so that no batch, chunk or order of calls changes them."""

from __future__ import annotations

import torch
from torch import Tensor


def starts(seed: int, layer: int, heads: int, device: torch.device) -> Tensor:
    """A number of its own for each kv head of a layer: int64 [1, heads, 1, 1]."""
    head = torch.arange(heads, device=device).view(1, -1, 1, 1)
    return stirred(stirred(torch.tensor(seed, device=device)) + layer) + head


def draw(start: Tensor, *numbers: Tensor) -> Tensor:
    """Chances in [0, 1), float32, each a function of its numbers alone."""
    for number in numbers:
        start = stirred(start) + number
    return ((stirred(start) >> 20) & 0xFFFFFF).float() / 2**24


def stirred(x: Tensor) -> Tensor:
    """An invertible scrambling of int64 values (the finisher of splitmix64; products wrap around)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))
