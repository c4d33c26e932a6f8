"""Which past blocks a query reads, where each block is known by one feature: LongHeads' and landmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention import turned
from foveate.attention.at_once import at_once
from foveate.methods.context import Context
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.positions import at_position


class Limits(NamedTuple):
    """Which blocks queries choose from.

    Args:
        own: positions of the queries, int64 [B, N].
        high: blocks from here on are not read, int64 [B, N].
        sure: block 0 and blocks from here on, up to `high`, are read in any case, int64 [B, N]; None: nobody is.
    """

    own: Tensor
    high: Tensor
    sure: Tensor | None = None


def best_features(
    q: Tensor, features: Tensor, limits: Limits, k: int, ctx: Context, *, place: int, scale: float = 1.0,
    softcap: float | None = None, scored: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The k blocks whose features have the largest products with each query, which stands at `place` for that.

    Args:
        q: [B, H, N, D], rotated.
        features: float32 [B, h, n, D], unrotated; H / h query heads share one.
        scored: give the scores of those that are chosen, too.

    Returns:
        Lists, ascending, int32 [B, H, N, min(k, n)], -1 behind the end; scores, float32 of the same shape, -inf there.
    """
    (batch, heads, queries, _), blocks = q.shape, features.shape[2]
    lists, won = [], []
    step = max(1, at_once(q.device) // (batch * heads * max(1, blocks)))
    for first in range(0, queries, step):
        some = slice(first, first + step)
        own, high, sure = (None if x is None else x[:, some] for x in limits)
        assert own is not None and high is not None
        if queries == 1 and blocks and turned.serves(q, ctx.rope.angles()):
            how = {"place": place, "scale": scale, "softcap": softcap}
            least = None if sure is None else sure[:, 0]
            scores = turned.feature_scores(q, features, own[:, 0], high[:, 0], least, ctx.rope.angles(), **how)
        else:
            rows = at_position(q[:, :, some], own, place, ctx.rope)
            if blocks and turned.multiplies(rows):
                scores = turned.feature_products(rows, features, high, sure, scale=scale, softcap=softcap)
            else:
                scores = _products(rows, features, high, sure, scale, softcap)
        lists.append(top_lists(scores, k))
        if scored:
            won.append(scores.gather(-1, lists[-1].long().clamp_min(0)).masked_fill(lists[-1] < 0, -torch.inf))
    return lists[0] if len(lists) == 1 else torch.cat(lists, dim=2), torch.cat(won, dim=2) if won else None


def _products(
    q: Tensor, features: Tensor, high: Tensor, sure: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """What `turned.feature_products` gives."""
    (batch, heads, queries, dim), blocks = q.shape, features.shape[2]
    number = torch.arange(blocks, device=q.device)
    rows = q.float().reshape(batch, features.shape[1], -1, dim)
    scores = (rows @ features.transpose(-1, -2)).view(batch, heads, queries, blocks) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if sure is not None:
        scores = scores.masked_fill((number == 0) | (number >= sure[:, None, :, None]), torch.inf)
    return scores.masked_fill(number >= high[:, None, :, None], -torch.inf)
