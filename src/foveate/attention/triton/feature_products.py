"""Scores of blocks of keys by one feature each, for the many queries of a prompt.

Features are float32, and half-precision queries meet them exactly: a float32 number is the sum of three of bfloat16.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit(do_not_specialize=["queries", "across"])
def _products(
    q, features, high, sure, out, queries, blocks, across, scale, softcap, qsb, qsh, qsn, fsb, fsh, fsn, hsb, ssb,
    HEADS: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    unit = (tl.program_id(0) // across).to(tl.int64)
    b, h = unit // HEADS, unit % HEADS
    # Late queries choose among most blocks: they run first.
    i = (across - 1 - tl.program_id(0) % across) * BM + tl.arange(0, BM)
    real, d = i < queries, tl.arange(0, D)
    edge = tl.load(high + b * hsb + i, mask=real, other=0)
    begin = tl.full([BM], 1 << 30, tl.int32)
    if sure is not None:
        begin = tl.load(sure + b * ssb + i, mask=real, other=0)
    q_at = q + b * qsb + h * qsh + i.to(tl.int64)[:, None] * qsn + d[None, :]
    x = tl.load(q_at, mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    base = features + b * fsb + h // SHARE * fsh
    to = out + (unit * queries + i)[:, None] * blocks
    used = tl.minimum(tl.maximum(tl.max(edge, 0), 0), blocks)
    for start in tl.range(0, used, BN):
        n = start + tl.arange(0, BN)
        at = base + n.to(tl.int64)[:, None] * fsn + d[None, :]
        there = (n < blocks)[:, None] & (d < DIM)[None, :]
        s = tl.zeros([BM, BN], tl.float32)
        for part in tl.static_range(PARTS):  # the smallest first
            y = tl.load(at + (PARTS - 1 - part) * DIM, mask=there, other=0.0)
            s = tl.dot(x, tl.trans(y), s, input_precision="tf32x3")
        s *= scale
        if CAPPED:
            s = softcap * (1 - 2 / (1 + tl.exp2(s * (2 * 1.4426950408889634) / softcap)))
        if sure is not None:
            s = tl.where((n == 0)[None, :] | (n[None, :] >= begin[:, None]), float("inf"), s)
        s = tl.where(n[None, :] < edge[:, None], s, float("-inf"))
        tl.store(to + n[None, :], s, mask=real[:, None] & (n < blocks)[None, :])
    nothing = tl.full([BM, BN], float("-inf"), tl.float32)
    for start in tl.range((used + BN - 1) // BN * BN, blocks, BN):
        n = start + tl.arange(0, BN)
        tl.store(to + n[None, :], nothing, mask=real[:, None] & (n < blocks)[None, :])


def feature_products(
    q: Tensor,
    features: Tensor,
    high: Tensor,
    sure: Tensor | None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Products of queries with the features of blocks, those that a query does not choose from left out.

    Args:
        q: [B, H, N, D], where they meet features, adjacent channels; N is not 0.
        features: float32 [B, h, n, D], H / h query heads share one.
        high: int [B, N]: blocks from here on get -inf.
        sure: int [B, N]: block 0 and those from here on get inf, if they do not get -inf; None: nobody does.

    Returns:
        float32 [B, H, N, n].
    """
    (batch, heads, queries, dim), (rows, stores, blocks, wide) = q.shape, features.shape
    if rows != batch or wide != dim or heads % stores or q.stride(3) != 1 or features.dtype != torch.float32:
        given = f"q {tuple(q.shape)}, features {tuple(features.shape)} {features.dtype}"
        raise BadArgument("q", given, "give queries with adjacent channels and float32 features that fit them")
    if any(x is not None and x.shape != (batch, queries) for x in (high, sure)):
        raise BadArgument("high", tuple(high.shape), f"one number a query, as `sure`: {(batch, queries)}")
    parts = 1
    if q.dtype == torch.bfloat16:
        features, parts = _in_parts(features), 3
    elif q.dtype != torch.float32:
        q = q.float()
    features = features if features.stride(3) == 1 else features.contiguous()
    high, sure = high.int().contiguous(), None if sure is None else sure.int().contiguous()
    out = torch.empty(batch, heads, queries, blocks, dtype=torch.float32, device=q.device)
    tile = (128, 64) if parts == 3 and dim <= 128 else (32, 32)
    across = -(-queries // tile[0])
    if blocks:
        _products[(batch * heads * across,)](
            q, features, high, sure, out, queries, blocks, across, scale, softcap or 0.0, *q.stride()[:3],
            *features.stride()[:3], high.stride(0), 0 if sure is None else sure.stride(0), HEADS=heads,
            SHARE=heads // stores, PARTS=parts, DIM=dim, D=max(16, power_of_two(dim)), CAPPED=softcap is not None,
            BM=tile[0], BN=tile[1], num_warps=8 if tile[0] == 128 else 4, num_stages=1, maxnreg=128,
        )  # fmt: skip
    return out


def _in_parts(x: Tensor) -> Tensor:
    """Float32 x [..., D] as three numbers of bfloat16 whose sum it is, the largest first: [..., 3 D]."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return torch.cat(parts, dim=-1)
