"""Delta streams: channels that follow their tokens by changes of a least size, one token after the other."""

# Kernels are compiled from this text; what their functions return outside of it is nobody's concern.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two

_LANES = 32
"""Channels of a program: one warp, so that as many programs as possible walk side by side."""
_AHEAD = 16
"""Tokens that are fetched together: the walk itself needs a few instructions a token, the memory hundreds of cycles."""


@jit
def _follow(
    tokens, out, before, made, theta, count, channels, stride_r, stride_t, stride_or, stride_ot, stride_b, stride_m,
    LANES: tl.constexpr, AHEAD: tl.constexpr, MADE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = c < channels
    source, target = tokens + row * stride_r + c, out + row * stride_or + c
    kind = tokens.dtype.element_ty
    last = tl.load(before + row * stride_b + c, mask=there, other=0.0).to(tl.float32)
    flags = made + row * stride_m
    for first in range(0, count, AHEAD):
        arrived = ()
        kept = ()
        for i in tl.static_range(AHEAD):
            arrived += (tl.load(source + i * stride_t, mask=there & (first + i < count), other=0.0),)
            if MADE:
                kept += (tl.load(flags + i, mask=first + i < count, other=0),)
        for i in tl.static_range(AHEAD):
            now = arrived[i].to(tl.float32)
            away = tl.abs((now - last).to(kind).to(tl.float32))  # the difference of two numbers of their own kind
            changed = away >= theta
            if MADE:
                changed = changed | (kept[i] != 0)
            last = tl.where(changed, now, last)
            tl.store(target + i * stride_ot, last.to(kind), mask=there & (first + i < count))
        source += AHEAD * stride_t
        target += AHEAD * stride_ot
        flags += AHEAD


def follow(tokens: Tensor, theta: float, before: Tensor, made: Tensor | None) -> Tensor:
    """References of the tokens: a channel takes over the token's number where that is at least `theta` away from the
    channel's reference before it, and else keeps that. In one launch, the tokens in turn.

    Args:
        tokens: [R, n, D]; before: [R, D], references of the tokens before.
        made: bool [R, n], tokens that are their own reference whatever the distance; None: none is.

    Returns:
        [R, n, D].
    """
    rows, count, channels = tokens.shape
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    before, out = before.contiguous(), torch.empty_like(tokens, memory_format=torch.contiguous_format)
    flags = None if made is None else made.contiguous().view(torch.uint8)
    lanes = min(_LANES, power_of_two(channels))
    least = float(torch.tensor(theta, dtype=tokens.dtype))  # as PyTorch compares
    _follow[(rows, -(-channels // lanes))](
        tokens, out, before, tokens if flags is None else flags, least, count, channels,
        tokens.stride(0), tokens.stride(1), out.stride(0), out.stride(1), channels, count,
        LANES=lanes, AHEAD=_AHEAD, MADE=flags is not None, num_warps=1,
    )  # fmt: skip
    return out
