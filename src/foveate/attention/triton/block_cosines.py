"""Cosines of single queries and what blocks of keys are known by, all heads of a layer side by side.

One pass over what is known: products and lengths come of the same numbers. The queries are turned as they are read.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.turning import channels, halves, others, turned
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument

TILE = 16
"""Blocks of a program."""


@jit
def _row(x, d, inside):
    return tl.load(x + d, mask=inside, other=0.0).to(tl.float32)


@jit(do_not_specialize=["blocks", "place", "ahead"])
def _cosines(
    q, known, lengths, frequencies, out, place, ahead, blocks, stride_l, stride_b, stride_h, stride_n,
    STORES: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, RP: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n, d, g = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, FP), tl.arange(0, GP)
    length = tl.load(lengths + b * stride_l)
    ready = tl.maximum(length - ahead, 0) // SIZE
    keep = (n < blocks) & (n < ready)
    angle = (place - (length - 1)).to(tl.float32) * tl.load(frequencies + d, mask=d < F, other=0.0)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    kind = q.dtype.element_ty  # queries that are turned elsewhere are rounded, too
    both, size, mine = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), 0.0
    inside = keep[:, None] & (d < F)[None, :]
    for h in range(STORES):
        offsets = ((b * STORES + h) * GROUP + g) * DK
        x1, x2 = halves(q, offsets, g < GROUP, FIRST, F, FP)
        x1, x2 = turned(x1, x2, cos, sin)
        x1, x2 = x1.to(kind).to(tl.float32), x2.to(kind).to(tl.float32)
        mine += tl.sum(tl.sum(x1 * x1 + x2 * x2, 1), 0)
        at = known + b * stride_b + h * stride_h + n.to(tl.int64)[:, None] * stride_n
        y1, y2 = _row(at + FIRST, d[None, :], inside), _row(at + FIRST + F, d[None, :], inside)
        both += tl.sum(y1 * tl.sum(x1, 0)[None, :] + y2 * tl.sum(x2, 0)[None, :], 1)
        size += tl.sum(y1 * y1 + y2 * y2, 1)
        if REST:
            r = tl.arange(0, RP)
            x3 = others(q, offsets, g < GROUP, OTHERS, REST, RP).to(tl.float32)
            mine += tl.sum(tl.sum(x3 * x3, 1), 0)
            y3 = _row(at + OTHERS, r[None, :], keep[:, None] & (r < REST)[None, :])
            both += tl.sum(y3 * tl.sum(x3, 0)[None, :], 1)
            size += tl.sum(y3 * y3, 1)
    s = both / tl.maximum(tl.sqrt(size * GROUP) * tl.sqrt(mine), 1e-12)
    tl.store(out + b * blocks + n, tl.where(keep, s, float("-inf")), mask=n < blocks)


def block_cosines(
    q: Tensor, known: Tensor, lengths: Tensor, angles: Angles, *, place: int, ahead: int, size: int
) -> Tensor:
    """Cosines of the queries of a step, turned to one position, and vectors of blocks, each repeated for the query
    heads of its store head.

    Args:
        q: [B, H, 1, D], rotated, standing at lengths - 1.
        known: float32 [B, Hs, n, D], adjacent channels.
        lengths: int32 [B * Hs], the same for all heads of a row.
        angles: by how much queries are turned at each position.
        place: where all queries stand.
        ahead: tokens of each row that belong to no block, the newest one counted.
        size: tokens of a block.

    Returns:
        float32 [B, n], -inf from the first block on that the row does not hold.
    """
    (batch, heads, queries, dim), (rows, stores, _, wide) = q.shape, known.shape
    if queries != 1 or rows != batch or wide != dim or heads % stores or not angles.fit(dim):
        given = f"q {tuple(q.shape)}, known {tuple(known.shape)}, {angles.frequencies.numel()} frequencies"
        raise BadArgument("q", given, "give one query per row, vectors that fit it, a frequency for each pair")
    if known.dtype != torch.float32 or known.stride(3) != 1:
        raise BadArgument("known", f"{known.dtype} {known.stride()}", "give float32 with adjacent channels")
    if lengths.shape != (batch * stores,) or lengths.dtype != torch.int32:
        raise BadArgument("lengths", f"{tuple(lengths.shape)} {lengths.dtype}", f"give int32 [{batch * stores}]")
    speed = angles.frequencies.to(q.device).float().contiguous()
    return _op(q.contiguous(), known, lengths.contiguous(), speed, angles.last, place, ahead, size)


@torch.library.custom_op(
    "foveate::block_cosines",
    mutates_args=(),
    schema="(Tensor q, Tensor known, Tensor lengths, Tensor frequencies, bool last, SymInt place, SymInt ahead, "
    "SymInt size) -> Tensor",
)
def _op(
    q: Tensor, known: Tensor, lengths: Tensor, frequencies: Tensor, last: bool, place: int, ahead: int, size: int
) -> Tensor:
    (batch, heads, _, dim), (_, stores, blocks, _) = q.shape, known.shape
    out = torch.empty(batch, blocks, dtype=torch.float32, device=q.device)
    _cosines[(batch, -(-blocks // TILE))](
        q, known, lengths, frequencies, out, place, ahead, blocks, stores, *known.stride()[:3], STORES=stores,
        GROUP=heads // stores, GP=power_of_two(heads // stores), SIZE=size, TILE=TILE,
        **channels(dim, frequencies.numel(), last), num_warps=4,
    )  # fmt: skip
    return out


@_op.register_fake
def _(q: Tensor, known: Tensor, *others: object) -> Tensor:
    return known.new_empty(known.shape[0], known.shape[2])
