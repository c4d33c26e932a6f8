"""What pages of tokens weigh by the attention that was paid to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import decoding
from foveate.cache import View


def page_weights(probs: Tensor, view: View, page: int, recent: int) -> Tensor:
    """What the pages weigh for each query [B, N, pages]: the sum over tokens of the largest probability of all heads,
    +inf the `recent` newest ones, -inf those to come.

    Args:
        probs: [B, H, N, slots].
        page: tokens per page.

    Source: DELTA (2510.09883), section 3.
    """
    power = page & (page - 1) == 0
    if probs.shape[2] == 1 and power and not probs.requires_grad and decoding.serves(probs)[0]:
        return decoding.page_weights(probs, view.lengths[:, 0], page, recent).unsqueeze(1)
    queries, slots = probs.shape[2:]
    count = -(-slots // page)
    token = F.pad(probs.amax(1), (0, count * page - slots))
    mass = token.unflatten(-1, (count, page)).sum(-1)
    own = view.lengths[:, :1] - view.fresh[:, None] + torch.arange(queries, device=probs.device)
    age = (own // page).unsqueeze(-1) - torch.arange(count, device=probs.device)
    return mass.masked_fill(age < recent, torch.inf).masked_fill(age < 0, -torch.inf)
