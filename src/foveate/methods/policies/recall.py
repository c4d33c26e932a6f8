"""Blocks of the past that a probe recalls: what a block is known by, how it is scored, and how sharp the choice is."""

from __future__ import annotations

import torch
from torch import Tensor


def representative_means(keys: Tensor, mass: Tensor, count: int) -> Tensor:
    """Means of the `count` keys with most mass of each block: keys [B, Hs, blocks, size, D] and mass
    [B, blocks, size] -> [B, Hs, blocks, D]. Ties go to earlier keys."""
    best = mass.argsort(dim=-1, descending=True, stable=True)[:, None, :, :count, None]
    return keys.gather(3, best.expand(-1, keys.shape[1], -1, -1, keys.shape[-1])).mean(3)


def cosines(probes: Tensor, blocks: Tensor) -> Tensor:
    """Cosines [B, pieces, blocks] of probes [B, H, pieces, D] and keys [B, Hs, blocks, D], heads side by side, each
    kv head's key repeated for its query heads."""
    group = probes.shape[1] // blocks.shape[1]
    both = torch.einsum("bspd,bsnd->bpn", probes.unflatten(1, (-1, group)).sum(2), blocks)
    size = (group * blocks.square().sum((1, 3))).sqrt().unsqueeze(1) * probes.square().sum((1, 3)).sqrt().unsqueeze(-1)
    return both / size.clamp_min(1e-12)


def normalised_entropy(scores: Tensor) -> Tensor:
    """Entropy of the softmax of scores [..., n], some of which may be -inf: 1 where all are equal, 0 of a single."""
    share = scores.softmax(-1).nan_to_num(0.0)
    count = (scores > -torch.inf).sum(-1).clamp_min(2)
    return torch.special.entr(share).sum(-1) / count.log()


def taken(left: Tensor, means: Tensor | None, number: int, layers: int, least: int, most: int) -> Tensor:
    """How many of the `left` blocks [B, pieces] layer `number` of `layers` takes: in proportion to its mean entropy
    among those of the layers from it on, at least `least` and at most `most`, which leaves `least` to each of the rest.

    Args:
        means: entropies [B, layers]; a row of which any is negative (unknown) shares equally, as all do without.

    Source: ActQKV (2502.13542), section 3, with its bounds kept from exceeding the whole.
    """
    share = torch.full((len(left), 1), 1 / (layers - number), device=left.device)
    if means is not None:
        own = (means[:, number] / means[:, number:].sum(1)).unsqueeze(1)
        share = torch.where(own.isfinite() & (means >= 0).all(1, keepdim=True), own, share)
    take = (share * left).round().long().clamp(least, most)
    return torch.minimum(take, left - least * (layers - 1 - number))
