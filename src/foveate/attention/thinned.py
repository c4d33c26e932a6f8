"""Decode steps over keys of which the older ones have lost channels (Triton)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from foveate.attention import decoding
from foveate.attention.selection import Partial


def attend(
    q: Tensor, keys: tuple[Tensor, Tensor, Tensor, Tensor], v: Tensor, lengths: Tensor, scale: float,
    softcap: float | None,
) -> Partial | None:  # fmt: skip
    """Attention of q [P, G, 1, Dk] over the first `lengths` (int32 [P]) tokens, with values v [P, C, Dv]; None where no
    kernel can.

    Args:
        keys: the fields of `triton.decode_thin.ThinKeys`.
    """
    if not decoding.serves(q)[0] or any(x.dtype != q.dtype for x in (keys[0], keys[2], v)):
        return None
    kernels: Any = import_module("foveate.attention.triton.decode_thin")
    if q.shape[1] > kernels.ROWS:
        return None
    return Partial(*kernels.decode_thin(q, kernels.ThinKeys(*keys), v, lengths, scale, softcap))
