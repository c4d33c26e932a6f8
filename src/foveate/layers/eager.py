"""Softmax attention in plain matrix products, for what transformers' own functions cannot serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import compat


def visible(mask: Tensor | None, queries: int, keys: int, device: torch.device, window: int | None = None):
    """A mask as transformers hands it to a layer, made to fit scores [B, H, N, M]; None where all is seen.

    Args:
        mask: 4-D bool (True is seen) or float (added), 2-D padding (True is a token), or None: then one query sees
            every key, and of several the i-th sees the first i + 1, which is how transformers means it.
        window: with a 2-D mask, the keys that a query sees, its own included.
    """
    if mask is None:
        return None if queries == 1 else torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]
    if mask.ndim == 2:
        return compat.four_d(mask, queries, keys, window)
    return mask[..., :keys]


def weigh(scores: Tensor, mask: Tensor | None, softcap: float | None = None) -> Tensor:
    """Attention weights [B, H, N, M] of scaled scores: capped, masked (see `visible`), softmax in float32 or wider."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scores = scores.to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(wide).min) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """An attention function for transformers' interface: [B, H, N, Dk], [B, Hk, M, Dk or Dv] -> out [B, N, H, Dv]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = visible(attention_mask, query.shape[2], key.shape[2], query.device, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = weigh(query @ key.transpose(-1, -2) * scale, mask, softcap).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
