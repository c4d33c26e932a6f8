"""Decode over stores whose older keys have lost channels: a query meets them with the channels that are left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import (
    Tuning,
    check_heads,
    deliver_channels,
    gather_channels,
    in_base_2,
    jit,
    leave,
    multiprocessors,
    outputs,
    partials,
    parts_of,
    power_of_two,
    precision_of,
    read_tokens,
    rows_of_q,
    shapes,
    share_of,
)
from foveate.errors import BadArgument

ROWS = 64
"""Most query heads of a store head."""


class ThinKeys(NamedTuple):
    """Keys of P pairs, the older ones thinned.

    Args:
        body: [P, n, kept], tokens next to each other; token i stands in row i.
        channels: int16 [P, kept], which channels these are; all others count as 0.
        tail: [P, T, D], whole keys; its first slot holds token `start`.
        start: int32 [P] on the device: tokens that are read from the body.
    """

    body: Tensor
    channels: Tensor
    tail: Tensor
    start: Tensor


@jit
def _blocks(starts, lengths, units, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of every pair [UNITS], of thin tokens and of whole ones."""
    number = tl.arange(0, UNITS)
    start = tl.load(starts + number, mask=number < units, other=0)
    length = tl.load(lengths + number, mask=number < units, other=0)
    return (start + BLOCK - 1) // BLOCK + (tl.maximum(length - start, 0) + BLOCK - 1) // BLOCK


@jit
def _channels_of_q(
    q, channels, row, valid, FROM: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, DK: tl.constexpr
):  # fmt: skip
    """Those channels of the query rows row [M] that are kept, FROM..: [M, SIZE]."""
    d = FROM + tl.arange(0, SIZE)
    which = tl.load(channels + d, mask=d < KEPT, other=0).to(tl.int32)
    keep = valid[:, None] & (d < KEPT)[None, :]
    return tl.load(q + row[:, None] * DK + which[None, :], mask=keep, other=0.0)


@jit(do_not_specialize=["units", "workers", "room"])
def _decode_thin(
    q, body, channels, tail, v, starts, lengths, part, weight, factor, softcap, units, workers, room,
    stride_t, stride_tt, stride_v, stride_vt,
    R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, KEPT: tl.constexpr, T0: tl.constexpr,
    T1: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    row, n = tl.arange(0, M), tl.arange(0, BLOCK)
    valid = row < R
    at, end, unit, before = share_of(worker, workers, _blocks(starts, lengths, units, UNITS, BLOCK))
    while at < end:
        start, length = tl.load(starts + unit), tl.load(lengths + unit)
        thin = (start + BLOCK - 1) // BLOCK
        stop = tl.minimum(end, before + thin + (tl.maximum(length - start, 0) + BLOCK - 1) // BLOCK)
        own = unit.to(tl.int64)
        if stop > at:
            top = tl.full([M], float("-inf"), tl.float32)
            mass = tl.zeros([M], tl.float32)
            acc0 = tl.zeros([M, V0], tl.float32)
            acc1 = tl.zeros([M, V1 if V1 else 16], tl.float32)
            q0 = _channels_of_q(q, channels + own * KEPT, own * R + row, valid, 0, T0, KEPT, DK)
            q1 = q0
            if T1:
                q1 = _channels_of_q(q, channels + own * KEPT, own * R + row, valid, T0, T1, KEPT, DK)
            for j in tl.range(at - before, tl.minimum(stop - before, thin)):
                first = tl.cast(j * BLOCK, tl.int64)
                acc0, acc1, top, mass = read_tokens(
                    q0, q1, body + (own * room + first) * KEPT, v + own * stride_v + first * stride_vt,
                    n, j * BLOCK + n < tl.minimum(start, length), acc0, acc1, top, mass, factor, softcap, KEPT,
                    stride_vt, KEPT, DV, T0, T1, V0, V1, CAPPED, PRECISION,
                )  # fmt: skip
            w0, w1 = rows_of_q(q, own * R + row, valid, DK, K0, K1)
            for j in tl.range(tl.maximum(at - before, thin), stop - before):
                first = tl.cast((j - thin) * BLOCK, tl.int64)
                acc0, acc1, top, mass = read_tokens(
                    w0, w1, tail + own * stride_t + first * stride_tt, v + own * stride_v + (first + start) * stride_vt,
                    n, start + first + n < length, acc0, acc1, top, mass, factor, softcap, stride_tt, stride_vt, DK,
                    DV, K0, K1, V0, V1, CAPPED, PRECISION,
                )  # fmt: skip
            leave(part, weight, worker + unit, row, valid, acc0, acc1, top, mass, R, DV, V0, V1)
        before += thin + (tl.maximum(length - start, 0) + BLOCK - 1) // BLOCK
        at = stop
        unit += 1


@jit(do_not_specialize=["units", "workers"])
def _merge(
    part, weight, starts, lengths, out, lse, units, workers,
    R: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, DV: tl.constexpr, PIECE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) // R
    row = tl.program_id(0) % R
    d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    blocks = _blocks(starts, lengths, units, UNITS, BLOCK)
    value, mass = gather_channels(part, weight, unit, row, blocks, workers, float("-inf"), 0.0, d, R, DV, UNITS, WIDE)
    deliver_channels(out, lse, unit.to(tl.int64) * R + row, d, value, mass, tl.program_id(1) == 0, DV)


def tuning(q: Tensor, kept: int) -> Tuning:
    """A layout that fits. Rows of an odd number of channels are fetched number by number, which takes more warps."""
    if q.element_size() == 4 or q.shape[3] > 256:
        return Tuning(32, 4, 2, 2)
    return Tuning(64, 4, 3, 2) if kept % 4 == 0 else Tuning(64, 8, 2, 2)


def decode_thin(
    q: Tensor, keys: ThinKeys, v: Tensor, lengths: Tensor, scale: float | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row over thinned tokens and the whole ones behind them, in one pass.

    Args:
        q: [P, G, 1, Dk], the query heads of each pair, at most 64.
        v: [P, C, Dv], values of all tokens in order.
        lengths: int32 [P] on the device, tokens of each pair, whole ones included.
        scale: factor of the scores; None: Dk ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [P, G, 1, Dv] in the dtype of q, lse [P, G, 1] float32; 0 and -inf where a pair holds nothing.
    """
    body, channels, tail, start = keys
    pairs, _, kept = body.shape
    check_heads(q, tail.shape[2], 1)
    if q.shape[0] != pairs or q.shape[1] > ROWS or q.shape[2] != 1:
        raise BadArgument("q", tuple(q.shape), f"give one query of at most {ROWS} heads for each of {pairs} pairs")
    if any(x.dtype != q.dtype for x in (body, tail, v)):
        raise BadArgument("keys", f"{body.dtype}, {tail.dtype} and {v.dtype}", f"all must be of the query's {q.dtype}")
    if channels.shape != (pairs, kept) or not channels.is_contiguous() or not body.is_contiguous():
        given = f"{tuple(channels.shape)} beside {tuple(body.shape)}"
        raise BadArgument("keys", given, "channels are [pairs, kept], and tokens of the body adjacent")
    if any(x.dtype != torch.int32 or x.numel() != pairs for x in (start, lengths)):
        raise BadArgument("lengths", f"{lengths.dtype}, {start.dtype}", f"give int32 for each of the {pairs} pairs")
    if tail.stride(2) != 1 or v.stride(2) != 1:
        raise BadArgument("keys", "strides", "channels must be adjacent")
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    return _op(q.contiguous(), body, channels, tail, start, v, lengths, factor, softcap)


def run(
    q: Tensor, keys: ThinKeys, v: Tensor, lengths: Tensor, scale: float, softcap: float | None,
    layout: Tuning | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decode_thin` in a layout of one's own (for measurements)."""
    body, channels, tail, start = keys
    pairs, rows, _, dim = q.shape
    kept, v_dim = body.shape[2], v.shape[2]
    layout = layout or tuning(q, kept)
    workers = multiprocessors(q.device) * layout.per_sm
    part, weight = partials(workers + pairs, rows, v_dim, q.device)
    out, lse = outputs(q, v_dim)
    thin, wide = parts_of(kept), power_of_two(pairs)
    _decode_thin[(workers,)](
        q, body, channels, tail, v, start, lengths, part, weight,
        *in_base_2(scale, softcap), pairs, workers, body.shape[1], tail.stride(0), tail.stride(1), v.stride(0),
        v.stride(1),
        R=rows, M=max(16, power_of_two(rows)), BLOCK=layout.block, UNITS=wide, KEPT=kept, T0=thin[0], T1=thin[1],
        CAPPED=softcap is not None, PRECISION=precision_of(q.dtype), **shapes(dim, v_dim), num_warps=layout.warps,
        num_stages=layout.stages,
    )  # fmt: skip
    piece = min(64, power_of_two(v_dim))
    _merge[(pairs * rows, -(-v_dim // piece))](
        part, weight, start, lengths, out, lse, pairs, workers, R=rows, BLOCK=layout.block, UNITS=wide, DV=v_dim,
        PIECE=piece, WIDE=32, num_warps=2,
    )  # fmt: skip
    return out, lse


_SCHEMA = (
    "(Tensor q, Tensor body, Tensor channels, Tensor tail, Tensor start, Tensor v, Tensor lengths, float scale, "
    "float? softcap) -> (Tensor, Tensor)"
)


@torch.library.custom_op("foveate::decode_thin", mutates_args=(), schema=_SCHEMA)
def _op(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return run(q, ThinKeys(*others[:4]), *others[4:])


@_op.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs(q, others[4].shape[2])
