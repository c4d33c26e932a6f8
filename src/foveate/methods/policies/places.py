"""Lists that outlive a step: tokens move between slots, so what is remembered are their positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from foveate.cache import View


def ascending(lists: Tensor) -> Tensor:
    """Lists [..., K] with -1 anywhere, sorted, -1 behind the end."""
    last = torch.iinfo(lists.dtype).max
    order = lists.masked_fill(lists < 0, last).sort(dim=-1).values
    return order.masked_fill(order == last, -1)


@lru_cache(maxsize=256)
def on_device(numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A few whole numbers. They are brought to the device once: a step that is recorded takes nothing from the host."""
    return torch.tensor(numbers, device=device, dtype=dtype)


def flagged(chosen: Sequence[int], view: View) -> Tensor:
    """Which store heads are among the chosen, bool [1, Hs, 1, 1]."""
    flags = tuple(int(head in chosen) for head in range(view.lengths.shape[1]))
    return on_device(flags, view.lengths.device).view(1, -1, 1, 1).bool()


def own_slots(q: Tensor, view: View) -> Tensor:
    """Slot of the own token of each query of q [B, H, N, D], int32 [B, Hs, N]; behind the end for queries that are
    padding."""
    first = view.lengths - view.fresh[:, None]
    each = torch.arange(q.shape[2], dtype=first.dtype, device=q.device)
    return torch.minimum(first.unsqueeze(-1) + each, view.lengths.unsqueeze(-1) - 1)


def slots_of(positions: Tensor, view: View) -> Tensor:
    """Where the tokens at these logical positions are held: slots for positions, both [B, Hs, K] with -1 for none.

    Tokens move between slots when others are evicted, so a list that outlives its step is kept in positions.
    """
    if view.aligned:
        return positions
    nowhere = view.reach
    held = view.positions.long().masked_fill(~view.valid(), nowhere)
    slots = torch.arange(held.shape[-1], device=held.device).expand(held.shape)
    where = held.new_full((*held.shape[:2], nowhere + 1), -1).scatter(2, held, slots)
    where[..., nowhere] = -1
    return where.gather(2, positions.long().masked_fill(positions < 0, nowhere)).to(positions.dtype)


def positions_of(slots: Tensor, view: View) -> Tensor:
    """Logical positions of the tokens in these slots, both [B, Hs, K] with -1 for none."""
    if view.aligned:
        return slots
    found = view.positions.gather(2, slots.long().clamp_min(0))
    return found.masked_fill(slots < 0, -1).to(slots.dtype)
