"""Attention of one query per row over held tokens: what decode methods rank tokens by."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.methods.base import Context


def row_probs(q: Tensor, k: Tensor, seen: Tensor, ctx: Context) -> Tensor:
    """Softmax of one query per row and head over the tokens it may see, float32; 0 elsewhere.

    Args:
        q: [B, H, D]; k: [B, Hs, S, D]; seen: bool [B, Hs, S].

    Returns:
        [B, Hs, H / Hs, S].
    """
    grouped = q.float().reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    logits = grouped @ k.float().transpose(-1, -2) * ctx.scale
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    return logits.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0.0)


def group_reduce(x: Tensor, how: Literal["max", "mean"]) -> Tensor:
    """[B, Hs, G, S] -> [B, Hs, S]: how the query heads of a kv head agree."""
    return x.amax(2) if how == "max" else x.mean(2)
