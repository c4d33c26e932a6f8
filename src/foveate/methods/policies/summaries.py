"""What blocks of keys are summarised by, and what that says of their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import decoding
from foveate.cache import View
from foveate.cache.summaries import minmax

__all__ = ["bound_scores", "minmax", "page_scores"]


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


def page_scores(q: Tensor, view: View, name: str, page: int, *, group: bool) -> Tensor:
    """How much any key of each page could matter to each query, by the bounds kept under `name`.

    Args:
        q: [B, H, N, D].
        page: slots per page.
        group: one score per kv head, the largest of its query heads.

    Returns:
        [B, H or Hs, N, pages] float32; +inf for the page that holds the query's own token, -inf behind it.
    """
    summary = view.blocks(name)
    batch, heads, queries, _ = q.shape
    stores, pages = summary.shape[1:3]
    if queries == 1 and summary.dtype == q.dtype and decoding.serves(q)[0]:
        return decoding.page_bounds(q, summary.flatten(0, 1), view.lengths, page, group=group).unsqueeze(2)
    bound = bound_scores(q, summary)
    if group:
        bound = bound.view(batch, stores, heads // stores, queries, pages).amax(2)
    own = (view.lengths - view.fresh[:, None]).unsqueeze(-1) + torch.arange(queries, device=q.device)
    newest = (own // page).repeat_interleave(bound.shape[1] // stores, dim=1).unsqueeze(-1)
    number = torch.arange(pages, device=q.device)
    return bound.masked_fill(number == newest, torch.inf).masked_fill(number > newest, -torch.inf)
