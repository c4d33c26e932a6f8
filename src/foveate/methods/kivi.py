"""KIVI: keys quantised per channel, values per token, recent tokens exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foveate.cache.latent_side import LatentSide
from foveate.cache.quantised import WIDTHS, Quantised, Rotated
from foveate.errors import BadArgument, Refused
from foveate.methods.base import Codec, Method, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.checks import holds_more
from foveate.models.shape import LayerShape, ModelShape

EXACT = 16
ROTATED = 8
"""Bits of the rotated channels beside a latent."""
Numbers = int | tuple[int, int]
"""One number for keys and values, or one for each."""


@register
@dataclass(frozen=True, kw_only=True)
class KIVI(Method):
    """Asymmetric min-max quantisation of the cache once the prompt is over: groups of consecutive tokens per channel
    for keys, groups of channels per token for values. The newest tokens stay exact: keys until `residual` of them are
    complete, values always the last `residual`. The prompt's own attention uses exact tokens.

    Under latent attention (MLA) the latents, which are values as much as keys, are held as values are, by groups of the
    channels of a token, and the rotated channels beside them as keys are, in eight bits, which few channels cost little
    and whose errors go into every score; both leave the exact tail as keys do.

    Heads that hold a constant window (because another method says so) stay exact: there is little to pack.

    Beyond the paper: three bits; `early`, because later layers of small models need more precision than earlier ones;
    and `hadamard`, which mixes the channels of a token by an orthogonal matrix, as QuaRot (2404.00456) does for a cache
    per token. Where keys are mixed, each token is quantised by itself, less the mean of the prompt's keys: `residual`
    can be small then, and in prompts of a thousand tokens exact ones weigh as much as bits.

    Args:
        bits: 2, 3, 4 or 8, or 16 for none; two numbers: of keys and of values. With a budget: the most bits, alike for
            all, that meet it.
        group: tokens (keys) or channels (values) that share a scale and a zero point; two numbers: of keys and values.
        residual: R, a multiple of the group of keys; any number where keys are mixed.
        early: bits of the first half of the layers; None: as the others.
        hadamard: whose channels are mixed before they are quantised per token; head sizes must be powers of two.

    Source: 2402.02750, section 3; keys are quantised as stored (rotated). Bits of keys apart from those of values: the
    ablation there.
    """

    id = "kivi"
    name = "KIVI"
    paper = "2402.02750"
    slots = frozenset({"format"})
    core = True
    search = tries(
        bits=(2, 4, 8), group=(16, 32, 64), residual=(32, 64, 128), early=(None,), hadamard=("none",), budget=(None,)
    )

    bits: Numbers = 4
    group: Numbers = 32
    residual: int = 128
    early: Numbers | None = None
    hadamard: Literal["none", "values", "both"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "group", "early"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):  # a list is what JSON makes of two numbers
                object.__setattr__(self, name, tuple(value))
                if len(value) != 2:
                    raise BadArgument(name, value, "give one number, or two: of keys and of values")
        for name, value in (("bits", self.bits), ("early", self.bits if self.early is None else self.early)):
            if not set(_two(value)) <= {*WIDTHS, EXACT}:
                raise BadArgument(name, value, "give 2, 3, 4 or 8, or 16 for none")
        if min(_two(self.group)) < 1:
            raise BadArgument("group", self.group, "give at least 1")
        if self.hadamard not in ("none", "values", "both"):
            raise BadArgument("hadamard", self.hadamard, "give none, values or both")
        unit = 1 if self.hadamard == "both" else _two(self.group)[0]
        if self.residual < unit or self.residual % unit:
            raise BadArgument("residual", self.residual, f"give a multiple of group={unit}")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        found = self._bits(shape, length)
        for layer, bits in zip(shape.layers, found, strict=True):
            coded = (layer.latent_dim or layer.store_k_dim, layer.store_v_dim)
            for dim, width in zip(coded, bits, strict=True):
                if dim * width % 8:
                    raise Refused(f"{self.id}: {width}-bit codes of head size {dim} do not fill whole bytes")
            mixed = {"none": (), "values": (layer.store_v_dim,), "both": (layer.store_k_dim, layer.store_v_dim)}
            if any(dim & (dim - 1) for dim in mixed[self.hadamard]):
                raise Refused(f"{self.id}: hadamard={self.hadamard} needs head sizes that are powers of two")
        ranks = [layer.latent_dim for layer in shape.layers]
        return [Role("packed", extra={"bits": bits, "rank": r}) for bits, r in zip(found, ranks, strict=True)]

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        (bits_k, bits_v), (group_k, group_v) = role.extra["bits"], _two(self.group)
        if bits_k == bits_v == EXACT:
            return None
        mixed = self.hadamard == "both"
        k = Quantised(bits_k, group_k, per_channel=not mixed, tail=0, flush=self.residual)
        v = Quantised(bits_v, group_v, per_channel=False, tail=self.residual, flush=1)
        if role.extra["rank"] and not mixed and bits_k != EXACT:
            latent = Quantised(bits_k, group_v, per_channel=False, tail=0, flush=1)
            rotated = Quantised(ROTATED, group_k, per_channel=True, tail=0, flush=self.residual)
            return Codec(LatentSide(latent, rotated, role.extra["rank"]), None)
        keys, values = Rotated(k, True) if mixed else k, v if self.hadamard == "none" else Rotated(v, False)
        return Codec(None if bits_k == EXACT else keys, None if bits_v == EXACT else values)

    def _bits(self, shape: ModelShape, length: int) -> list[tuple[int, int]]:
        """Of keys and values, per layer."""
        budget, count = Budget.of(self.budget), len(shape.layers)
        if budget is None:
            early = 0 if self.early is None else count // 2
            return [_two(self.early or self.bits)] * early + [_two(self.bits)] * (count - early)
        granted = budget.share(shape, length)
        for bits in (EXACT, *WIDTHS):
            if (bits == EXACT and granted >= 1) or (bits != EXACT and self.share(shape, length, bits) <= granted):
                return [(bits, bits)] * count
        floor = self.share(shape, length, WIDTHS[-1])
        because = f"{WIDTHS[-1]} bits, {self.residual} exact tokens"
        raise holds_more(self, floor, length, because, "raise the budget or lower residual")

    def share(self, shape: ModelShape, length: int, bits: int) -> float:
        """Share of the dense cache that is held at this length."""
        dense = shape.dense_kv_bytes(length)
        full = [layer for layer in shape.layers if layer.kind == "full"]
        exact = dense - sum(shape.kv_bytes_per_slot(layer.index) for layer in full) * length
        return (exact + sum(self._layer_bytes(layer, shape.dtype.itemsize, length, bits) for layer in full)) / dense

    def _layer_bytes(self, layer: LayerShape, itemsize: int, length: int, bits: int) -> float:
        tail, (k_group, v_group) = min(length, self.residual), _two(self.group)
        mixed = self.hadamard == "both"
        loose_k, loose_v = length % self.residual, tail
        k_group = math.gcd(layer.store_k_dim, k_group) if mixed else k_group
        v_group = math.gcd(layer.store_v_dim, v_group) or 1
        if layer.latent_dim and not mixed:
            rest, group = layer.store_k_dim - layer.latent_dim, math.gcd(layer.latent_dim, _two(self.group)[1])
            packed = layer.latent_dim * (bits / 8 + 4 / group) + rest * (ROTATED / 8 + 4 / k_group)
            return layer.store_heads * (loose_k * itemsize * layer.store_k_dim + (length - loose_k) * packed)
        keys = loose_k * itemsize + (length - loose_k) * (bits / 8 + 4 / k_group) + mixed * itemsize
        values = loose_v * itemsize + (length - loose_v) * (bits / 8 + 4 / v_group)
        return layer.store_heads * (keys * layer.store_k_dim + values * layer.store_v_dim)


def _two(value: Numbers) -> tuple[int, int]:
    """Of keys and of values."""
    return (value, value) if isinstance(value, int) else value
