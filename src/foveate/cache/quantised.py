"""Tokens held as small integers, with a scale and a zero point for each group of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.cache.column import LowBit, Observed

WIDTHS = (8, 4, 3, 2)
"""Bits of a code."""
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""How the bits of a code are spread over runs of bytes, low bits first: three fill no byte evenly, two and one do."""


@dataclass(frozen=True)
class Quantised:
    """One side held in groups of `bits`-bit integers with a float16 scale and zero point per group.

    Args:
        bits: of WIDTHS.
        group: tokens (per channel) or channels (per token) that share a scale and a zero point.
        per_channel: groups are of consecutive tokens of one channel; otherwise of channels of one token.
        tail, flush: see `Side`.
    """

    bits: int
    group: int
    per_channel: bool
    tail: int
    flush: int

    @property
    def unit(self) -> int:
        return self.group if self.per_channel else 1

    @property
    def low_bit(self) -> LowBit | None:
        """What the decode kernel can be told; it knows no codes of three bits."""
        return None if self.bits == 3 else LowBit(self.bits, self.per_channel)

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """[P, n, D] -> codes uint8 [P, n, D * bits / 8], scale and zero point ([P, n / g, D] or [P, n, D / g])."""
        grouped, axis = self._grouped(x.float())
        low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        # Rounded outwards, so that every value lies inside the range and the error stays within half a step.
        zero = low.half()
        zero = torch.where(zero.float() > low, torch.nextafter(zero, torch.full_like(zero, -torch.inf)), zero)
        # A product, not a quotient: that is the same number on every device.
        step = (high - zero.float()) * (1 / (2**self.bits - 1))
        scale = step.half()
        scale = torch.where(scale.float() < step, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
        codes = ((grouped - zero.float()) / scale.float().clamp_min(1e-30)).round().clamp(0, 2**self.bits - 1)
        codes = codes.to(torch.uint8).view(x.shape)
        return pack_bits(codes, self.bits), scale.squeeze(axis), zero.squeeze(axis)

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes = unpack_bits(packed[0], self.bits)
        scale, zero = packed[1], packed[2]
        if self.per_channel:
            codes = codes[..., : scale.shape[-1]]
        grouped, axis = self._grouped(codes)
        exact = grouped.float() * scale.float().unsqueeze(axis) + zero.float().unsqueeze(axis)
        return exact.view(codes.shape).to(dtype)

    def _grouped(self, x: Tensor) -> tuple[Tensor, int]:
        """x [P, n, D] with its groups on an axis of their own."""
        pairs, n, dim = x.shape
        if self.per_channel:
            return x.view(pairs, n // self.group, self.group, dim), 2
        group = math.gcd(dim, self.group)
        return x.view(pairs, n, dim // group, group), 3


@dataclass(frozen=True)
class Rotated:
    """A side whose channels are mixed by a Hadamard matrix before `inner` quantises them per token: no channel stands
    out of the others any more. The channels are a power of two.

    Args:
        inner: per token.
        centred: the mean of each channel over the prompt is taken off first and held once per pair.
    """

    inner: Quantised
    centred: bool

    @property
    def tail(self) -> int:
        return self.inner.tail

    @property
    def flush(self) -> int:
        return self.inner.flush

    @property
    def unit(self) -> int:
        return self.inner.unit

    def fit(self, x: Tensor, lengths: Tensor, observed: Observed | None) -> tuple[Tensor, ...]:
        """The mean of the tokens of each pair [P, D], if that is taken off."""
        if not self.centred:
            return ()
        there = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        total = x.float().masked_fill(~there.unsqueeze(-1), 0.0).sum(1)
        return ((total / lengths.clamp_min(1)[:, None]).to(x.dtype),)

    def pack(self, x: Tensor, *mean: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        for m in mean:
            x = x - m.float().unsqueeze(1)
        return self.inner.pack(x @ hadamard(x.shape[-1], x.device))

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype, *mean: Tensor) -> Tensor:
        x = self.inner.unpack(packed, torch.float32)
        x = x @ hadamard(x.shape[-1], x.device)  # it is its own inverse
        for m in mean:
            x = x + m.float().unsqueeze(1)
        return x.to(dtype)


@functools.lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthogonal and symmetric Hadamard matrix [size, size], float32; `size` is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device), matrix)
    return matrix / size**0.5


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] -> bytes [..., D * bits / 8], low bits first; the last byte is filled up with zeros."""
    runs, first = [], 0
    for width in PLANES[bits]:
        per = 8 // width
        plane = (codes >> first) & ((1 << width) - 1)
        parts = F.pad(plane, (0, -plane.shape[-1] % per)).unflatten(-1, (-1, per))
        out = parts[..., 0].clone()
        for i in range(1, per):
            out |= parts[..., i] << (width * i)
        runs.append(out)
        first += width
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=-1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., D * bits / 8] -> codes uint8 [..., D]."""
    planes = PLANES[bits]
    codes, first = None, 0
    for run, width in zip(packed.split([packed.shape[-1] * w // bits for w in planes], dim=-1), planes, strict=True):
        mask = (1 << width) - 1
        plane = torch.stack([(run >> (width * i)) & mask for i in range(8 // width)], dim=-1).flatten(-2)
        codes = plane if codes is None else codes | (plane << first)
        first += width
    assert codes is not None
    return codes
