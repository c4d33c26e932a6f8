"""The weights of latent attention as DeepSeek-V3 lays them out: rotated pairs as neighbours, norms on every latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import Refused

SMALL = 2.0**-30
"""The share of a latent's mean square that its constants leave to the latent itself: less than float32 can tell."""


@dataclass(frozen=True)
class Constants:
    """Extra latent dims with constant values, which make an RMS norm a multiplication by a power of two.

    With biases `value * 2^k` on them, `dim` dims in all and the sum of the squared values equal to `dim`, the mean
    square is 4^k, beside which the latent is too small to count: the norm divides by 2^k exactly, in bfloat16 as in
    float32, and a gain of 2^k undoes it.

    Args:
        dim: latent dims in all, constants included.
        values: whole numbers whose squares add up to `dim`; they are the last dims.
    """

    dim: int
    values: tuple[int, ...]

    @property
    def unit(self) -> int | None:
        """Which of the values is a power of two, so that a gain turns it into exactly 1; None: no one."""
        return next((i for i, value in enumerate(self.values) if value & (value - 1) == 0), None)


def constants(rank: int, *, unit: bool = False, dim: int | None = None) -> Constants:
    """The fewest constants for a latent of `rank` dims; by Lagrange's theorem of four squares there are at most four.

    Args:
        unit: one of them must be a power of two; then there are at most five.
        dim: dims in all, where that is given.

    Raises:
        Refused: `dim` leaves too little room.
    """
    for total in [dim] if dim is not None else range(rank + 1, rank + 6):
        for count in range(1, min(total - rank, 5) + 1):
            for values in _squares(total, count):
                found = Constants(total, values)
                if not unit or found.unit is not None:
                    return found
    raise Refused(f"a latent of {rank} dims needs up to five more to pass DeepSeek's norm unchanged; {dim} are too few")


def _squares(total: int, count: int) -> list[tuple[int, ...]]:
    """Ways to write `total` as a sum of `count` positive squares, the largest last."""
    if count == 1:
        root = math.isqrt(total)
        return [(root,)] if root and root * root == total else []
    ways = []
    for first in combinations_with_replacement(range(1, math.isqrt(total) + 1), max(0, count - 2)):
        rest = total - sum(value * value for value in first)
        for value in range(first[-1] if first else 1, math.isqrt(max(rest, 0) // 2) + 1):
            last = math.isqrt(rest - value * value)
            if last >= value and value * value + last * last == rest:
                ways.append((*first, value, last))
        if ways:
            break
    return ways


@dataclass(frozen=True)
class Latent:
    """A down-projection, the norm behind it and the up-projection.

    Args:
        down: [rank, d].
        bias: [rank], None without.
        gain: [rank] of the RMS norm between the two; None: nothing is between them.
        up: [rows, rank].
        up_bias: [rows], None without. DeepSeek has none, so only what has no norm may have one.
        reach: no input of the down-projection is longer than this.
    """

    down: Tensor
    bias: Tensor | None
    gain: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    reach: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def laid_out(self, dim: int) -> Latent:
        """The same function with a norm, without a bias behind it, over `dim` dims.

        Raises:
            Refused: `dim` leaves no room for the constants that this needs.
        """
        if self.gain is not None:
            # The mean is taken over more dims than before, which the gain mends.
            gain = _rows(self.gain * math.sqrt(self.rank / dim), dim)
            bias = None if self.bias is None else _rows(self.bias, dim)
            return Latent(_rows(self.down, dim), bias, gain, _columns(self.up, dim), None, self.reach)
        extra = constants(self.rank, unit=self.up_bias is not None, dim=dim)
        power = 2.0 ** self._exponent(dim)
        first = dim - len(extra.values)
        bias = self.down.new_zeros(dim)
        if self.bias is not None:
            bias[: self.rank] = self.bias
        bias[first:] = torch.tensor(extra.values, dtype=torch.float64).to(bias) * power
        gain = self.down.new_zeros(dim)
        gain[: self.rank] = power
        up = _columns(self.up, dim)
        if self.up_bias is not None and extra.unit is not None:
            gain[first + extra.unit] = 1 / extra.values[extra.unit]
            up[:, first + extra.unit] = self.up_bias
        return Latent(_rows(self.down, dim), bias, gain, up, None, self.reach)

    def _exponent(self, dim: int) -> int:
        """Of the power of two beside which the longest possible latent is too small to count."""
        longest = float(self.down.double().norm()) * self.reach
        longest += 0.0 if self.bias is None else float(self.bias.double().norm())
        return max(0, math.ceil(math.log2(max(longest, 1e-30) / math.sqrt(SMALL * dim))))


def common_dim(latents: Sequence[Latent]) -> int:
    """The smallest number of dims in which all of these can be laid out."""
    least = max(latent.rank for latent in latents)
    for dim in range(least, least + 10):
        if all(_fits(latent, dim) for latent in latents):
            return dim
    raise AssertionError("five constants always suffice")


def _fits(latent: Latent, dim: int) -> bool:
    if latent.gain is not None:
        return latent.rank <= dim
    try:
        constants(latent.rank, unit=latent.up_bias is not None, dim=dim)
    except Refused:
        return False
    return True


def interleaved(dim: int, order: list[int], neighbours: bool) -> Tensor:
    """Where the rows of `dim` rotated dims come from, so that pair j is rows (2j, 2j + 1).

    Args:
        order: which of the layer's pairs is to be pair j.
        neighbours: the layer's pairs are neighbours already; else pair i is rows (i, i + dim / 2).
    """
    pairs = torch.tensor(order, dtype=torch.long)
    rows = (2 * pairs, 2 * pairs + 1) if neighbours else (pairs, pairs + dim // 2)
    return torch.stack(rows, dim=1).flatten()


def query_rows(rows: Tensor, heads: int, rope_dim: int, index: Tensor, factor: float) -> Tensor:
    """Rows [H * (nope + rope), ...] of a query projection with the rotated ones in another order, scaled."""
    split = rows.reshape(heads, -1, *rows.shape[1:])
    nope = split.shape[1] - rope_dim
    split = torch.cat([split[:, :nope], split[:, nope:][:, index.to(rows.device)]], dim=1).flatten(0, 1)
    return split if factor == 1.0 else (split.double() * factor).to(rows.dtype)


def bias_of(linear: nn.Linear) -> Tensor | None:
    """A projection's bias, None without one and where it is all zeros."""
    bias: Any = linear.bias
    return None if bias is None or not bias.detach().any() else bias.detach()


def _rows(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x.new_zeros(count - x.shape[0], *x.shape[1:])])


def _columns(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x.new_zeros(x.shape[0], count - x.shape[1])], dim=1)
