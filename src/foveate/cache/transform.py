"""Tokens held in a basis that was fitted before, each component in as many bits as its variance is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.attention.coded import Coding, levels_dtype
from foveate.cache.column import Observed

MOST = 8
"""Bits of a component at most."""
SCALE = 5
"""Bits of a token's scale. The last of its codes name tokens that are held exactly."""
FINE = 4
"""Scales to the octave."""
UNITY = 16
"""Code of the scale 1."""
TRIED = (-3, -1, 1, 3)
"""Scales that each token is tried with, next to that of its root mean square."""
_APART = 32.0
"""Between the tables of two widths where all their borders lie in a row; no component is clipped before 12."""


@dataclass(frozen=True, eq=False)
class Transform:
    """One side of one layer: the basis of each kv head and the bits of its components. It is part of the model, shared
    by all caches: nothing of it counts as held.

    Args:
        mean: [H, D], what is taken off first.
        analysis: [H, D, C], then y = (x - mean) @ analysis; invertible, C = D.
        deviation: [H, C] of the components of y over ordinary text; an error of 1 costs the same in all of them.
        bits: int64 [H, C], 0 to 8 bits of each component.
    """

    mean: Tensor
    analysis: Tensor
    deviation: Tensor
    bits: Tensor
    _placed: dict[tuple[torch.device, torch.dtype], Placed] = field(default_factory=dict, repr=False)
    _codings: dict[tuple[torch.device, torch.dtype, int], Coding] = field(default_factory=dict, repr=False)

    @property
    def row(self) -> int:
        """Bytes of a token: its scale and the components of the head that takes most."""
        return -(-(SCALE + int(self.bits.sum(1).max())) // 8)

    def on(self, device: torch.device, dtype: torch.dtype) -> Placed:
        """What packing works with, made once for each device and precision."""
        if (device, dtype) not in self._placed:
            self._placed[device, dtype] = self._place(device, dtype)
        return self._placed[device, dtype]

    def coding(self, device: torch.device, dtype: torch.dtype, pointers: int) -> Coding:
        """What the decode kernel for tokens of this dtype works with, made once for each device.

        Args:
            pointers: the first code of a scale that points to an exact token.
        """
        key = device, levels_dtype(dtype), pointers
        if key not in self._codings:
            self._codings[key] = self._code(*key)
        return self._codings[key]

    def _code(self, device: torch.device, dtype: torch.dtype, pointers: int) -> Coding:
        held = self.on(device, torch.float32)
        byte = held.byte[:, 1:].clamp_max(max(0, self.row - 2))
        # Fields of no bits may lie behind the row: what is before them counts for nothing.
        shift = (held.shift[:, 1:] + 8 * (held.byte[:, 1:] - byte)).clamp_max(15)
        scale = torch.arange(1 << SCALE, device=device)
        sizes = torch.exp2((scale - UNITY).float() / FINE) * (scale < pointers)
        fields = torch.stack([byte, shift, held.mask[:, 1:]], dim=1).int()
        levels = held.levels.to(dtype)
        return Coding(held.mean.contiguous(), held.back.contiguous(), fields.contiguous(), levels, sizes, pointers)

    def _place(self, device: torch.device, dtype: torch.dtype) -> Placed:
        deviation = self.deviation.double().clamp_min(1e-12)
        analysis = self.analysis.double()
        widths = torch.cat([torch.full_like(self.bits[:, :1], SCALE), self.bits], dim=1)
        first = widths.cumsum(1) - widths
        borders, levels = tables()
        found = Placed(
            mean=self.mean.to(dtype),
            forward=(analysis / deviation.unsqueeze(1)).to(dtype),
            back=(deviation.unsqueeze(2) * torch.linalg.inv(analysis)).to(dtype),
            cost=deviation.square().to(dtype),
            bits=self.bits,
            byte=first // 8,
            shift=(first % 8).int(),
            mask=((1 << widths) - 1).int(),
            borders=borders.to(dtype),
            levels=levels.to(dtype),
        )
        return Placed(**{name: x.to(device) for name, x in vars(found).items()})


@dataclass(frozen=True, eq=False)
class Placed:
    """A transform on a device.

    Attributes:
        mean, forward, back: [H, D], [H, D, C], [H, C, D]; components have a deviation of 1 in between.
        cost: [H, C], of a squared error in such a component.
        bits: [H, C].
        byte, shift, mask: [H, 1 + C], where the scale and each code of a row begin, and what they are cut out by.
        borders, levels: see `tables`.
    """

    mean: Tensor
    forward: Tensor
    back: Tensor
    cost: Tensor
    bits: Tensor
    byte: Tensor
    shift: Tensor
    mask: Tensor
    borders: Tensor
    levels: Tensor


@dataclass(frozen=True)
class TransformSide:
    """Tokens one by one, each a row of bits: which of a few scales it has, then the codes of its components.

    A code is that of the nearest of the levels that suit a normal distribution best (Lloyd and Max). The scale is the
    one, of four near the token's root mean square, that loses least. The first tokens that the side is fitted to are
    held exactly, and equal ones are pointed to: models give the first tokens much attention, and their values are like
    no others.

    Args:
        transform: of this side of the layer.
        sink: first tokens that are held exactly; at most 8.
        flush: see `Side`.
    """

    transform: Transform
    sink: int
    flush: int
    tail: int = 0
    unit: int = 1
    per_head: bool = True

    def fit(self, x: Tensor, lengths: Tensor, observed: Observed | None) -> tuple[Tensor, ...]:
        """The first tokens [P, sink, D]."""
        return (x[:, : self.sink].clone(),) if self.sink else ()

    def pack(self, x: Tensor, heads: Tensor, *first: Tensor) -> tuple[Tensor, ...]:
        """[P, n, D] -> rows uint8 [P, n, row]; heads: the number of each pair's kv head, [P]."""
        work = torch.promote_types(x.dtype, torch.float32)
        held, at = self.transform.on(x.device, work), heads.long()
        z = (x.to(work) - held.mean[at].unsqueeze(1)) @ held.forward[at]
        bits, cost = held.bits[at].unsqueeze(1), held.cost[at].unsqueeze(1)
        coded = bits > 0
        rms = (z.square() * coded).sum(-1) / coded.sum(-1).clamp_min(1)
        near = (FINE / 2 * torch.log2(rms.clamp_min(1e-30))).round().long() + UNITY
        scale, codes, least = near, bits.expand(z.shape), torch.full_like(rms, torch.inf)
        for step in TRIED:
            tried = (near + step).clamp(0, self._scales - 1)
            size = torch.exp2((tried - UNITY).to(work) / FINE).unsqueeze(-1)
            index = torch.bucketize((z / size).clamp(-12, 12) + _APART * bits, held.borders) + bits
            error = ((z - size * held.levels[index]).square() * cost).sum(-1)
            better = error < least
            scale, least = torch.where(better, tried, scale), torch.where(better, error, least)
            codes = torch.where(better.unsqueeze(-1), index, codes)
        codes = codes - (1 << bits) + 1
        for exact in first:
            same = (x.unsqueeze(2) == exact.unsqueeze(1)).all(-1)
            scale = torch.where(same.any(-1), self._scales + same.byte().argmax(-1), scale)
        return (_joined(torch.cat([scale.unsqueeze(-1), codes], dim=-1), held, at, self.transform.row),)

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype, heads: Tensor, *first: Tensor) -> Tensor:
        (rows,) = packed
        work = torch.promote_types(dtype, torch.float32)
        held, at = self.transform.on(rows.device, work), heads.long()
        step = max(1, at_once(rows.device) // max(1, len(rows) * held.bits.shape[1]))
        parts = [self._opened(part, dtype, held, at, first) for part in rows.split(step, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _opened(self, rows: Tensor, dtype: torch.dtype, held: Placed, at: Tensor, first: tuple[Tensor, ...]) -> Tensor:
        fields = _parted(rows, held, at)
        scale = fields[..., :1]
        index = fields[..., 1:] + ((1 << held.bits[at]) - 1).unsqueeze(1)
        z = held.levels.index_select(0, index.flatten()).view(index.shape)
        # Products with ones and zeros are exact: a token that is pointed to is the first token and nothing else.
        size = torch.exp2((scale - UNITY).to(z.dtype) / FINE) * (scale < self._scales)
        bare = torch.cat([held.mean[at].unsqueeze(1), *(exact.to(z.dtype) for exact in first)], dim=1)
        which = (scale - self._scales + 1).clamp_min(0) == torch.arange(bare.shape[1], device=scale.device)
        return torch.baddbmm(which.to(z.dtype) @ bare, z.mul_(size), held.back[at]).to(dtype)

    def coded(self, dtype: torch.dtype, heads: Tensor, *first: Tensor) -> tuple[Tensor, Tensor, Coding]:
        """See `Side`."""
        exact = first[0] if first else heads.new_zeros(len(heads), 0, self.transform.mean.shape[1], dtype=dtype)
        return heads, exact, self.transform.coding(heads.device, dtype, self._scales)

    @property
    def _scales(self) -> int:
        """Codes that are scales."""
        return (1 << SCALE) - self.sink


def _joined(fields: Tensor, held: Placed, at: Tensor, row: int) -> Tensor:
    """Fields [P, n, 1 + C] as the bits of rows uint8 [P, n, row], low bits first."""
    byte = held.byte[at].unsqueeze(1).expand(fields.shape)
    moved = fields.int() << held.shift[at].unsqueeze(1)
    # No two fields share a bit, so that a sum is what all of them set. Fields of no bits may lie behind the row.
    out = moved.new_zeros(*fields.shape[:2], row + 2)
    out.scatter_add_(2, byte, moved & 255).scatter_add_(2, byte + 1, moved >> 8)
    return out[..., :row].to(torch.uint8)


def _parted(rows: Tensor, held: Placed, at: Tensor) -> Tensor:
    """Inverse of `_joined`, int64."""
    wide = torch.nn.functional.pad(rows, (0, 2)).int()
    pairs = wide[..., :-1] | wide[..., 1:] << 8
    byte, shift, mask = (x[at].unsqueeze(1) for x in (held.byte, held.shift, held.mask))
    found = pairs.gather(2, byte.expand(*rows.shape[:2], byte.shape[-1]))
    return ((found >> shift) & mask).long()


@lru_cache(maxsize=1)
def tables() -> tuple[Tensor, Tensor]:
    """Borders and levels of all widths from 0 to 8 bits one behind the other: the borders of b bits are moved by
    b * _APART, so that one search serves all widths; b bits begin at level 2**b - 1. Float64 [502] and [511]."""
    found = [levels(bits) for bits in range(MOST + 1)]
    borders = [(x[1:] + x[:-1]) / 2 + _APART * bits for bits, x in enumerate(found)]
    return torch.cat(borders), torch.cat(found)


@lru_cache(maxsize=MOST + 1)
def levels(bits: int) -> Tensor:
    """The 2**bits levels that lose least of a normal number of deviation 1, ascending, float64.

    Source: Lloyd (1982), Max (1960).
    """
    count = 1 << bits
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = torch.erfinv(2 * share - 1) * math.sqrt(6)  # the limit for many levels: a deviation of the root of 3
    end = torch.full((1,), 40.0, dtype=torch.float64)
    for _ in range(400):
        border = torch.cat([-end, (x[1:] + x[:-1]) / 2, end])
        mass = torch.special.ndtr(border).diff()
        x = -torch.exp(-border.square() / 2).diff() / (math.sqrt(2 * math.pi) * mass)
    return x


@lru_cache(maxsize=1)
def losses() -> tuple[float, ...]:
    """What is lost of a normal number's variance of 1 by 0 to 8 bits."""
    return tuple(float(1 - (levels(b).square() * _masses(levels(b))).sum()) for b in range(MOST + 1))


def _masses(x: Tensor) -> Tensor:
    end = torch.full((1,), 40.0, dtype=torch.float64)
    return torch.special.ndtr(torch.cat([-end, (x[1:] + x[:-1]) / 2, end])).diff()
