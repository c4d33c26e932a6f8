"""Attention that first looks at rough keys and leaves out the values of the least likely ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foveate.methods.base import Context

ROWS = 64
"""Queries whose probabilities are looked at together."""


def pruned_attention(
    q: Tensor,
    looks: Sequence[Tensor],
    v: Tensor,
    seen: Callable[[Tensor], Tensor],
    ctx: Context,
    *,
    values: float = 1.0,
    threshold: float = 0.0,
) -> Tensor:
    """Softmax attention whose rows may look at keys twice and read some values only; nothing is rescaled for that.

    Args:
        q: [B, H, N, D].
        looks: the keys as they are looked at, rougher first, each [B, Hs, C, D].
        v: [B, Hs, C, Dv].
        seen: (indices of queries) -> bool [B, Hs, n, C], what these may read.
        values: share of the values that each head and row reads, those of the largest probabilities.
        threshold: a head and row takes the next look if none of its probabilities reaches this.

    Returns:
        [B, H, N, Dv] in the dtype of q.
    """
    grouped, outs = q.float().unflatten(1, (v.shape[1], -1)), []
    for some in torch.arange(q.shape[2], device=q.device).split(ROWS):
        mask, p = seen(some), None
        for k in looks:
            logits = grouped[:, :, :, some] @ k.float().unsqueeze(2).mT * ctx.scale
            if ctx.softcap is not None:
                logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
            look = logits.masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(-1)
            p = look if p is None else torch.where(p.amax(-1, keepdim=True) < threshold, look, p)
        assert p is not None
        rank = p.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        read = (values * mask.sum(-1, keepdim=True) - 1e-6).ceil().unsqueeze(2)
        outs.append((p * (rank < read)) @ v.float().unsqueeze(2))
    return torch.cat(outs, dim=3).flatten(1, 2).to(q.dtype)
