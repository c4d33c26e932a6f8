"""The largest of many numbers, and links by their weights: without full orders, and without fresh memory each time."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def on_processor(x: Tensor) -> bool:
    """Whether x lies where numbers are worked on one after the other, in caches, and not on a device of many units."""
    return x.device.type == "cpu"


class Best:
    """Finds the columns of the largest numbers in rows of scores.

    It keeps its memory between calls: to be given fresh memory takes a processor longer than what is done in it here.
    """

    def __init__(self) -> None:
        self._parts: dict[str, np.ndarray] = {}

    def scores(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for scores, float32, which the next call gives away again."""
        if not on_processor(like):
            return torch.empty(shape, dtype=torch.float32, device=like.device)
        return torch.from_numpy(self.room("scores", shape, np.float32))

    def room(self, name: str, shape: tuple[int, ...], dtype: type, fill: float | None = None) -> np.ndarray:
        """Room for numbers, which the next call with that name gives away again."""
        size = math.prod(shape)
        if name not in self._parts or self._parts[name].size < size:
            self._parts[name] = np.empty(size, dtype)
        part = self._parts[name][:size].reshape(shape)
        if fill is not None:
            part.fill(fill)
        return part

    def columns(self, score: Tensor, k: int) -> Tensor:
        """The columns of the k largest numbers in each row of score [n, A], float32: int64 [n, k], in no order."""
        rows, count = score.shape
        if not on_processor(score) or not 0 < k < count:
            return score.topk(k, dim=1, sorted=False).indices
        # The k-th number is found, not where it is: that takes a fraction of the time.
        numbers = score.numpy()
        above, bound = self.room("above", (rows, count), np.bool_), self._bound(numbers, k)
        found = np.flatnonzero(np.greater_equal(numbers, bound[:, None], out=above))
        if len(found) != rows * k:
            found = self._best_of(found, numbers, k)
        return torch.from_numpy(found).view(rows, k) - torch.arange(rows)[:, None] * count

    def _bound(self, numbers: np.ndarray, k: int) -> np.ndarray:
        """What the k-th largest number of each row is or exceeds."""
        rows, count = numbers.shape
        each = min(16, count // (3 * k))
        if each > 1:  # the k-th of the largest ones of several numbers
            some = self.room("some", (rows, count // each), np.float32)
            np.maximum.reduce(numbers[:, : some.shape[1] * each].reshape(rows, each, -1), axis=1, out=some)
        else:
            some = self.room("some", (rows, count), np.float32)
            some[:] = numbers
        some.partition(some.shape[1] - k, axis=1)
        return some[:, -k].copy()

    def _best_of(self, found: np.ndarray, numbers: np.ndarray, k: int) -> np.ndarray:
        """The k largest of each row among those found there, of equal ones the first; `found` counts over all rows."""
        rows, count = numbers.shape
        ends = np.searchsorted(found, np.arange(rows + 1) * count)
        row, value = np.repeat(np.arange(rows), np.diff(ends)), numbers.reshape(-1)[found]
        some = np.full((rows, int(np.diff(ends).max())), -np.inf, dtype=np.float32)
        some[row, np.arange(len(found)) - ends[row]] = value
        some.partition(some.shape[1] - k, axis=1)
        bound = some[:, -k][row]
        kept = value > bound
        equal = np.flatnonzero(value == bound)
        left, again = k - np.bincount(row[kept], minlength=rows), row[equal]
        kept[equal] = np.arange(len(equal)) - np.searchsorted(again, again) < left[again]
        return found[kept]


def in_order(x: Tensor) -> Tensor:
    """Whole numbers [n], ascending."""
    return torch.from_numpy(np.sort(x.numpy())) if on_processor(x) else x.sort().values


def counted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each of the numbers [n] once, ascending, and how often it came."""
    x = in_order(x)
    first = F.pad(x[1:] != x[:-1], (1, 0), value=True)[: len(x)].nonzero().squeeze(1)
    return x[first], torch.diff(first, append=first.new_tensor([len(x)]))


def ranked(source: Tensor, target: Tensor, weight: Tensor, most: tuple[int, int, int], width: int) -> Tensor:
    """Links source -> target as a table [sources, width] of targets, lightest first, then by number; -1 behind the end.

    Args:
        source, target, weight: int64 [n], 0 or more, of which no source or target reaches the first or second of
            `most`, and no weight exceeds the third.
    """
    sources, targets, heaviest = most
    bits, low = targets.bit_length(), targets.bit_length() + heaviest.bit_length()
    assert sources.bit_length() + low < 63, "a link is one number"
    order = in_order((source << low) | (weight << bits) | target)
    source, target = order >> low, order & ((1 << bits) - 1)
    first = torch.searchsorted(source, torch.arange(sources, device=source.device))
    place = (torch.arange(len(source), device=source.device) - first[source]).clamp_max_(width)
    table = torch.full((sources * (width + 1),), -1, dtype=torch.long, device=source.device)
    return table.scatter_(0, source * (width + 1) + place, target).view(sources, -1)[:, :width]
