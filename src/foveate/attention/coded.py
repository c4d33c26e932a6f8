"""Decode steps over tokens that are held as codes of components in a basis (Triton)."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.attention import decoding
from foveate.attention.selection import Partial


class Coding(NamedTuple):
    """How rows of bits stand for tokens: a token of kv head h is mean[h] + size * level @ back[h].

    Args:
        mean: float32 [H, D].
        back: float32 [H, C, D].
        fields: int32 [H, 3, C]: the byte of a row where each component's code begins, as far as the next byte is one of
            the row, too; how many bits lie before the code from there on; and what it is cut out by, of at most 8 bits.
            A code of mask m stands for level number code + m; a component of no bits has mask 0.
        levels: [511], of `levels_dtype`.
        sizes: float32 [32], by the code of a token's size, which is in the low bits of its first byte; 0 for the codes
            that say that a token is one of the first, which are held exactly.
        pointers: the first of those codes.
    """

    mean: Tensor
    back: Tensor
    fields: Tensor
    levels: Tensor
    sizes: Tensor
    pointers: int


class CodedSide(NamedTuple):
    """Keys or values of P pairs: coded tokens, and the exact ones behind them.

    Args:
        codes: uint8 [P, n, row], tokens next to each other.
        tail: [P, T, D]; its first slot holds token packed[p] of pair p.
        packed: int32 [P] on the device: tokens that are read from their codes.
        heads: int16 [P], the number of each pair's kv head.
        first: [P, s, D], the first tokens, which codes point to; s may be 0.
        coding: of all heads.
    """

    codes: Tensor
    tail: Tensor
    packed: Tensor
    heads: Tensor
    first: Tensor
    coding: Coding


def levels_dtype(dtype: torch.dtype) -> torch.dtype:
    """What queries of this dtype meet levels in: float16 for bfloat16, too, since it is more exact and both are scaled
    to its range."""
    return torch.float16 if dtype.itemsize == 2 else torch.float32


def attend(
    q: Tensor, keys: CodedSide, values: CodedSide, lengths: Tensor, scale: float, softcap: float | None
) -> Partial | None:
    """Attention of q [P, G, 1, Dk] over the first `lengths` (int32 [P]) tokens; None where no kernel can."""
    if not decoding.serves(q)[0] or any(x.tail.dtype != q.dtype for x in (keys, values)):
        return None
    kernels: Any = import_module("foveate.attention.triton.decode_coded")
    return Partial(*kernels.decode_coded(q, keys, values, lengths, scale, softcap))
