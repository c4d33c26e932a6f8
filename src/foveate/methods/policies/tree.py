"""Searching blocks of keys by halves instead of one by one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from foveate.attention import decoding
from foveate.methods.policies.lists import close_gaps, top_lists


def descend(
    low: Tensor, high: Tensor, slots: int, score: Callable[[Tensor], Tensor], most: int | None = None
) -> Tensor:
    """About the best `slots` blocks of each range [low, high): the range is cut into groups that halve at every round,
    and of all halves those stay whose first blocks score best. Ranges of up to `slots` blocks are taken whole.

    Args:
        low, high: int64 [...].
        score: blocks [..., 2 slots] -> how good they are, float of the same shape. The numbers of empty halves may be
            `high`; their scores are not looked at.
        most: no range is longer; what the host knows of them. None: it looks.

    Returns:
        int64 [..., slots], each block once, ascending, with -1 between them. Ties go to earlier halves.

    Source: HiP Attention (2406.09827), section 3: groups differ by at most one block, so none is overlooked.
    """
    count = (high - low).clamp_min(0).unsqueeze(-1)
    edge = low.unsqueeze(-1) + count * torch.arange(slots + 1, device=low.device) // slots
    start, size = edge[..., :-1], edge.diff(dim=-1)
    largest = -(-(int(count.max()) if most is None else most) // slots)
    while largest > 1:
        left = size // 2
        start = torch.stack([start, start + left], dim=-1).flatten(-2)
        size = torch.stack([left, size - left], dim=-1).flatten(-2)
        best = top_lists(score(start).masked_fill(size == 0, -torch.inf), slots).long()
        there = best.clamp_min(0)
        start, size = start.gather(-1, there), size.gather(-1, there).masked_fill(best < 0, 0)
        largest = -(-largest // 2)
    return torch.where(size > 0, start, -1)


def descend_keys(q: Tensor, k: Tensor, first: int, high: Tensor, slots: int, most: int, page: int) -> Tensor | None:
    """`descend` for sets of queries q [B, H, T, R, D], blocks of `page` keys k [B, Hs, C, D] and the largest logit that
    a query of the set has for them, by kernels: from block `first` to high [B, H or Hs, T] it gives int32
    [B, H, T, slots]. None where there are none."""
    if q.dtype != k.dtype or k.stride(3) != 1 or not decoding.serves(q)[0]:
        return None
    low = torch.full_like(high, first)
    found: Tensor = import_module("foveate.attention.triton.tree").best_blocks(q, k, low, high, slots, most, page)
    return found


def descend_lists(
    q: Tensor, k: Tensor, own: Tensor, first: int, window: int, slots: int, longest: int, page: int
) -> tuple[Tensor, Tensor] | None:
    """For single queries q [B, H, 1, D] in slots `own` of k [B, Hs, C, D], lists of the first blocks, about the best
    `slots` of those between and the newest, with their counts, by kernels; see `search_lists`. None where there are
    none."""
    if q.dtype != k.dtype or k.stride(3) != 1 or not decoding.serves(q)[0]:
        return None
    search = import_module("foveate.attention.triton.search_lists").search_lists
    made: tuple[Tensor, Tensor] = search(q, k, own.int(), first, window, slots, longest, page)
    return made


def with_ends(found: Tensor, begin: Tensor, last: Tensor, first: int, longest: int, page: int) -> Tensor:
    """Lists of what was found [B, H, n, K], the first blocks in front of the window, and the window from block `begin`
    to that of slot `last` [B, Hs, n], `longest` slots at most: int32 [B, H, n, K'], ascending, -1 behind the end."""
    group = found.shape[1] // begin.shape[1]
    begin, last = (x.int().repeat_interleave(group, dim=1).unsqueeze(-1) for x in (begin, last))
    sinks = torch.arange(first, device=found.device, dtype=torch.int32).expand(*found.shape[:3], -1)
    window = begin + torch.arange(-(-longest // page) + 1, device=found.device, dtype=torch.int32)
    sinks = torch.where(sinks < begin, sinks, -1)
    window = torch.where((window * page <= last) & (last >= 0), window, -1)
    return close_gaps(torch.cat([sinks, found, window], dim=-1))
