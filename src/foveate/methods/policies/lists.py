"""From scores to the lists of a Selection."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import decoding

_ORDERED = (torch.float32, torch.bfloat16, torch.float16)
"""What float32 holds exactly, so that the order is the same."""
_PART = 512
"""Places that are counted one behind the other."""
_ROWS = 1024
"""Fewest rows that keep a GPU busy, one program each."""


def top_lists(scores: Tensor, k: int, limits: Tensor | None = None) -> Tensor:
    """The k best blocks per list, ascending, int32.

    Args:
        scores: [..., blocks]; -inf is never chosen, +inf always is (as far as k reaches).
        k: list width; fewer blocks make shorter lists.
        limits: int [...], so many of each list at most; None: all k.

    Returns:
        [..., min(k, blocks)] with -1 behind the end. Ties go to earlier blocks.
    """
    return counted_lists(scores, k, limits)[0]


def counted_lists(scores: Tensor, k: int, limits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`top_lists`, and the entries of each list, int32 [...], where they come for nothing."""
    blocks = scores.shape[-1]
    k = min(k, blocks)
    if k > 0 and scores.dtype in _ORDERED and not scores.requires_grad and decoding.serves(scores)[0]:
        return decoding.best(scores.float(), k, limits)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    none = scores.gather(-1, order) == -torch.inf
    if limits is not None:
        none = none | (torch.arange(k, device=scores.device) >= limits.unsqueeze(-1))
    return _packed(order.masked_fill(none, blocks).sort(dim=-1).values, blocks), None


def mask_lists(mask: Tensor) -> Tensor:
    """The set blocks of a mask [..., blocks] as lists [..., most set], ascending, int32, -1 behind the end."""
    return set_lists(mask, max(1, int(mask.sum(-1).max())))


def set_lists(mask: Tensor, width: int) -> Tensor:
    """`mask_lists` in lists [..., width] that no row exceeds: nothing is ordered, and nobody asks how long they are."""
    if _many(mask):
        return _compact(None, mask, width)
    number = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    return close_gaps(number, mask, width)


def close_gaps(numbers: Tensor, kept: Tensor | None = None, width: int | None = None) -> Tensor:
    """Those of numbers [..., n] that are kept, bool [..., n] (None: all but -1), in their order: int32 [..., width],
    -1 behind the end. No row keeps more (None: n)."""
    width = numbers.shape[-1] if width is None else width
    if _many(numbers):
        return _compact(numbers, kept, width)
    kept = numbers >= 0 if kept is None else kept
    place = torch.where(kept, _running(kept) - 1, width).long()  # what is not kept goes behind the end
    lists = torch.full((*kept.shape[:-1], width + 1), -1, dtype=torch.int32, device=kept.device)
    return lists.scatter_(-1, place, numbers.to(torch.int32))[..., :width].contiguous()  # some are kept for long


def _many(x: Tensor) -> bool:
    """Whether x [..., n] has rows enough for a kernel that goes through each from its first place to its last."""
    return x.numel() >= _ROWS * max(1, x.shape[-1]) and decoding.serves(x)[0]


def _compact(numbers: Tensor | None, kept: Tensor | None, width: int) -> Tensor:
    lists: Tensor = import_module("foveate.attention.triton.compact").compact(numbers, kept, width)
    return lists


def _running(mask: Tensor) -> Tensor:
    """How many are set up to each place of mask [..., n], int32. A long row is summed in parts, side by side: of few
    rows, a GPU would add up place by place."""
    n = mask.shape[-1]
    if n <= _PART:
        return mask.cumsum(-1, dtype=torch.int32)
    parts = F.pad(mask, (0, -n % _PART)).unflatten(-1, (-1, _PART)).cumsum(-1, dtype=torch.int32)
    before = F.pad(parts[..., :-1, -1].cumsum(-1, dtype=torch.int32), (1, 0))
    return (parts + before.unsqueeze(-1)).flatten(-2)[..., :n]


def _packed(order: Tensor, blocks: int) -> Tensor:
    return torch.where(order == blocks, -1, order).to(torch.int32)


def coverage_count(mass: Tensor, gamma: float) -> Tensor:
    """How many of the largest entries of mass [..., n] it takes to pass the share gamma of the whole: int [...]."""
    ordered = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    return (ordered <= gamma).sum(-1) + 1


def coverage_mask(mass: Tensor, gamma: float) -> Tensor:
    """The largest entries of mass [..., n] whose running sum stays within gamma: bool [..., n]."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) <= gamma)
