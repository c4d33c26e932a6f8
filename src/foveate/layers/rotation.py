"""Turning queries and keys by position with some of the frequencies that a model's rotary embedding made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.errors import BadArgument


def evenly(pairs: int, base: int) -> list[int]:
    """Indices of `pairs` frequencies out of `base`, every (base / pairs)-th from the first on.

    With frequencies theta^(-2i/D) these are the theta^(-2i/d) of a head of d = 2 * pairs dims.

    Raises:
        BadArgument: `pairs` does not divide `base`.
    """
    if pairs == 0:
        return []
    if base % pairs:
        raise BadArgument("rope_dim", 2 * pairs, f"give a divisor of the model's {2 * base} rotated dims")
    return list(range(0, base, base // pairs))


def angles(position_embeddings: Any, frequencies: Sequence[int] | None, pairs: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the chosen frequencies, each [B, 1, N, pairs].

    Args:
        position_embeddings: what a decoder hands its layers: (cos, sin), each [B, N, 2F] with both halves equal, or one
            complex tensor [B, N, F] (DeepSeek-V2).
        frequencies: indices in 0..F-1, one for each pair, repeated as often as wanted; None: every (F / pairs)-th.

    Raises:
        BadArgument: no such frequency.
    """
    if isinstance(position_embeddings, Tensor):
        cos, sin = position_embeddings.real, position_embeddings.imag
    else:
        cos, sin = (x[..., : x.shape[-1] // 2] for x in position_embeddings)
    base = cos.shape[-1]
    if frequencies is None:
        frequencies = evenly(pairs, base)
    if max(frequencies, default=0) >= base:
        raise BadArgument("frequencies", max(frequencies), f"the model's rotary embedding has {base}, from 0 on")
    index = torch.as_tensor(frequencies, dtype=torch.long, device=cos.device)
    return cos.index_select(-1, index).unsqueeze(1), sin.index_select(-1, index).unsqueeze(1)


def rotate_half(x: Tensor) -> Tensor:
    """The quarter turn of half-split pairs: (a, b) becomes (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the pairs of x [B, heads, N, 2 * pairs] by angles [B, 1, N, pairs]. The result is half-split.

    Args:
        interleaved: the pairs of x are its dims (2i, 2i + 1), as in DeepSeek's checkpoints, not (i, i + pairs).
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
