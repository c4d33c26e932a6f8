"""The threshold that keeps an exact share of many numbers, found without having them all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.errors import BadArgument

_BITS = 21  # the 63 bits of a positive float64 in three passes


@dataclass(frozen=True)
class Threshold:
    """Keeps numbers above `value`, and of those equal to it the first ones.

    Args:
        ties: by name, how many equal to the value are kept.
    """

    value: float
    ties: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> Callable[[Tensor], Tensor]:
        """The mask of the numbers of this name, which are given part by part, first to last."""
        left = self.ties.get(name, 0)

        def mask(numbers: Tensor) -> Tensor:
            nonlocal left
            keep = numbers > self.value
            if left:
                equal = (numbers == self.value) & (numbers.eq(self.value).cumsum(0) <= left)
                left -= int(equal.sum())
                keep |= equal
            return keep

        return mask


def solve(numbers: Callable[[], Iterator[tuple[str, Tensor]]], share: float) -> Threshold:
    """The threshold that keeps exactly round(share * n) of the n numbers, the largest.

    Positive float64 numbers are ordered as their bits are, so the bits of the threshold are found 21 at a time, from
    the top, by counting.

    Args:
        numbers: called 4 times and yields, always the same, names and parts [m], float64, none below 0. The parts of a
            name follow each other.
    """
    if not 0 <= share <= 1:
        raise BadArgument("share", share, "give a share between 0 and 1")
    prefix, left = 0, -1
    for shift in (2 * _BITS, _BITS, 0):
        counts = torch.zeros(1 << _BITS, dtype=torch.int64)
        for _, part in numbers():
            bits = part.abs().view(torch.int64)  # -0.0 is 0.0
            inside = bits if shift == 2 * _BITS else bits[bits >> (shift + _BITS) == prefix]
            counts.index_add_(0, (inside >> shift) & ((1 << _BITS) - 1), torch.ones_like(inside))
        if left < 0:
            left = round(share * int(counts.sum()))
            if left == 0:
                return Threshold(float("inf"))
        above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, left))  # the first, from the top, with so many at or above it
        digit = (1 << _BITS) - 1 - place
        left -= int(above[place]) - int(counts[digit])
        prefix = (prefix << _BITS) | digit
    value = float(torch.tensor(prefix, dtype=torch.int64).view(torch.float64))
    ties: dict[str, int] = {}
    for name, part in numbers():
        if left == 0:
            break
        taken = min(left, int((part == value).sum()))
        ties[name] = ties.get(name, 0) + taken
        left -= taken
    return Threshold(value, ties)
