"""X-EcoMLA: latent attention from the weights alone, to be trained afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveate.compat import is_latent
from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.latent_init import ROPE_ROWS, check_numbers, largest_rank, put_latent, stacked
from foveate.errors import BadArgument, Infeasible, Refused
from foveate.models.converted import decoder_layers
from foveate.models.weights import HeadWeights, read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foveate.models.shape import ModelShape

MODES = ("fixed", "energy")


@register
@dataclass(frozen=True)
class XEcoMLA(Conversion):
    """X-EcoMLA's upcycling of attention into MLA (2503.11132, section 3.2), which looks at no text.

    One SVD of a layer's keys and values, repeated to all heads, gives the latent, one of its queries theirs, and the
    mean of its key heads the one rotated key (`latent_init.joint_svd`). Most of a head's dims lose their position and
    the rest are turned otherwise than before, so that the model is another one at any rank: it is where training
    begins (`foveate heal`), and useless without.

    Args:
        kv: share of a dense layer's cache bytes per token that a latent and its rotated key take; sets the rank where
            `mode` is "fixed" and no rank is given.
        rank: of the latent, in every layer; None: from kv.
        mode: "fixed", one rank for all layers; "energy", each layer's own, from `energy`.
        energy: the largest rank whose share of the energy of keys and values is not above this one, rounded up to a
            multiple of 8 (so it may exceed it). kv and rank then say nothing.
        q_rank: of the queries' latent; None: one matrix.
        rope_dim: dims that stay rotated; None: half of the head, as published for heads of 64.
        nope_dim: dims without a position; None: all others.
        rope_rows: which dims stay rotated: "last", as published, "even" or "fastest" (see `latent_init.joint_svd`).
            The published ones are all imaginary parts, which are paired anew; the others keep their pairs and speeds.
        layers: which to convert, by number; None: all.
    """

    id: ClassVar[str] = "x-ecomla"
    what: ClassVar[str] = "grouped-query attention to MLA by one SVD of the weights, to be trained (X-EcoMLA)"

    kv: float = 0.25
    rank: int | None = None
    mode: str = "fixed"
    energy: float = 0.95
    q_rank: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    rope_rows: str = "last"
    layers: Sequence[int] | None = None

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("rope_rows", self.rope_rows, ROPE_ROWS)):
            if value not in known:
                raise BadArgument(name, value, f"give one of {', '.join(known)}")
        if not 0 < self.energy <= 1:
            raise BadArgument("energy", self.energy, "give a share above 0, up to 1")
        if not 0 < self.kv <= 1:
            raise BadArgument("kv", self.kv, "give a share above 0, up to 1")
        layers = decoder_layers(model)
        for index in self._chosen(len(layers)):
            module = layers[index].self_attn
            if is_latent(module):
                raise Refused(f"layer {index} of {shape.name} is latent attention already")
            weights = read_heads(module)
            rank = self._rank(weights) if self.mode == "fixed" else 1
            check_numbers(weights, rank, **self._numbers(weights))

    @torch.no_grad()
    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        ranks, shares, energies, queries = [], [], [], []
        layers = decoder_layers(model)
        for index in self._chosen(len(layers)):
            calibration.watch(f"factorising layer {index + 1} of {len(layers)}")
            weights = read_heads(layers[index].self_attn)
            rank = self._rank(weights)
            made = put_latent(model, index, rank=rank, **self._numbers(weights))
            ranks.append(rank)
            shares.append((rank + self._rope_dim(weights)) / _dense(weights))
            energies.append(made.kv_energy)
            queries.append(made.q_energy)
        facts = {"rank": ranks, "share": shares, "kv_energy": energies, "q_energy": queries}
        yield Stage("latent by SVD", False, facts)

    def _chosen(self, count: int) -> list[int]:
        chosen = list(range(count)) if self.layers is None else sorted(set(self.layers))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
            raise BadArgument("layers", self.layers, f"give some of 0 to {count - 1}")
        return chosen

    def _rope_dim(self, weights: HeadWeights) -> int:
        return weights.q.shape[1] // 2 if self.rope_dim is None else self.rope_dim

    def _numbers(self, weights: HeadWeights) -> dict[str, Any]:
        return {
            "rope_dim": self._rope_dim(weights),
            "nope_dim": self.nope_dim,
            "q_rank": self.q_rank,
            "rope_rows": self.rope_rows,
        }

    def _rank(self, weights: HeadWeights) -> int:
        most = largest_rank(weights)
        if self.mode == "energy":
            return energy_rank(torch.linalg.svdvals(stacked(weights)).square(), self.energy, most)
        if self.rank is not None:
            return self.rank
        dense, rope_dim = _dense(weights), self._rope_dim(weights)
        rank = int(self.kv * dense + 1e-9) - rope_dim
        if rank < 1:
            floor = (rope_dim + 1) / dense
            raise Infeasible(
                f"kv={self.kv}: {rope_dim} rotated dims and a latent of 1 take {floor:.4f}; give more, or a smaller "
                "rope_dim",
                floor,
            )
        return min(rank, most)


def energy_rank(energies: Tensor, share: float, most: int) -> int:
    """The count of leading energies [n] whose sum is not above this share of the total, at least 1, rounded up to a
    multiple of 8, at most `most`."""
    count = int((energies.cumsum(0) <= share * energies.sum()).sum())
    return min(-(-max(count, 1) // 8) * 8, most)


def _dense(weights: HeadWeights) -> int:
    """Elements per token that the layer caches as it is."""
    return weights.k.shape[0] * (weights.k.shape[1] + weights.v.shape[1])
