"""Attention that listed tokens get from the queries that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import Selection
from foveate.cache import View
from foveate.methods.base import Context


def listed_mass(q: Tensor, view: View, part: Selection, lse: Tensor, ctx: Context, width: int) -> Tensor:
    """The probabilities that each slot gets from this forward's real queries, summed over queries and heads: float32
    [B, width], at least a number for each slot. A second pass over the listed keys alone, one list at a time.

    Args:
        q: [B, H, N, D], the newest tokens of a view whose heads hold the same tokens.
        part: single slots, one list for all heads and each `q_block` queries.
        lse: [B, H, N], what the scores are normalised by.
    """
    assert part.lists is not None and part.q_block is not None and part.k_block == 1, "lists of slots"
    per, keys = part.q_block, view.k()
    group, dim = q.shape[1] // keys.shape[1], keys.shape[-1]
    first = view.lengths[:, :1].long() - view.fresh[:, None]
    mass = torch.zeros(len(q), width, dtype=torch.float32, device=q.device)
    for number in range(part.lists.shape[2]):
        listed = part.lists[:, 0, number].long()
        slots = listed.clamp_min(0)
        some = slice(number * per, (number + 1) * per)
        rows, total = q[:, :, some].float(), lse[:, :, some].float()
        own = first + torch.arange(some.start, some.start + rows.shape[2], device=q.device)
        near = keys.gather(2, slots[:, None, :, None].expand(-1, keys.shape[1], -1, dim)).float()
        scores = rows.unflatten(1, (-1, group)).flatten(2, 3) @ near.transpose(-1, -2) * ctx.scale
        if ctx.softcap is not None:
            scores = torch.tanh(scores / ctx.softcap) * ctx.softcap
        scores = scores.unflatten(2, (group, -1)).flatten(1, 2)  # [B, H, n, K]
        read = (slots.unsqueeze(1) <= own.unsqueeze(-1)) & (listed >= 0).unsqueeze(1)
        read = (read & (own < view.lengths[:, :1]).unsqueeze(-1)).unsqueeze(1)
        weights = (scores - total.unsqueeze(-1)).exp()
        mass.scatter_add_(1, slots, weights.masked_fill(~read, 0.0).sum((1, 2)))
    return mass
