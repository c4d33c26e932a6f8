"""Scores by the attention of the prompt's last queries (the observation window)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context


def check_window(window: int, kernel: int, pool: str = "avg") -> None:
    """Raise BadArgument if an observation window or its pooling makes no sense."""
    if window < 1:
        raise BadArgument("window", window, "give at least 1 query")
    if kernel < 1 or kernel % 2 == 0:
        raise BadArgument("kernel", kernel, "give an odd width, 1 for no pooling")
    if pool not in ("avg", "max"):
        raise BadArgument("pool", pool, 'give "avg" or "max"')


def window_mass(view: View, ctx: Context, voters: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """How much the window's queries attend to each held token: float32 [B, H, C], summed over the queries; and which
    slots the window itself stands in, bool [B, Hs, C].

    The softmax is in float32 and causal inside the window; rows of any length are served, each from its own end.

    Args:
        voters: the query heads to look at, in the order of the result; None: all.
    """
    q, real = ctx.window, ctx.window_valid
    assert q is not None and real is not None, "this scorer needs Needs(window=...)"
    k, lengths = view.k(), view.lengths
    heads, width = q.shape[1:3]
    group = heads // k.shape[1]
    slot = torch.arange(k.shape[2], device=k.device)
    own = lengths[:, :, None] - width + torch.arange(width, device=k.device)
    seen = slot <= own[..., None]
    if voters is None:
        grouped = q.unflatten(1, (-1, group)).float()
        logits = torch.einsum("bsgwd,bscd->bsgwc", grouped, k.float()) * ctx.scale
        seen = seen[:, :, None]
    else:
        stores = torch.tensor([head // group for head in voters], device=k.device)
        logits = q[:, list(voters)].float() @ k[:, stores].float().transpose(-1, -2) * ctx.scale
        seen = seen[:, stores]
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    logits = logits.masked_fill(~seen, -torch.inf)
    rows = real.view(real.shape[0], *[1] * (logits.dim() - 3), width, 1)
    mass = torch.where(rows, logits.softmax(-1), 0.0).nan_to_num(0.0).sum(-2)
    inside = slot >= (lengths - width)[..., None]
    return mass.view(mass.shape[0], -1, mass.shape[-1]), inside


def mean_attention(view: View, ctx: Context) -> Tensor:
    """Mean attention of the window's queries, and of a group's heads, to each token: [B, Hs, C]."""
    mass, inside = window_mass(view, ctx)
    assert ctx.window_valid is not None
    queries = ctx.window_valid.sum(1).clamp_min(1).view(-1, 1, 1)
    return mass.unflatten(1, (inside.shape[1], -1)).mean(2) / queries


def pooled(mass: Tensor, kernel: int, pool: Literal["avg", "max"] = "avg") -> Tensor:
    """Mass [B, n, C] smoothed along the keys; beyond both ends there is nothing."""
    if kernel == 1:
        return mass
    smooth = F.avg_pool1d if pool == "avg" else F.max_pool1d
    return smooth(mass, kernel, stride=1, padding=kernel // 2)


def window_scores(
    view: View, ctx: Context, *, kernel: int, pool: Literal["avg", "max"], reduce: Literal["mean", "max", "sum"]
) -> Tensor:
    """Importance of each held token [B, Hs, C]: attention of the window's queries, summed, pooled along the keys and
    reduced over the query heads of a group. The window's own slots are +inf.

    Source: SnapKV (2404.14469), section 3.
    """
    mass, inside = window_mass(view, ctx)
    stores = inside.shape[1]
    mass = mass.unflatten(1, (stores, -1)).masked_fill(inside[:, :, None], 0.0)
    mass = pooled(mass.flatten(1, 2), kernel, pool).unflatten(1, (stores, -1))
    scores = {"mean": mass.mean(2), "sum": mass.sum(2), "max": mass.amax(2)}[reduce]
    return scores.masked_fill(inside, torch.inf)
