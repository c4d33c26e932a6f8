"""A list for every query, made of scores for all it sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.cache import View
from foveate.methods.policies.lists import top_lists


def seen_lists(view: View, q: Tensor, k: int, score: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """For each query the k best of the slots it may see: int32 [B, h, N, min(k, C)], for q_block=1.

    Args:
        q: [B, H, N, D], the newest tokens of the view.
        score: (which queries, bool [B, Hs, n, C] of what they see) -> float [B, h, n, C], where h is Hs or H. Called
            for a few queries at a time; what it says of slots that are not seen does not matter.
    """
    batch, heads, queries, _ = q.shape
    slots = view.capacity
    lengths = view.lengths.unsqueeze(-1)
    own = lengths - view.fresh.view(-1, 1, 1) + torch.arange(queries, device=q.device)
    own = torch.minimum(own, lengths - 1).unsqueeze(-1)
    slot = torch.arange(slots, device=q.device)
    step = max(1, at_once(q.device) // max(1, batch * heads * slots))
    lists = []
    for first in range(0, queries, step):
        some = slice(first, min(first + step, queries))
        seen = slot <= own[:, :, some]
        scores = score(some, seen)
        hidden = ~seen if scores.shape[1] == seen.shape[1] else ~seen.repeat_interleave(heads // seen.shape[1], 1)
        lists.append(top_lists(scores.masked_fill(hidden, -torch.inf), k))
    return torch.cat(lists, dim=2)
