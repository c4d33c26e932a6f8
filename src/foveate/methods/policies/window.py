"""Scores by the attention of the prompt's last queries (the observation window)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.cache import View
from foveate.methods.base import Context


def window_scores(
    view: View, ctx: Context, *, kernel: int, pool: Literal["avg", "max"], reduce: Literal["mean", "max", "sum"]
) -> Tensor:
    """Importance of each held token [B, Hs, C]: attention of the window's queries, summed, pooled along the keys and
    reduced over the query heads of a group. The window's own slots are +inf.

    The softmax is in float32 and causal inside the window; rows of any length are served, each from its own end.
    Source: SnapKV (2404.14469), section 3.
    """
    q, real = ctx.window, ctx.window_valid
    assert q is not None and real is not None, "this scorer needs Needs(window=...)"
    k, lengths = view.k(), view.lengths
    batch, heads, width, _ = q.shape
    stores = k.shape[1]
    grouped = q.view(batch, stores, heads // stores, width, -1).float()
    logits = torch.einsum("bsgwd,bscd->bsgwc", grouped, k.float()) * ctx.scale
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    slot = torch.arange(k.shape[2], device=k.device)
    own = lengths[:, :, None] - width + torch.arange(width, device=k.device)
    seen = slot <= own[..., None]
    logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
    rows = real[:, None, None, :, None]
    mass = torch.where(rows, logits.softmax(-1), 0.0).nan_to_num(0.0).sum(3)
    inside = slot >= (lengths - width)[..., None]
    mass = mass.masked_fill(inside[:, :, None], 0.0).flatten(0, 1)
    if kernel > 1:
        smooth = F.avg_pool1d if pool == "avg" else F.max_pool1d
        mass = smooth(mass, kernel, stride=1, padding=kernel // 2)
    mass = mass.view(batch, stores, heads // stores, -1)
    scores = {"mean": mass.mean(2), "sum": mass.sum(2), "max": mass.amax(2)}[reduce]
    return scores.masked_fill(inside, torch.inf)
