"""Prompt queries by chance: the same ones whatever the chunks, the batch and the padding were."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.attention.sent import sent
from foveate.cache.cache import CourierLayer

NEVER = torch.iinfo(torch.int64).max
"""Order of a query that does not exist."""


def capture(layer: CourierLayer, q: Tensor, start: np.ndarray, fresh: np.ndarray, count: int) -> None:
    """Take a forward's prompt queries into a layer's samples.

    Each position has a random number of its own, and those with the smallest numbers are kept: that is a sample without
    repetition of all positions so far.

    Args:
        q: [B, H, N, D], of which the first fresh[b] of row b are real; start: position of the first, int64 [B].
        count: queries to keep.
    """
    order = sent(_numbers(start[:, None] + np.arange(q.shape[2])), q.device)
    real = torch.arange(q.shape[2], device=q.device) < sent(fresh, q.device)[:, None]
    order, best = order.masked_fill(~real, NEVER).sort(dim=1)
    order, found = order[:, :count], _rows(q.detach(), best[:, :count])
    if layer.samples is not None and layer.sample_order is not None:
        order, best = torch.cat([layer.sample_order, order], dim=1).sort(dim=1)
        order, found = order[:, :count], _rows(torch.cat([layer.samples, found], dim=2), best[:, :count])
    layer.samples, layer.sample_order = found.contiguous(), order.contiguous()


def first(layer: CourierLayer, count: int) -> tuple[Tensor | None, Tensor | None]:
    """What a layer that needs only `count` samples would have taken of another's, and their order."""
    if not count or layer.samples is None or layer.sample_order is None:
        return None, None
    return layer.samples[:, :, :count].clone(), layer.sample_order[:, :count].clone()


def _rows(q: Tensor, index: Tensor) -> Tensor:
    """Queries index [B, n] of q [B, H, N, D]."""
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def _numbers(positions: np.ndarray) -> np.ndarray:
    """A number below 2^62 for each position, with no pattern in it (the finisher of splitmix64)."""
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)
