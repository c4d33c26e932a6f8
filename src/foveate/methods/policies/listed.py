"""Reading by lists and listing what was looked at, by kernels, in steps that are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import Partial
from foveate.cache import UNBOUNDED, View
from foveate.methods.base import Context
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.places import on_device


@dataclass(frozen=True)
class Listing:
    """What a layer lists of what its heads looked at.

    Args:
        heads: which store heads make lists.
        k: length of a list.
        recent: so many of the newest tokens are on every list.
        mean: the query heads of a group agree on the mean of their probabilities, else on the largest.
    """

    heads: tuple[int, ...]
    k: int
    recent: int
    mean: bool


def read_and_list(
    q: Tensor, view: View, ctx: Context, looking: Sequence[int], lists: Tensor | None, made: Listing
) -> tuple[Partial, Tensor | None] | None:
    """Attention of q [B, H, 1, D] in one read: of the `looking` store heads over everything, of the others over their
    lists; and the lists behind it. None where no kernels can, or where there is nothing for them: every head reads
    everything, and lists nothing.

    Args:
        lists: int32 [B, Hs, 1, K], slots in any order; those of heads that make new ones are overwritten. None: all
            heads read everything.
    """
    held = view.held
    if held is None or q.shape[2] != 1:
        return None
    batch, heads = view.lengths.shape
    ends = tuple(UNBOUNDED if head in looking else 0 for head in range(heads))
    whole = lists is None or min(ends) > 0
    if whole and not made.heads:
        return None
    if whole or lists is None:
        read = held.scored(q, view.capacity, ctx.scale, ctx.softcap)
    else:
        counts = on_device((lists.shape[-1],), q.device, torch.int32).expand(batch, heads)
        windows, width, scored = on_device(ends, q.device, torch.int32), view.capacity, bool(made.heads)
        read = held.listed(q, lists[:, :, 0], counts, windows, width, ctx.scale, ctx.softcap, scored=scored)
    if made.heads:
        which = on_device(made.heads, q.device, torch.int32)
        best = top_lists(held.token_weights(read, which, made.recent, mean=made.mean), made.k)
        if len(made.heads) == heads:
            lists = best.unsqueeze(2)
        else:
            lists = best.new_full((batch, heads, 1, best.shape[-1]), -1) if lists is None else lists
            lists[:, :, 0].index_copy_(1, on_device(made.heads, q.device), best)
    return Partial(read.out, read.lse), lists
