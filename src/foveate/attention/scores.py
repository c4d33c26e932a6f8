"""Attention by explicit scores, for what no ready-made kernel does: softcap and arbitrary bias."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.kernel import fold


def score_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over all given keys, with the scores in memory at once: callers bring few queries at a time.

    Args:
        q: [B, H, N, Dk]; k: [B, Hk, M, Dk]; v: [B, Hk, M, Dv]; Hk divides H.
        scale: factor of the scores.
        mask: bool, broadcastable to [B, H, N, M]; a row may see nothing, which gives out 0 and lse -inf.
        bias: added after the softcap, broadcastable to [B, H, N, M].
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [B, H, N, Dv] in the dtype of q; lse [B, H, N] in float32 (float64 for float64).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    scores = (fold(q, k.shape[1]).to(wide) @ k.to(wide).transpose(-1, -2)).mul_(scale)
    scores = scores.view(batch, heads, queries, keys)
    if softcap is not None:
        scores = scores.div_(softcap).tanh() * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (fold(weights, k.shape[1]) @ v.to(wide)).view(batch, heads, queries, v.shape[-1])
    # Not by the sum alone: the out of a row that sees nothing is NaN if the values are.
    seen = total > 0
    out = torch.where(seen, out / torch.where(seen, total, 1.0), 0.0)
    return out.to(q.dtype), (top + total.log()).squeeze(-1)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """A mask or bias with 1, Hk or H heads, with 1 or H."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], dim=1)
