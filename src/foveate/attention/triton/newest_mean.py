"""Means of the keys of blocks that a decode step completes, without their positions, made where they are held.

Every step asks, and nearly all find that no block is complete: then nothing is read. So steps that complete a block are
no other steps than those that do not.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.turning import channels, circle, halves, others, tokens_at_once, turned
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit
def _newest_mean(
    means, k, lengths, frequencies, stride_b, stride_h, stride_n, ksb, ksh, kst, stride_l,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr,
    REST: tl.constexpr, RP: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b * stride_l)
    if (length > 0) & (length % SIZE == 0):
        begin = length - SIZE
        n, d, r = tl.arange(0, BLOCK), tl.arange(0, FP), tl.arange(0, RP if REST else 16)
        speed = tl.load(frequencies + d, mask=d < F, other=0.0)
        kind = k.dtype.element_ty  # keys that are turned elsewhere are rounded, too
        sum1, sum2 = tl.zeros([FP], tl.float32), tl.zeros([FP], tl.float32)
        sum3 = tl.zeros([RP if REST else 16], tl.float32)
        for first in range(0, SIZE, BLOCK):
            slot, keep = begin + first + n, first + n < SIZE
            at = b * ksb + h * ksh + slot.to(tl.int64) * kst
            cos, sin = circle(-slot.to(tl.float32)[:, None] * speed[None, :])
            x1, x2 = halves(k, at, keep, FIRST, F, FP)
            x1, x2 = turned(x1, x2, cos, sin)
            sum1 += tl.sum(x1.to(kind).to(tl.float32), 0)
            sum2 += tl.sum(x2.to(kind).to(tl.float32), 0)
            if REST:
                sum3 += tl.sum(others(k, at, keep, OTHERS, REST, RP).to(tl.float32), 0)
        to = means + b * stride_b + h * stride_h + (begin // SIZE).to(tl.int64) * stride_n
        tl.store(to + FIRST + d, sum1 / SIZE, mask=d < F)
        tl.store(to + FIRST + F + d, sum2 / SIZE, mask=d < F)
        if REST:
            tl.store(to + OTHERS + r, sum3 / SIZE, mask=r < REST)


def newest_mean(means: Tensor, k: Tensor, lengths: Tensor, size: int, angles: Angles) -> None:
    """Write the mean key, at position 0, of each row's newest block to its place, if the block is complete.

    Args:
        means: float32 [B, Hs, n, D], adjacent channels, changed in place; n blocks or more are held.
        k: [B, Hs, C, D], adjacent channels; the key in slot p was turned by p.
        lengths: int32 [B], slots in use.
        size: slots of a block.
        angles: by how much keys are turned at each position.
    """
    if k.dim() != 4 or means.shape[:2] != k.shape[:2] or means.shape[3] != k.shape[3] or not angles.fit(k.shape[3]):
        given = f"{tuple(means.shape)} for keys {tuple(k.shape)}, {angles.frequencies.numel()} frequencies"
        raise BadArgument("means", given, "give [B, Hs, n, D] for keys [B, Hs, C, D], a frequency for each pair")
    if means.dtype != torch.float32 or means.stride(3) != 1 or k.stride(3) != 1 or lengths.shape != k.shape[:1]:
        given = f"{means.dtype}, strides {means.stride()}, {k.stride()}, lengths {tuple(lengths.shape)}"
        raise BadArgument("means", given, "give float32, adjacent channels, one length per row")
    _op(means, k, lengths, size, angles.frequencies.to(k.device).float().contiguous(), angles.last)


@torch.library.custom_op(
    "foveate::newest_mean",
    mutates_args=("means",),
    schema="(Tensor(a!) means, Tensor k, Tensor lengths, SymInt size, Tensor frequencies, bool last) -> ()",
)
def _op(means: Tensor, k: Tensor, lengths: Tensor, size: int, frequencies: Tensor, last: bool) -> None:
    (batch, heads, _, dim), block = k.shape, min(power_of_two(size), tokens_at_once(k.shape[3], 2))
    _newest_mean[(batch, heads)](
        means, k, lengths, frequencies, *means.stride()[:3], *k.stride()[:3], lengths.stride(0),
        SIZE=size, BLOCK=block, **channels(dim, frequencies.numel(), last), num_warps=4,
    )  # fmt: skip


@_op.register_fake
def _(means: Tensor, *others: object) -> None:
    return None
