"""Folds: what a block of keys is summarised by."""

from __future__ import annotations

import torch
from torch import Tensor


def minmax(k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Channel-wise minimum and maximum of a block's keys.

    Args:
        k: [P, n, size, D]; valid: [P, n, size].

    Returns:
        [P, n, 2 D], minima first; zeros for a block without tokens.
    """
    inside = valid.unsqueeze(-1)
    low = k.masked_fill(~inside, torch.inf).amin(2)
    high = k.masked_fill(~inside, -torch.inf).amax(2)
    return torch.cat([low, high], dim=-1).masked_fill(~valid.any(-1, keepdim=True), 0.0)


def bound_scores(q: Tensor, summary: Tensor) -> Tensor:
    """The largest q·k that any key inside the bounds could give.

    Args:
        q: [B, H, N, D]; summary: [B, Hs, n, 2 D] as `minmax` makes it.

    Returns:
        [B, H, N, n] float32. Source: Quest (2406.10774), section 3.3.
    """
    batch, heads, queries, dim = q.shape
    stores = summary.shape[1]
    low, high = summary.float().split(dim, dim=-1)
    grouped = q.float().reshape(batch, stores, heads // stores * queries, dim)
    upper = grouped.clamp_min(0) @ high.transpose(-1, -2) + grouped.clamp_max(0) @ low.transpose(-1, -2)
    return upper.view(batch, heads, queries, -1)
