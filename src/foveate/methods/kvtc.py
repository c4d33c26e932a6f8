"""KVTC: keys and values in a basis of their own, components in as many bits as their variance is worth."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from foveate.cache.column import SPARE
from foveate.cache.transform import TransformSide
from foveate.errors import BadArgument, Refused
from foveate.heads.gates import made_with
from foveate.heads.passkeys import Example
from foveate.heads.transform_coding import SIDES, asked_texts, fit, held, longest, mixed_texts, share_out, transform
from foveate.methods.base import Codec, Method, Probe, Profile, Role, register, tries
from foveate.methods.budget import PAIR_BYTES, Budget
from foveate.methods.policies.checks import at_least, holds_more
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape

FIRST = 4
"""First tokens of a text that bases are not fitted to."""


@register
@dataclass(frozen=True, kw_only=True)
class KVTC(Method):
    """Transform coding: when the prompt is over, each key and value is turned into the principal components of its
    head, which were fitted to the model once, and each component is rounded to as many bits as lower the loss most,
    from none to eight. Bases and bits come with the model; a token brings its codes and one scale. The first tokens of
    the prompt are held exactly, and the newest until `residual` of them are complete. The prompt's own attention uses
    exact tokens.

    What an error costs is measured in likelihood: by the second moments M of the gradients of the model's loss by keys
    and by values (Fisher's information), over plain text and over answers to questions about it. Components are those
    of M^(1/2) x, and layers get as many bytes as they are worth, their keys and their values apart.

    Differs from the paper: a basis for each head and layer, where the paper has one for all heads of several layers;
    keys as they are cached, rotated, where the paper takes them out of their positions; the metric of the likelihood,
    where the paper has none; levels for normal numbers and a scale per token, where the paper has ranges per group; and
    codes are stored as they are, where the paper compresses them once more (DEFLATE). So less is saved for the same
    loss, but tokens stay readable one by one at every step.

    Args:
        bits: average bits of a number of all layers, with the token's scale (5 bits); rows are whole bytes. Under a
            budget it is what the budget has room for.
        residual: newest tokens are held exactly until so many are complete (paper: always the last 128).
        sink: first tokens that are held exactly (paper: 4).

    Source: 2511.01815, section 3.
    """

    id = "kvtc"
    name = "KVTC"
    paper = "2511.01815"
    slots = frozenset({"format"})
    calibrated = True
    search = tries(bits=(2.5, 3.0, 3.5), residual=(16, 64), sink=(2,), budget=(None,))

    bits: float = 3.5
    residual: int = 16
    sink: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float) or not 0 < self.bits <= 16:
            raise BadArgument("bits", self.bits, "give a number above 0 and at most 16")
        at_least(self, residual=1, sink=0)
        if self.sink > 8:
            raise BadArgument("sink", self.sink, "give at most 8")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        self._refuse(shape)
        found, total = self._sides(shape, profile), self._total(shape, length)
        roles = [Role() for _ in shape.layers]
        if total is None or not found:
            return roles
        rows = share_out(tuple((numbers, weights) for _, numbers, weights in found.values()), total)
        for (index, name), (codes, numbers, _), row in zip(found, found.values(), rows, strict=True):
            extra = {**roles[index].extra, name: transform(codes, numbers, row)}
            roles[index] = Role("packed", extra=extra)
        return roles

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        if role.name != "packed":
            return None
        keys, values = (TransformSide(role.extra[name], self.sink, self.residual) for name in SIDES)
        return Codec(keys, values)

    def _refuse(self, shape: ModelShape) -> None:
        if any(layer.latent for layer in shape.layers):
            raise Refused(f"{self.id}: {shape.name} caches a latent for all heads (MLA); bases are made for heads")

    def _sides(
        self, shape: ModelShape, profile: Profile | None
    ) -> Mapping[tuple[int, str], tuple[Tensor, Tensor, tuple[float, ...]]]:
        """Of each layer's keys and values the codes and numbers of their bases, and what errors cost in each head."""
        found: dict[tuple[int, str], tuple[Tensor, Tensor, tuple[float, ...]]] = {}
        try:
            stored, weights = ({}, {}) if profile is None else (profile.tensors, profile.data["weights"])
            for layer in shape.layers:
                for name, dim in zip(SIDES, (layer.store_k_dim, layer.store_v_dim), strict=True):
                    if layer.kind == "full":
                        side = f"{layer.index}.{name}"
                        of = tuple(float(x) for x in weights[side])
                        found[layer.index, name] = stored[side], stored[f"{side}.numbers"], of
                        if stored[side].shape != (layer.store_heads, dim, dim) or len(of) != layer.store_heads:
                            raise ValueError
        except (KeyError, TypeError, ValueError):
            mend = f"{self.id} needs bases of this model's keys and values: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        return found

    def _total(self, shape: ModelShape, length: int) -> int | None:
        """Bytes of a packed token in all layers; None: nothing is packed."""
        budget, dims = Budget.of(self.budget), self._dims(shape)
        if budget is not None and budget.whole:
            return None
        least, most = sum(heads for heads, _ in dims), sum(heads * longest(dim) for heads, dim in dims)
        if budget is None:
            total = int(sum(heads * dim for heads, dim in dims) * self.bits / 8 + 1e-9)
        else:
            granted, floor = budget.share(shape, length), self.share(shape, length, least)
            if floor > granted:
                because = f"a byte a token, {self.residual} newest and {self.sink} first tokens exact"
                raise holds_more(self, floor, length, because, "raise the budget or lower residual")
            total = int((granted - self.share(shape, length, 0)) * shape.dense_kv_bytes(length) / max(1, length) + 1e-6)
        return min(max(total, least), most)

    def _dims(self, shape: ModelShape) -> list[tuple[int, int]]:
        """Kv heads and dimensions of each side of the layers that are packed."""
        full = [layer for layer in shape.layers if layer.kind == "full"]
        return [(layer.store_heads, dim) for layer in full for dim in (layer.store_k_dim, layer.store_v_dim)]

    def share(self, shape: ModelShape, length: int, total: int | None = None) -> float:
        """Share of the dense cache that is held at this length, with all the room of the exact tail.

        Args:
            total: bytes of a packed token in all layers; None: those of `bits`.
        """
        total = self._total(shape, length) if total is None else total
        if total is None:
            return 1.0
        size, exact = shape.dtype.itemsize, min(length, max(self.residual, SPARE)) + min(length, self.sink)
        own = sum(
            heads * ((length - exact) * dim * size - torch.int16.itemsize - PAIR_BYTES / 2)
            for heads, dim in self._dims(shape)
        )
        return 1 - (own - length * total) / shape.dense_kv_bytes(length)

    def stand_in(self, shape: ModelShape) -> Profile:
        """Random orthogonal bases whose components' variances fall by a factor of 100; layers are worth the same."""
        generator, tensors = torch.Generator().manual_seed(0), {}
        weights: dict[str, list[float]] = {}
        for layer in shape.layers:
            for name, dim in zip(SIDES, (layer.store_k_dim, layer.store_v_dim), strict=True):
                if layer.kind == "full" and not layer.latent:
                    axes = torch.linalg.qr(torch.randn(layer.store_heads, dim, dim, generator=generator))[0]
                    spread = axes * torch.logspace(0, -1, dim)
                    tensors |= held(layer.index, name, torch.zeros(layer.store_heads, dim), spread @ axes.mT * spread)
                    weights[f"{layer.index}.{name}"] = [1.0] * layer.store_heads
        return made_up(self.id, shape, {"first": FIRST, "weights": weights}, tensors)

    def calibrate(
        self, probe: Probe, data: Iterable[Example] | None = None, *, texts: int = 16, length: int = 4096
    ) -> Profile:
        """Fit the bases to texts of an eighth, a quarter, a half and all of `length`: plain text, some with passkeys in
        it, and a few of random identifiers. What errors cost is found on more such texts of an eighth and a quarter.

        Args:
            probe: the model, its tokenizer, a seed.
            data: texts instead, for both; they are judged at their labels.
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
        read = [] if data is None else [(x.ids, max(1, x.labels)) for x in islice(data, texts)]
        asked = read or asked_texts(probe.tokenizer, (length // 8, length // 4), -(-texts // 6), probe.seed + texts)
        ids = [x for x, _ in read] or list(islice(mixed_texts(probe.tokenizer, length, probe.seed), texts))
        report, began = probe.progress(len(ids) + len(asked), self.id), time.perf_counter()
        tensors, weights = fit(probe.model, ids, asked, FIRST, probe.seed, report)
        made: dict[str, Any] = {"tokens": sum(map(len, ids)), "texts": len(ids), "seed": probe.seed}
        made |= {"longest": max(map(len, ids)), "asked": len(asked), "seconds": round(time.perf_counter() - began, 1)}
        known = {"first": FIRST, "weights": weights}
        return Profile(self.id, fingerprint(shape), known, made | made_with(probe.model), tensors)
