"""Weights of tokens by how far they stand out from the others, channel by channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.cache import View
from foveate.methods.base import Context


class Moments(NamedTuple):
    """Mean and variance [B, F] of each channel over the tokens so far, and how many these were, [B]."""

    mean: Tensor
    var: Tensor
    count: Tensor


def moments(x: Tensor, real: Tensor) -> Moments:
    """Of the real ones of tokens x [..., n, F], real [..., n]."""
    inside = real.unsqueeze(-1).to(x.dtype)
    count = real.sum(-1)
    size = count.clamp_min(1).unsqueeze(-1)
    mean = (x * inside).sum(-2) / size
    var = ((x - mean.unsqueeze(-2)).square() * inside).sum(-2) / size
    return Moments(mean, var, count)


def outlier_weights(x: Tensor, real: Tensor, reference: Moments) -> Tensor:
    """Weights [..., n] of tokens x [..., n, F] that add up to 1 over the real ones: a token weighs the mean over its
    channels of (x - mean)^2 / (variance + a hundredth of the channels' mean variance). Equal where nobody stands out.

    Source: activation bias of ActQKV (2502.13542), section 3.
    """
    spread = reference.var + reference.var.mean(-1, keepdim=True) / 100
    away = (x - reference.mean.unsqueeze(-2)).square() / spread.unsqueeze(-2).clamp_min(torch.finfo(x.dtype).tiny)
    away = away.mean(-1).masked_fill(~real, 0.0)
    total = away.sum(-1, keepdim=True)
    equal = real / real.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(total > 0, away / total.clamp_min(torch.finfo(x.dtype).tiny), equal)


def joined(past: Moments, new: Moments, cap: int) -> Moments:
    """Running moments: those of the new tokens count in proportion to their number, the past for at most `cap`."""
    weight = new.count / (past.count.clamp_max(cap) + new.count).clamp_min(1)
    weight = weight.unsqueeze(-1).to(past.mean.dtype)
    mean, var = (old + (fresh - old) * weight for old, fresh in zip(past[:2], new[:2], strict=True))
    return Moments(mean, var, past.count + new.count)


def running_weights(x: Tensor, real: Tensor, past: Moments | None, cap: int) -> tuple[Tensor, Moments]:
    """`outlier_weights` of each piece of x [B, pieces, n, F] by the moments of all before it, equal ones until these
    are of more than `cap` tokens; and the moments behind the last piece."""
    weights = real / real.sum(-1, keepdim=True).clamp_min(1)
    past = moments(x[:, 0], torch.zeros_like(real[:, 0])) if past is None else past
    for n in range(x.shape[1]):
        some = outlier_weights(x[:, n], real[:, n], past)
        weights[:, n] = torch.where(past.count[:, None] > cap, some, weights[:, n])
        past = joined(past, moments(x[:, n], real[:, n]), cap)
    return weights, past


def piece_probes(
    raw: Tensor, per: int, view: View, ctx: Context, probe: str, cap: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The probe of each piece, float32 [B, H, pieces, D], and the running moments behind the last one."""
    if ctx.phase == "decode":  # a single query is its own probe
        return raw.float(), {}
    rows = F.pad(raw.float(), (0, 0, 0, -raw.shape[2] % per)).unflatten(2, (-1, per))
    real = torch.arange(rows.shape[2] * per, device=raw.device) < view.fresh[:, None]
    real, flat = real.unflatten(1, (-1, per)), rows.permute(0, 2, 3, 1, 4).flatten(3)  # [B, pieces, per, H D]
    weights, after = real / real.sum(-1, keepdim=True).clamp_min(1), {}
    if probe == "window":
        weights = outlier_weights(flat, real, moments(flat, real))
    elif probe == "running":
        past = Moments(*(ctx.mine[name] for name in Moments._fields)) if "mean" in ctx.mine else None
        weights, seen = running_weights(flat, real, past, cap)
        after = seen._asdict()
    return torch.einsum("bhpnd,bpn->bhpd", rows, weights), after
