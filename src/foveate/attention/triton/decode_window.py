"""Decode over a full window and the first tokens in front of it, which the queries meet from elsewhere, in one read.

Source: positions inside the cache, StreamingLLM (2309.17453), section 3.2.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode_lists import tuning
from foveate.attention.triton.splits import merge_splits
from foveate.attention.triton.workers import (
    check_heads,
    in_base_2,
    jit,
    leave,
    multiprocessors,
    partials,
    power_of_two,
    precision_of,
    read_tokens,
    rows_of_q,
    shapes,
)
from foveate.errors import BadArgument


@jit
def _turned(
    x, q, at, valid, delta, speeds, FROM: tl.constexpr, SIZE: tl.constexpr, DK: tl.constexpr, FIRST: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Channels FROM.. [M, SIZE] of the query rows `at` [M], turned by delta positions and rounded as they came."""
    d = FROM + tl.arange(0, SIZE)
    rotated = (d >= FIRST) & (d < FIRST + 2 * F)
    half = tl.where(rotated, (d - FIRST) // F, 0)
    angle = delta.to(tl.float32) * tl.load(speeds + (d - FIRST) % F, mask=rotated, other=0.0)
    # Each channel's partner is half a rotation's width away, behind the first half and in front of the second.
    partner = tl.where(half == 0, d + F, d - F)
    other = tl.load(q + at[:, None] * DK + partner[None, :], mask=valid[:, None] & rotated[None, :], other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    sin = tl.where(half == 0, -sin, sin)
    return (x.to(tl.float32) * cos[None, :] + other.to(tl.float32) * sin[None, :]).to(x.dtype)


@jit(do_not_specialize=["used", "sink", "splits", "per"])
def _read(
    q, k, v, place, seen, speeds, part, weight, factor, softcap, used, sink, splits, per, stride_k, stride_kt, stride_v,
    stride_vt, STORES: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first piece is that of the first tokens, to which the queries are moved; the others divide the window."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, M)
    valid = row < R
    at = pair * R + row
    q0, q1 = rows_of_q(q, at, valid, DK, K0, K1)
    delta = tl.load(place + pair // STORES) - (tl.load(seen + pair) - 1)
    if split == 0:
        q0 = _turned(q0, q, at, valid, delta, speeds, 0, K0, DK, FIRST, F)
        if K1:
            q1 = _turned(q1, q, at, valid, delta, speeds, K0, K1, DK, FIRST, F)
    begin = tl.where(split == 0, 0, sink + (split - 1) * per)
    end = tl.where(split == 0, sink, tl.minimum(begin + per, used))
    kp, vp = k + pair * stride_k, v + pair * stride_v
    n = tl.arange(0, BLOCK)
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc0 = tl.zeros([M, V0], tl.float32)
    acc1 = tl.zeros([M, V1 if V1 else 16], tl.float32)
    for j in tl.range(begin, end, BLOCK):
        keep = j + n < end
        far = (j + n).to(tl.int64)
        acc0, acc1, top, mass = read_tokens(
            q0, q1, kp, vp, far, keep, acc0, acc1, top, mass, factor, softcap, stride_kt, stride_vt, DK, DV, K0, K1, V0,
            V1, CAPPED, PRECISION,
        )  # fmt: skip
    leave(part, weight, pair * splits + split, row, valid, acc0, acc1, top, mass, R, DV, V0, V1)


def decode_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: int,
    place: Tensor,
    seen: Tensor,
    frequencies: Tensor,
    *,
    last: bool = False,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row over slots that are all in use: those from `sink` on as they are, and the
    first ones with the query turned to another position.

    Args:
        q: [B, H, 1, Dk], rotated.
        k, v: [B * Hs, C, Dk] and [B * Hs, C, Dv]. v may be a view of k.
        sink: 0..C, the first slots.
        place: int64 [B], the position to which the query is moved for these.
        seen: int64 [B * Hs], one past the query's position.
        frequencies: float32 [F], angle per position of each pair of channels, which lie F apart.
        last: the 2 F rotated channels are the last ones, not the first.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [B, H, 1, Dv] in the dtype of q, lse [B, H, 1] float32.
    """
    (units, used, k_dim), v_dim, pairs = k.shape, v.shape[2], frequencies.numel()
    batch, _, queries, rows = check_heads(q, k_dim, units // max(1, q.shape[0]))
    if queries != 1 or k.stride(2) != 1 or v.stride(2) != 1 or not 0 <= sink <= used or not 0 < 2 * pairs <= k_dim:
        given = f"q {tuple(q.shape)}, sink {sink} of {used} slots, {pairs} frequencies"
        raise BadArgument("q", given, "one query per row, a sink within the slots, pairs within the channels")
    if place.shape != (batch,) or seen.shape != (units,) or {place.dtype, seen.dtype} != {torch.int64}:
        given = f"{place.dtype} {tuple(place.shape)}, seen {seen.dtype} {tuple(seen.shape)}"
        raise BadArgument("place", given, f"give int64 [{batch}] and [{units}]")
    layout = tuning(q, k_dim)
    window = used - sink
    pieces = max(1, min(-(-window // layout.block), layout.per_sm * multiprocessors(q.device) // units))
    per = -(-window // (pieces * layout.block)) * layout.block
    splits = 1 + max(1, -(-window // max(1, per)))
    part, weight = partials(units * splits, rows, v_dim, q.device)
    _read[(units, splits)](
        q.contiguous(), k, v, place, seen, frequencies, part, weight, *in_base_2(scale, softcap), used, sink, splits,
        per, k.stride(0), k.stride(1), v.stride(0), v.stride(1), STORES=units // batch, R=rows,
        M=max(16, power_of_two(rows)), BLOCK=layout.block, FIRST=k_dim - 2 * pairs if last else 0, F=pairs,
        CAPPED=softcap is not None, PRECISION=precision_of(q.dtype), **shapes(k_dim, v_dim),
        num_warps=layout.warps, num_stages=min(3, layout.stages),
    )  # fmt: skip
    return merge_splits(q, part, weight)
