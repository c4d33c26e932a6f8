"""Heads whose values stand apart from those of the others, and tokens for them before the rest.

Source: Task-KV (2501.15113), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def head_vectors(attention: Tensor, v: Tensor, top: int) -> Tensor:
    """Values [B, Hs, C, D] of each head's `top` most attended tokens, weighted by their attention: [B, Hs, D]."""
    weight, slot = attention.topk(min(top, attention.shape[-1]), dim=-1)
    values = v.gather(2, slot.unsqueeze(-1).expand(*slot.shape, v.shape[-1]))
    return (weight.unsqueeze(-1) * values).sum(2)


def distances(vectors: Tensor) -> Tensor:
    """How far each head's vector lies from the mean of its layer's: [B, Hs] of [B, Hs, D]."""
    if vectors.shape[1] == 2:  # equally far, which rounding must not decide
        return (vectors[:, 0] - vectors[:, 1]).norm(dim=-1, keepdim=True).expand(-1, 2) / 2
    return (vectors - vectors.mean(1, keepdim=True)).norm(dim=-1)


def full_heads(distance: Tensor, far: int) -> list[int]:
    """The `far` heads of the largest distances, in order, then the one of the smallest; among equals the first."""
    found = distance.argsort(descending=True, stable=True).tolist()[:far]
    nearest = int(distance.argmin())
    return found if nearest in found else [*found, nearest]


def divided(lengths: Sequence[int], average: int, least: int, whole: Sequence[int]) -> list[int]:
    """Tokens per head, len(lengths) * average in all or whatever there is: `least` for each, then everything for the
    heads in `whole`, one after the other, as far as it reaches, then equal parts for the rest."""
    found = [min(least, length) for length in lengths]
    spare = len(lengths) * average - sum(found)
    for head in whole:
        given = min(spare, lengths[head] - found[head])
        found[head] += given
        spare -= given
    rest = [head for head in range(len(lengths)) if head not in whole]
    for number, head in enumerate(rest):
        given = min(-(-spare // (len(rest) - number)), lengths[head] - found[head])
        found[head] += given
        spare -= given
    return found


def granted(distance: Tensor, lengths: Tensor, total: Tensor, far: int, least: int) -> Tensor:
    """Tokens of each head, int64 [B, Hs], `total` [B] on average: those of `full_heads` hold whatever there is, as
    far as it reaches. Of heads this far [B, Hs] from the others with so many tokens [B, Hs]."""
    counts = torch.zeros_like(lengths, dtype=torch.int64)
    for row, average in enumerate(total.tolist()):
        whole = full_heads(distance[row], far)
        counts[row] = torch.tensor(divided(lengths[row].tolist(), average, least, whole))
    return counts
