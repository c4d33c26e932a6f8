"""Low-rank bases that consecutive layers share: which layers, and what they hold at which rank.

Source: xKV (2503.18893), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.models.shape import LayerShape, ModelShape


def joined(shape: ModelShape, size: int) -> list[list[LayerShape]]:
    """Groups of `size` layers that follow each other; the last one may be smaller."""
    full = [layer for layer in shape.layers if layer.kind == "full"]
    return [full[i : i + size] for i in range(0, len(full), size)]


def joint_share(shape: ModelShape, size: int, length: int, ranks: tuple[int, int]) -> float:
    """Share of the dense cache that is held at this length with these ranks of keys and of values."""
    spared = 0
    for layers in joined(shape, size):
        for rank, width in zip(ranks, widths(layers), strict=True):
            spared += max(0, length * width - packed(length, width, rank))
    return 1 - spared * shape.dtype.itemsize / shape.dense_kv_bytes(length)


def widths(layers: Sequence[LayerShape]) -> tuple[int, int]:
    """Numbers of all keys and of all values of one token in a group that are held together."""
    if layers[0].latent:
        return sum(x.latent_dim for x in layers), 0
    return sum(x.store_heads * x.store_k_dim for x in layers), sum(x.store_heads * x.store_v_dim for x in layers)


def whole(rank: int) -> int:
    """A rank, in eights where these are a hundredth of it: matrix units are several times as slow on rows between."""
    return max(1, rank) if rank < 512 else rank // 8 * 8


def packed(length: int, width: int, rank: int) -> int:
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


def low_rank(length: int, width: int, rank: int) -> LowRank | None:
    """The side of a group whose tokens have `width` numbers; None where it would not hold less."""
    return LowRank(rank) if 0 < packed(length, width, rank) < length * width else None
