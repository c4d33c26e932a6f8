"""Turning queries and keys by position with some of the frequencies that a model's rotary embedding made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate import compat
from foveate.errors import BadArgument, Refused


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


def frequency_table(config: Any, layer: int) -> tuple[Tensor, float]:
    """Rotary frequencies of one decoder layer, float32 on the CPU, and the factor of its cosines and sines, from the
    configuration alone: for layers that turn what they cached long ago.

    Raises:
        Refused: no rotary embedding, or one whose angles depend on the length.
    """
    family = str(config.model_type).removeprefix("foveate_")
    module = sys.modules[compat.causal_classes(family)[1].__module__]
    cls = next((x for name, x in vars(module).items() if name.endswith("RotaryEmbedding")), None)
    if cls is None:
        raise Refused(f"{family} has no rotary embedding: keys cannot be turned when they are read")
    with torch.device("cpu"):
        made = cls(config=config)
    kinds = getattr(made, "rope_type", "default")
    name = config.layer_types[layer] if isinstance(kinds, dict) else ""
    kind = kinds[name] if isinstance(kinds, dict) else kinds
    if kind in ("dynamic", "longrope"):
        raise Refused(f"{family}: {kind} rotary angles depend on the length, so keys cannot be turned when read")
    prefix = f"{name}_" if name else ""
    factor = getattr(made, f"{prefix}attention_scaling", 1.0)
    return getattr(made, f"{prefix}inv_freq").float(), float(factor)


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
