"""Scores of blocks of keys by one feature each, for single queries that are turned as they are read."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.turning import channels, circle, turned
from foveate.attention.triton.workers import jit
from foveate.errors import BadArgument

TILE = 32
"""Blocks of a program."""


@jit
def _row(x, d, inside):
    return tl.load(x + d, mask=inside, other=0.0).to(tl.float32)


@jit(do_not_specialize=["blocks", "place"])
def _scores(
    q, features, own, high, sure, frequencies, out, place, blocks, scale, softcap, stride_b, stride_h, stride_n,
    HEADS: tl.constexpr, SHARE: tl.constexpr, TILE: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, RP: tl.constexpr, OTHERS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    b, head = unit // HEADS, unit % HEADS // SHARE
    n, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, FP)
    keep = (n < blocks) & (n < tl.load(high + b))
    cos, sin = circle((place - tl.load(own + b)).to(tl.float32) * tl.load(frequencies + d, mask=d < F, other=0.0))
    row = q + unit * DK
    x1, x2 = turned(_row(row + FIRST, d, d < F), _row(row + FIRST + F, d, d < F), cos, sin)
    kind = q.dtype.element_ty  # queries that are turned elsewhere are rounded, too
    x1, x2 = x1.to(kind).to(tl.float32), x2.to(kind).to(tl.float32)
    at = features + b * stride_b + head * stride_h + n.to(tl.int64)[:, None] * stride_n
    inside = keep[:, None] & (d < F)[None, :]
    s = tl.sum(
        _row(at + FIRST, d[None, :], inside) * x1[None, :] + _row(at + FIRST + F, d[None, :], inside) * x2[None, :], 1
    )
    if REST:
        r = tl.arange(0, RP)
        x3 = _row(row + OTHERS, r, r < REST)
        s += tl.sum(_row(at + OTHERS, r[None, :], keep[:, None] & (r < REST)[None, :]) * x3[None, :], 1)
    s *= scale
    if CAPPED:
        s = softcap * (1 - 2 / (1 + tl.exp2(s * (2 * 1.4426950408889634) / softcap)))
    if sure is not None:
        s = tl.where((n == 0) | (n >= tl.load(sure + b)), float("inf"), s)
    tl.store(out + unit * blocks + n, tl.where(keep, s, float("-inf")), mask=n < blocks)


def feature_scores(
    q: Tensor,
    features: Tensor,
    own: Tensor,
    high: Tensor,
    sure: Tensor | None,
    angles: Angles,
    *,
    place: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Products of single queries with the features of blocks, the queries turned from where they stand to `place`.

    Args:
        q: [B, H, 1, D], rotated.
        features: float32 [B, h, n, D], adjacent channels, H / h query heads share one.
        own: int64 [B], where the queries stand.
        high: int64 [B]: blocks from here on get -inf.
        sure: int64 [B]: block 0 and those from here on get inf, if they do not get -inf; None: nobody does.
        angles: by how much queries are turned at each position.

    Returns:
        float32 [B, H, 1, n].
    """
    (batch, heads, queries, dim), (rows, stores, _, wide) = q.shape, features.shape
    if queries != 1 or rows != batch or wide != dim or heads % stores or not angles.fit(dim):
        given = f"q {tuple(q.shape)}, features {tuple(features.shape)}, {angles.frequencies.numel()} frequencies"
        raise BadArgument("q", given, "give one query per row, features that fit it, a frequency for each pair")
    if features.dtype != torch.float32 or features.stride(3) != 1:
        raise BadArgument("features", f"{features.dtype} {features.stride()}", "give float32 with adjacent channels")
    if any(x is not None and (x.shape != (batch,) or x.dtype != torch.int64) for x in (own, high, sure)):
        raise BadArgument("own", f"{tuple(own.shape)} {own.dtype}", f"give int64 [{batch}], as `high` and `sure`")
    speed = angles.frequencies.to(q.device).float().contiguous()
    given = (own.contiguous(), high.contiguous(), None if sure is None else sure.contiguous())
    return _op(q.contiguous(), features, *given, speed, angles.last, place, scale, softcap)


@torch.library.custom_op(
    "foveate::feature_scores",
    mutates_args=(),
    schema="(Tensor q, Tensor features, Tensor own, Tensor high, Tensor? sure, Tensor frequencies, bool last, "
    "SymInt place, float scale, float? softcap) -> Tensor",
)
def _op(
    q: Tensor,
    features: Tensor,
    own: Tensor,
    high: Tensor,
    sure: Tensor | None,
    frequencies: Tensor,
    last: bool,
    place: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    (batch, heads, _, dim), (_, stores, blocks, _) = q.shape, features.shape
    out = torch.empty(batch, heads, 1, blocks, dtype=torch.float32, device=q.device)
    _scores[(batch * heads, -(-blocks // TILE))](
        q, features, own, high, sure, frequencies, out, place, blocks, scale, softcap or 0.0, *features.stride()[:3],
        HEADS=heads, SHARE=heads // stores, TILE=TILE, **channels(dim, frequencies.numel(), last),
        CAPPED=softcap is not None, num_warps=4,
    )  # fmt: skip
    return out


@_op.register_fake
def _(q: Tensor, features: Tensor, *others: object) -> Tensor:
    return features.new_empty(*q.shape[:3], features.shape[2])
