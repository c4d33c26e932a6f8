"""KVTC: keys and values in a basis of their own, components in as many bits as their variance is worth."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from foveate.cache.column import SPARE
from foveate.cache.transform import MOST, SCALE, TransformSide
from foveate.errors import BadArgument, Refused
from foveate.heads.gates import made_with
from foveate.heads.passkeys import Example
from foveate.heads.transform_coding import collect, held, mixed_texts, transform
from foveate.methods.base import Codec, Method, Probe, Profile, Role, register, tries
from foveate.methods.budget import PAIR_BYTES, Budget
from foveate.methods.policies.checks import at_least, holds_more
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import LayerShape, ModelShape

FIRST = 4
"""First tokens of a text that bases are not fitted to."""
SIDES = ("keys", "values")
FINEST = 1024
"""Steps of the search for bits under a budget, of 1/256 of `bits`."""


@register
@dataclass(frozen=True, kw_only=True)
class KVTC(Method):
    """Transform coding: when the prompt is over, each key and value is turned into the principal components of its
    head, which were fitted to the model once, and each component is rounded to as many bits as lower the loss most,
    from none to eight. Bases and bits come with the model; a token brings its codes and one scale. The first tokens of
    the prompt are held exactly, and the newest until `residual` of them are complete. The prompt's own attention uses
    exact tokens.

    What is lost of a key is measured as the queries of its head see it, in their second moment: components are those of
    M^(1/2) k, and directions that no query looks at get no bits.

    Differs from the paper: a basis for each head and layer, where the paper has one for all heads of several layers;
    keys as they are cached, rotated, where the paper takes them out of their positions; the queries' metric; levels for
    normal numbers and a scale per token, where the paper has ranges per group; and codes are stored as they are, where
    the paper compresses them once more (DEFLATE). So less is saved for the same loss, but tokens stay readable one by
    one at every step.

    Args:
        bits: average bits of a number, of keys and of values, with the token's scale (5 bits); rows are rounded down
            to whole bytes. Under a budget both are raised or lowered by one factor.
        residual: newest tokens are held exactly until so many are complete.
        sink: first tokens that are held exactly.

    Source: 2511.01815, section 3.
    """

    id = "kvtc"
    name = "KVTC"
    paper = "2511.01815"
    slots = frozenset({"format"})
    calibrated = True
    search = tries(bits=((2.375, 2.625), (2.875, 3.125), (3.375, 3.625)), residual=(16, 64), sink=(2,), budget=(None,))

    bits: tuple[float, float] = (3.375, 3.625)
    residual: int = 16
    sink: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.bits, list | tuple):  # a list is what JSON makes of two numbers
            object.__setattr__(self, "bits", tuple(self.bits))
        if not isinstance(self.bits, tuple) or len(self.bits) != 2 or not all(0 < b <= 16 for b in self.bits):
            raise BadArgument("bits", self.bits, "give two numbers above 0 and at most 16: of keys and of values")
        at_least(self, residual=1, sink=0)
        if self.sink > 8:
            raise BadArgument("sink", self.sink, "give at most 8")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        self._refuse(shape)
        full = {layer.index for layer in shape.layers if layer.kind == "full"}
        tensors = self._tensors(shape, profile)
        factor = self._factor(shape, length)
        roles = [Role() for _ in shape.layers]
        for index in full:
            if factor is None:
                continue
            rows = self._rows(shape.layers[index], factor)
            sides = {name: transform(*tensors[index, name], row) for name, row in zip(SIDES, rows, strict=True)}
            roles[index] = Role("packed", extra=sides)
        return roles

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        if role.name != "packed":
            return None
        keys, values = (TransformSide(role.extra[name], self.sink, self.residual) for name in SIDES)
        return Codec(keys, values)

    def _refuse(self, shape: ModelShape) -> None:
        if any(layer.latent for layer in shape.layers):
            raise Refused(f"{self.id}: {shape.name} caches a latent for all heads (MLA); bases are made for heads")

    def _tensors(self, shape: ModelShape, profile: Profile | None) -> Mapping[tuple[int, str], tuple[Tensor, Tensor]]:
        """Codes and numbers of the basis of each layer's sides."""
        stored = {} if profile is None else profile.tensors
        found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for layer in shape.layers:
            for name, dim in zip(SIDES, (layer.store_k_dim, layer.store_v_dim), strict=True):
                if layer.kind != "full":
                    continue
                codes, numbers = stored.get(f"{layer.index}.{name}"), stored.get(f"{layer.index}.{name}.numbers")
                if codes is None or numbers is None or codes.shape != (layer.store_heads, dim, dim):
                    mend = f"{self.id} needs bases of this model's keys and values: run `foveate calibrate` first"
                    raise BadArgument("profile", None if profile is None else profile.model, mend)
                found[layer.index, name] = codes, numbers
        return found

    def _factor(self, shape: ModelShape, length: int) -> float | None:
        """What `bits` are multiplied by; None: nothing is packed."""
        budget = Budget.of(self.budget)
        if budget is None or budget.whole:
            return 1.0 if budget is None else None
        granted, least = budget.share(shape, length), self.share(shape, length, 1 / 256)
        if least > granted:
            because = f"a byte a token, {self.residual} newest and {self.sink} first tokens exact"
            raise holds_more(self, least, length, because, "raise the budget or lower residual")
        steps = range(1, FINEST + 1)
        return bisect_right(steps, granted, key=lambda step: self.share(shape, length, step / 256)) / 256

    def _rows(self, layer: LayerShape, factor: float) -> tuple[int, int]:
        """Bytes of a packed token of a head, of its key and of its value."""
        dims = layer.store_k_dim, layer.store_v_dim
        found = [int(dim * b * factor / 8 + 1e-9) for dim, b in zip(dims, self.bits, strict=True)]
        rows = [min(max(1, row), -(-(SCALE + MOST * dim) // 8)) for row, dim in zip(found, dims, strict=True)]
        return rows[0], rows[1]

    def share(self, shape: ModelShape, length: int, factor: float = 1.0) -> float:
        """Share of the dense cache that is held at this length, with all the room of the exact tail."""
        dense, saved = shape.dense_kv_bytes(length), 0.0
        for layer in shape.layers:
            if layer.kind == "full":
                whole = (layer.store_k_dim + layer.store_v_dim) * shape.dtype.itemsize
                exact = min(length, max(self.residual, SPARE)) + min(length, self.sink)
                packed = length * sum(self._rows(layer, factor)) + 2 * torch.int16.itemsize + PAIR_BYTES
                saved += layer.store_heads * ((length - exact) * whole - packed)
        return 1 - saved / dense

    def stand_in(self, shape: ModelShape) -> Profile:
        """Random orthogonal bases whose components' variances fall by a factor of 100."""
        generator, tensors = torch.Generator().manual_seed(0), {}
        for layer in shape.layers:
            for name, dim in zip(SIDES, (layer.store_k_dim, layer.store_v_dim), strict=True):
                if layer.kind == "full" and not layer.latent:
                    axes = torch.linalg.qr(torch.randn(layer.store_heads, dim, dim, generator=generator))[0]
                    spread = axes * torch.logspace(0, -1, dim)
                    tensors |= held(layer.index, name, torch.zeros(layer.store_heads, dim), spread @ axes.mT * spread)
        return made_up(self.id, shape, {"first": FIRST}, tensors)

    def calibrate(
        self, probe: Probe, data: Iterable[Example] | None = None, *, texts: int = 16, length: int = 4096
    ) -> Profile:
        """Fit the bases to texts of an eighth, a quarter, a half and all of `length`: plain text, some with passkeys in
        it, and a few of random identifiers.

        Args:
            probe: the model, its tokenizer, a seed.
            data: texts instead.
            texts: how many.
            length: tokens of the longest; bases are of keys with their positions, so not much below what is served.

        Raises:
            Refused: MLA.
            BadArgument: a number that makes no sense.
        """
        shape = ModelShape.of(probe.model)
        self._refuse(shape)
        length = min(length, shape.max_positions)
        for name, value, least in (("texts", texts, 1), ("length", length, 64)):
            if value < least:
                raise BadArgument(name, value, f"give at least {least}")
        read = (
            [x.ids for x in data]
            if data is not None
            else list(islice(mixed_texts(probe.tokenizer, length, probe.seed), texts))
        )
        report, began = probe.progress(len(read), self.id), time.perf_counter()
        tensors: dict[str, Tensor] = {}
        for index, moments in collect(probe.model, read, FIRST, report).items():
            tensors |= held(index, "keys", *moments.keys, moments.qq)
            tensors |= held(index, "values", *moments.values)
        made: dict[str, Any] = {"tokens": sum(map(len, read)), "texts": len(read), "seed": probe.seed}
        made |= {"longest": max(map(len, read)), "seconds": round(time.perf_counter() - began, 1)}
        return Profile(self.id, fingerprint(shape), {"first": FIRST}, made | made_with(probe.model), tensors)
