"""The merge of reads in which each pair's tokens were divided into equally many pieces, whatever there are."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import deliver_channels, jit, join, outputs, power_of_two


@jit(do_not_specialize=["splits"])
def _merge(part, weight, out, lse, splits, R: tl.constexpr, DV: tl.constexpr, PIECE: tl.constexpr, WIDE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    acc = tl.zeros([PIECE], tl.float32)
    top = float("-inf")
    mass = 0.0
    for first in range(0, splits, WIDE):
        n = first + tl.arange(0, WIDE)
        at = (place // R * splits + n) * R + place % R
        e = tl.load(weight + at, mask=n < splits, other=float("-inf"))
        x = part + at[:, None] * DV + d[None, :]
        # What saw nothing may hold anything.
        x = tl.load(x, mask=(e > float("-inf"))[:, None] & (d < DV)[None, :], other=0.0)
        acc, top, mass = join(e, x, acc, top, mass)
    seen = mass > 0
    some = tl.where(seen, mass, 1.0)
    total = tl.where(seen, top + tl.log2(some), float("-inf"))
    deliver_channels(out, lse, place, d, acc / some, total, tl.program_id(1) == 0, DV)


def merge_splits(q: Tensor, part: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and lse of what was found of equally many pieces for each head.

    Args:
        q: [B, H, 1, Dk], for its shape and dtype.
        part: [B * H / R * splits, R, Dv], what was found of the pieces of R heads at a time, which stand side by side;
            weight (log-masses, base 2): [B * H / R * splits, R]; float32.

    Returns:
        out [B, H, 1, Dv] in the dtype of q, lse [B, H, 1] float32; 0 and -inf where nothing was seen.
    """
    (slots, rows, dim), heads = part.shape, q.shape[0] * q.shape[1]
    out, lse = outputs(q, dim)
    # What one load fetches is all that a program waits for, of few parts and of many.
    piece = min(32, power_of_two(dim))
    _merge[(heads, -(-dim // piece))](
        part, weight, out, lse, slots * rows // heads, R=rows, DV=dim, PIECE=piece, WIDE=128, num_warps=4
    )
    return out, lse


def merge_rows(part: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and lse of what many queries found of equally many pieces.

    Args:
        part: [B, H, N, K, Dv], in any dtype; weight: float32 [B * H * N * K], log-masses to the base 2.

    Returns:
        out [B, H, N, Dv] in the dtype of the parts, lse [B, H, N] float32; 0 and -inf where nothing was seen.
    """
    *shape, splits, dim = part.shape
    out = torch.empty(*shape, dim, dtype=part.dtype, device=part.device)
    lse = torch.empty(shape, dtype=torch.float32, device=part.device)
    wide, piece = min(32 if dim <= 128 else 8, power_of_two(splits)), power_of_two(dim)
    _merge[(lse.numel(), 1)](
        part, weight, out, lse, splits, R=1, DV=dim, PIECE=piece, WIDE=wide, num_warps=1 if wide < 32 else 4
    )
    return out, lse
