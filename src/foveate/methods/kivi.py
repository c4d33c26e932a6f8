"""KIVI: keys quantised per channel, values per token, recent tokens exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import BadArgument, Infeasible, Refused
from foveate.methods.base import Codec, Method, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.models.shape import LayerShape, ModelShape

BITS = (8, 4, 2)
EXACT = 16


@register
@dataclass(frozen=True, kw_only=True)
class KIVI(Method):
    """Asymmetric min-max quantisation of the cache once the prompt is over: groups of consecutive tokens per channel
    for keys, groups of channels per token for values. The newest tokens stay exact: keys until `residual` of them are
    complete, values always the last `residual`. The prompt's own attention uses exact tokens.

    Heads that hold a constant window (because another method says so) stay exact: there is little to pack.

    Args:
        bits: 2, 4 or 8, or 16 for none. With a budget: the most bits that meet it.
        group: tokens (keys) or channels (values) that share a scale and a zero point.
        residual: R, a multiple of `group`.

    Source: 2402.02750, section 3; keys are quantised as stored (rotated).
    """

    id = "kivi"
    name = "KIVI"
    paper = "2402.02750"
    slots = frozenset({"format"})
    core = True
    search = tries(bits=(2, 4, 8), group=(16, 32, 64), residual=(32, 64, 128), budget=(None,))

    bits: int = 4
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (*BITS, EXACT):
            raise BadArgument("bits", self.bits, "give 2, 4 or 8, or 16 for none")
        if self.group < 1:
            raise BadArgument("group", self.group, "give at least 1")
        if self.residual < self.group or self.residual % self.group:
            raise BadArgument("residual", self.residual, f"give a multiple of group={self.group}")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        bits = self._bits(shape, length)
        for layer in shape.layers:
            if bits < 8 and (layer.store_k_dim % (8 // bits) or layer.store_v_dim % (8 // bits)):
                raise Refused(f"{self.id}: {bits}-bit codes of head size {layer.head_dim} do not fill whole bytes")
        return [Role("packed", extra={"bits": bits})] * len(shape.layers)

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        bits = role.extra["bits"]
        if bits == EXACT:
            return None
        return Codec(
            Quantised(bits, self.group, per_channel=True, tail=0, flush=self.residual),
            Quantised(bits, self.group, per_channel=False, tail=self.residual, flush=1),
        )

    def _bits(self, shape: ModelShape, length: int) -> int:
        budget = Budget.of(self.budget)
        if budget is None:
            return self.bits
        granted = budget.share(shape, length)
        if granted >= 1:
            return EXACT
        for bits in BITS:
            if self.share(shape, length, bits) <= granted:
                return bits
        floor = self.share(shape, length, BITS[-1])
        raise Infeasible(
            f"budget={budget}: {self.id} cannot hold less than {floor:.3f} of the dense cache at {length} tokens "
            f"(2 bits, {self.residual} exact tokens); raise the budget or lower residual",
            floor,
        )

    def share(self, shape: ModelShape, length: int, bits: int) -> float:
        """Share of the dense cache that is held at this length."""
        dense = shape.dense_kv_bytes(length)
        full = [layer for layer in shape.layers if layer.kind == "full"]
        exact = dense - sum(shape.kv_bytes_per_slot(layer.index) for layer in full) * length
        return (exact + sum(self._layer_bytes(layer, shape.dtype.itemsize, length, bits) for layer in full)) / dense

    def _layer_bytes(self, layer: LayerShape, itemsize: int, length: int, bits: int) -> float:
        loose_k, loose_v = length % self.residual, min(length, self.residual)
        k_group, v_group = self.group, math.gcd(layer.store_v_dim, self.group) or 1
        keys = loose_k * itemsize + (length - loose_k) * (bits / 8 + 4 / k_group)
        values = loose_v * itemsize + (length - loose_v) * (bits / 8 + 4 / v_group)
        return layer.store_heads * (keys * layer.store_k_dim + values * layer.store_v_dim)


@dataclass(frozen=True)
class Quantised:
    """One side held in groups of `bits`-bit integers with a float16 scale and zero point per group."""

    bits: int
    group: int
    per_channel: bool
    tail: int
    flush: int

    @property
    def unit(self) -> int:
        return self.group if self.per_channel else 1

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """[P, n, D] -> codes uint8 [P, n, D * bits / 8], scale and zero point ([P, n / g, D] or [P, n, D / g])."""
        grouped, axis = self._grouped(x.float())
        low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        # Rounded outwards, so that every value lies inside the range and the error stays within half a step.
        zero = low.half()
        zero = torch.where(zero.float() > low, torch.nextafter(zero, torch.full_like(zero, -torch.inf)), zero)
        step = (high - zero.float()) / (2**self.bits - 1)
        scale = step.half()
        scale = torch.where(scale.float() < step, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
        codes = ((grouped - zero.float()) / scale.float().clamp_min(1e-30)).round().clamp(0, 2**self.bits - 1)
        codes = codes.to(torch.uint8).view(x.shape)
        return _pack_bits(codes, self.bits), scale.squeeze(axis), zero.squeeze(axis)

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes = _unpack_bits(packed[0], self.bits)
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


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] -> bytes [..., D * bits / 8], low bits first; the last byte is filled up with zeros."""
    per = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % per))
    parts = codes.unflatten(-1, (-1, per))
    out = parts[..., 0].clone()
    for i in range(1, per):
        out |= parts[..., i] << (bits * i)
    return out


def _unpack_bits(packed: Tensor, bits: int) -> Tensor:
    per = 8 // bits
    mask = (1 << bits) - 1
    return torch.stack([(packed >> (bits * i)) & mask for i in range(per)], dim=-1).flatten(-2)
