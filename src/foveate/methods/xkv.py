"""xKV: layers that follow each other hold their prompt in one low-rank basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import Refused
from foveate.methods.base import Codec, Method, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.declared import Joint
from foveate.methods.policies.checks import at_least, holds_more
from foveate.models.shape import LayerShape, ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class XKV(Method):
    """When the prompt is over, the keys of each `group` consecutive layers, heads and layers side by side, are replaced
    by their best approximation of rank `rank_k`, and the values by one of `rank_v`: one vector per token for the whole
    group and a matrix per layer, [M, r] and [r, Hkv * D]. Keys lose their rotation first and are turned to where they
    stand whenever they are read. No calibration: a singular value decomposition per prompt and group. Each sequence
    of a batch has its own.

    What is generated stays exact, as in the paper; so does the prompt's own attention. A side of a group that would
    grow by this (short prompts, high ranks) stays exact as well. Exact keys and values of a group live until its last
    layer has them: the peak is that of one group. Reading makes keys and values of one layer at a time anew. The
    released code multiplies back at once and stores what it had before.

    Under latent attention (MLA) the latents are held so, under `rank_k`; the rotated channels beside them stay exact.
    The last group may be smaller. With `group` 1 it is a decomposition of each layer alone. Assisted decoding whose
    candidates come with the prompt itself is refused: the first layers of a group would still read it exactly.

    Args:
        group: layers that share a basis.
        rank_k, rank_v: of the whole group; released example for 8B models. A budget replaces them by the largest ranks
            in this proportion that meet it, multiples of 8 from 512 on.

    Source: 2503.18893, section 4.
    """

    id = "xkv"
    name = "xKV"
    paper = "2503.18893"
    slots = frozenset({"format"})
    aligned = True
    joint = True
    search = tries(group=(1, 2, 4, 8))

    group: int = 4
    rank_k: int = 512
    rank_v: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, group=1, rank_k=1, rank_v=1)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        if shape.rope.get("type") in ("dynamic", "longrope"):
            raise Refused(f"{self.id} takes keys out of their positions, which {shape.name} lays out by length")
        roles = [Role() for _ in shape.layers]
        ranks = self._ranks(shape, length)
        for layers in self._groups(shape) if ranks else ():
            for layer in layers:
                roles[layer.index] = Role("joint", extra={"layers": tuple(x.index for x in layers), "ranks": ranks})
        return roles

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        if role.name != "joint":
            return None
        layers = [shape.layers[index] for index in role.extra["layers"]]
        keys, values = (
            LowRank(rank) if 0 < _packed(length, width, rank) < length * width else None
            for rank, width in zip(role.extra["ranks"], _widths(layers), strict=True)
        )
        if keys is None and values is None:
            return None
        turned = not layers[0].latent and shape.rope.get("type") not in (None, "none")
        return Codec(None, None, Joint(role.extra["layers"], keys, values, turned))

    def _groups(self, shape: ModelShape) -> list[list[LayerShape]]:
        full = [layer for layer in shape.layers if layer.kind == "full"]
        return [full[i : i + self.group] for i in range(0, len(full), self.group)]

    def _ranks(self, shape: ModelShape, length: int) -> tuple[int, int] | None:
        """Ranks of keys and values, or None where nothing is to be packed."""
        budget = Budget.of(self.budget)
        if budget is None:
            return self.rank_k, self.rank_v
        if budget.whole:
            return None
        granted, both = budget.share(shape, length), self.rank_k + self.rank_v
        widest = max((sum(_widths(layers)) for layers in self._groups(shape)), default=1)

        def ranks(step: int) -> tuple[int, int]:
            return _whole(step * self.rank_k // both), _whole(step * self.rank_v // both)

        floor = self.share(shape, length, ranks(0))
        if floor > granted:
            raise holds_more(self, floor, length, "rank 1", "raise the budget, or group more layers")
        low, high = 0, both * widest // min(self.rank_k, self.rank_v) + 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.share(shape, length, ranks(middle)) <= granted else (low, middle - 1)
        return ranks(low)

    def share(self, shape: ModelShape, length: int, ranks: tuple[int, int]) -> float:
        """Share of the dense cache that is held at this length."""
        saved = 0
        for layers in self._groups(shape):
            for rank, width in zip(ranks, _widths(layers), strict=True):
                saved += max(0, length * width - _packed(length, width, rank))
        return 1 - saved * shape.dtype.itemsize / shape.dense_kv_bytes(length)


def _widths(layers: Sequence[LayerShape]) -> tuple[int, int]:
    """Numbers of all keys and of all values of one token in a group that are held together."""
    if layers[0].latent:
        return sum(x.latent_dim for x in layers), 0
    return sum(x.store_heads * x.store_k_dim for x in layers), sum(x.store_heads * x.store_v_dim for x in layers)


def _whole(rank: int) -> int:
    """A rank, in eights where these are a hundredth of it: matrix units are several times as slow on rows between."""
    return max(1, rank) if rank < 512 else rank // 8 * 8


def _packed(length: int, width: int, rank: int) -> int:
    """Numbers that a basis of this rank and its matrices take."""
    return min(rank, length, width) * (length + width)


@dataclass(frozen=True)
class LowRank:
    """The best approximation of this rank, as a product."""

    rank: int

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, W] -> a [n, r] and b [r, W], r = min(rank, n, W): a @ b is x with its r largest singular values."""
        wide = x.double()
        r = min(self.rank, *x.shape)
        if x.shape[0] < x.shape[1]:
            a = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -r:].flip(1)
            return a, a.T @ wide
        b = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -r:].flip(1)
        return wide @ b, b.T
