"""Decode over stores whose older tokens are held in few bits, unpacked where they are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode import pair_blocks
from foveate.attention.triton.packed_words import in_order, shuffled, whole_tile
from foveate.attention.triton.workers import (
    Tuning,
    absorb,
    check_tails,
    deliver_channels,
    gather_channels,
    in_base_2,
    jit,
    leave,
    logits,
    multiprocessors,
    outputs,
    partials,
    power_of_two,
    precision_of,
    rows_of_q,
    share_of,
    tile_of,
)
from foveate.errors import BadArgument


@dataclass(frozen=True)
class PackedSide:
    """Keys or values of P pairs: packed tokens, and the exact ones behind them.

    Args:
        codes: uint8 [P, n, D * bits / 8], low bits first.
        scale, zero: float16, [P, n / group, D] where `group` tokens share them per channel (keys), [P, n, D / group]
            where `group` channels of a token do (values). A number is code * scale + zero.
        tail: [P, C, D], exact tokens; the first is token packed[p] of pair p.
        packed: int32 [P] on the device, packed tokens of each pair.
        bits: 2, 4 or 8.
        group: tokens or channels that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    tail: Tensor
    packed: Tensor
    bits: int
    group: int


@jit
def _codes(x, BITS: tl.constexpr):
    """Bytes [n, W * BITS / 8] as codes [n, W]."""
    if BITS == 8:
        return x
    elif BITS == 4:
        return tl.interleave(x & 15, x >> 4)
    else:
        return tl.interleave(tl.interleave(x & 3, (x >> 4) & 3), tl.interleave((x >> 2) & 3, x >> 6))


@jit
def _steps(scale, zero, place, keep):
    """Scales and zero points in float32."""
    by = tl.load(scale + place, mask=keep, other=0.0).to(tl.float32)
    return by, tl.load(zero + place, mask=keep, other=0.0).to(tl.float32)


@jit
def _unpacked(
    codes, scale, zero, first, keep, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tokens first.. of a pair [BLOCK, W] in float32; keep [BLOCK] says which are packed. EVEN: groups fill the block
    (keys) or the channels (values), so that a scale is fetched once for all that share it."""
    here = first + tl.arange(0, BLOCK)
    ROW: tl.constexpr = D * BITS // 8
    b = tl.arange(0, W * BITS // 8)
    at = tl.where(keep, here, 0).to(tl.int64)
    raw = tl.load(codes + at[:, None] * ROW + b[None, :], mask=keep[:, None] & (b < ROW)[None, :], other=0)
    x = _codes(raw, BITS).to(tl.float32)
    d = tl.arange(0, W)
    if KEYS and EVEN:
        g = first // GROUP + tl.arange(0, BLOCK // GROUP)
        # All tokens of a group are packed, or none.
        there = tl.max(tl.reshape(keep.to(tl.int32), [BLOCK // GROUP, GROUP]), 1) > 0
        place = tl.where(there, g, 0).to(tl.int64)[:, None] * D + d[None, :]
        by, low = _steps(scale, zero, place, there[:, None] & (d < D)[None, :])
        x = tl.reshape(x, [BLOCK // GROUP, GROUP, W]) * by[:, None, :] + low[:, None, :]
    elif KEYS:
        place = (at // GROUP)[:, None] * D + d[None, :]
        by, low = _steps(scale, zero, place, keep[:, None] & (d < D)[None, :])
        x = x * by + low
    elif EVEN:
        g = tl.arange(0, D // GROUP)
        by, low = _steps(scale, zero, at[:, None] * (D // GROUP) + g[None, :], keep[:, None] & (g >= 0)[None, :])
        x = tl.reshape(x, [BLOCK, D // GROUP, GROUP]) * by[:, :, None] + low[:, :, None]
    else:
        place = at[:, None] * (D // GROUP) + (d // GROUP)[None, :]
        by, low = _steps(scale, zero, place, keep[:, None] & (d < D)[None, :])
        x = x * by + low
    return tl.reshape(x, [BLOCK, W])


@jit
def _side(
    codes, scale, zero, tail, packed, length, first, stride_tail, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Tokens first.. of one side [BLOCK, W] in the dtype of the tail; MIXED where some of them are exact."""
    here = first + tl.arange(0, BLOCK)
    x = _unpacked(codes, scale, zero, first, here < packed, D, W, BITS, GROUP, BLOCK, KEYS, EVEN)
    x = x.to(tail.dtype.element_ty)
    if MIXED:
        keep = (here >= packed) & (here < length)
        offsets = tl.where(keep, here - packed, 0).to(tl.int64) * stride_tail
        x = tl.where((here < packed)[:, None], x, tile_of(tail, offsets, keep, 0, W, D, True))
    return x


@jit(do_not_specialize=["units", "workers"])
def _decode(
    q, k_codes, k_scale, k_zero, k_tail, k_packed, v_codes, v_scale, v_zero, v_tail, v_packed, lengths, part, weight,
    factor, softcap, units, workers, stride_kc, stride_ks, stride_k, stride_kt, stride_vc, stride_vs, stride_v,
    stride_vt,
    R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, GROUP_K: tl.constexpr,
    GROUP_V: tl.constexpr, EVEN_K: tl.constexpr, EVEN_V: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    SWIFT: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    row = tl.arange(0, M)
    valid = row < R
    at, end, unit, before = share_of(worker, workers, pair_blocks(lengths, units, UNITS, BLOCK))
    while at < end:
        length = tl.load(lengths + unit)
        blocks = (length + BLOCK - 1) // BLOCK
        stop = tl.minimum(end, before + blocks)
        if stop > at:
            pair = unit.to(tl.int64)
            q0, q1 = rows_of_q(q, pair * R + row, valid, DK, WK, 0)
            pk, pv = tl.load(k_packed + unit), tl.load(v_packed + unit)
            kc, ks, kz = k_codes + pair * stride_kc, k_scale + pair * stride_ks, k_zero + pair * stride_ks
            vc, vs, vz = v_codes + pair * stride_vc, v_scale + pair * stride_vs, v_zero + pair * stride_vs
            kt, vt = k_tail + pair * stride_k, v_tail + pair * stride_v
            first = at - before
            # Up to here both sides are packed throughout.
            whole = tl.minimum(tl.maximum(tl.minimum(tl.minimum(pk, pv), length) // BLOCK, first), stop - before)
            top = tl.full([M], float("-inf"), tl.float32)
            mass = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, WV], tl.float32)
            if SWIFT:
                # In float16, which they and their scales are of; beyond its range there is nothing to lose.
                most: tl.constexpr = 65504.0
                swift = tl.maximum(tl.minimum(q0.to(tl.float32) * factor, most), -most).to(tl.float16)
                swift = shuffled(swift, M, DK, BITS_K)
                for j in tl.range(first, whole):
                    k = whole_tile(kc, ks, kz, j * BLOCK, DK, BITS_K, GROUP_K, BLOCK, True)
                    s = logits(swift, swift, k, k, 1.0, softcap, 0, CAPPED, PRECISION)
                    v = whole_tile(vc, vs, vz, j * BLOCK, DV, BITS_V, GROUP_V, BLOCK, False)
                    acc, _, top, mass = absorb(s, v, v, acc, acc, top, mass, 0, PRECISION)
                acc = in_order(acc, M, DV, BITS_V)
            for j in tl.range(whole if SWIFT else first, whole):
                k = _side(kc, ks, kz, kt, pk, length, j * BLOCK, stride_kt, DK, WK, BITS_K, GROUP_K, BLOCK, True,
                          EVEN_K, False)  # fmt: skip
                s = logits(q0, q1, k, k, factor, softcap, 0, CAPPED, PRECISION)
                v = _side(vc, vs, vz, vt, pv, length, j * BLOCK, stride_vt, DV, WV, BITS_V, GROUP_V, BLOCK, False,
                          EVEN_V, False)  # fmt: skip
                acc, _, top, mass = absorb(s, v, v, acc, acc, top, mass, 0, PRECISION)
            for j in tl.range(whole, stop - before, num_stages=1):
                k = _side(kc, ks, kz, kt, pk, length, j * BLOCK, stride_kt, DK, WK, BITS_K, GROUP_K, BLOCK, True,
                          EVEN_K, True)  # fmt: skip
                s = logits(q0, q1, k, k, factor, softcap, 0, CAPPED, PRECISION)
                s = tl.where((j * BLOCK + tl.arange(0, BLOCK) < length)[None, :], s, float("-inf"))
                v = _side(vc, vs, vz, vt, pv, length, j * BLOCK, stride_vt, DV, WV, BITS_V, GROUP_V, BLOCK, False,
                          EVEN_V, True)  # fmt: skip
                acc, _, top, mass = absorb(s, v, v, acc, acc, top, mass, 0, PRECISION)
            leave(part, weight, worker + unit, row, valid, acc, acc, top, mass, R, DV, WV, 0)
        at = stop
        before += blocks
        unit += 1


@jit(do_not_specialize=["units", "workers"])
def _merge(
    part, weight, lengths, out, lse, units, workers,
    R: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, DV: tl.constexpr, PIECE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) // R
    row = tl.program_id(0) % R
    d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    blocks = pair_blocks(lengths, units, UNITS, BLOCK)
    value, mass = gather_channels(part, weight, unit, row, blocks, workers, float("-inf"), 0.0, d, R, DV, UNITS, WIDE)
    deliver_channels(out, lse, unit.to(tl.int64) * R + row, d, value, mass, tl.program_id(1) == 0, DV)


def _even(group: int) -> bool:
    """Whether scales are fetched once for a group; smaller ones fetch them one by one."""
    return group >= 8 and group == power_of_two(group)


def _words(keys: PackedSide, values: PackedSide) -> bool:
    """Whether codes can be taken a word at a time, and no scale of values ends within one."""
    sides = (keys, values)
    whole = all(x.bits in (2, 4) and x.codes.data_ptr() % 4 == x.codes.stride(0) % 4 == 0 for x in sides)
    return whole and all(x.tail.shape[2] * x.bits % 32 == 0 for x in sides) and values.group * values.bits % 32 == 0


def _wide(dim: int) -> int:
    """Channels of a tile. Codes that are unpacked to 16 of them are read wrongly on an H100 (Triton 3.6, every layout,
    2 and 4 bits, all dtypes and groups; right in the interpreter, and on the card with 32)."""
    return max(32, power_of_two(dim))


def run(
    q: Tensor,
    keys: PackedSide,
    values: PackedSide,
    lengths: Tensor,
    scale: float,
    softcap: float | None,
    layout: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_packed` in a layout of one's own (for measurements)."""
    batch, heads, _, k_dim = q.shape
    units, v_dim = lengths.numel(), values.tail.shape[2]
    rows = batch * heads // units
    swift = q.element_size() == 2 and k_dim <= 128 and _words(keys, values)
    layout = layout or Tuning(64 if k_dim <= 128 else 32, 4, 3, 3 if swift else 4)
    workers = multiprocessors(q.device) * layout.per_sm
    part, weight = partials(workers + units, rows, v_dim, q.device)
    out, lse = outputs(q, v_dim)
    wide_k, wide_v, wide = _wide(k_dim), _wide(v_dim), power_of_two(units)
    even_k = layout.block % keys.group == 0 and _even(keys.group)
    even_v = v_dim == wide_v and _even(values.group)
    _decode[(workers,)](
        q, keys.codes, keys.scale, keys.zero, keys.tail, keys.packed, values.codes, values.scale, values.zero,
        values.tail, values.packed, lengths, part, weight,
        *in_base_2(scale, softcap), units, workers,
        keys.codes.stride(0), keys.scale.stride(0), keys.tail.stride(0), keys.tail.stride(1),
        values.codes.stride(0), values.scale.stride(0), values.tail.stride(0), values.tail.stride(1),
        R=rows, M=max(16, power_of_two(rows)), BLOCK=layout.block, UNITS=wide, DK=k_dim, DV=v_dim, WK=wide_k,
        WV=wide_v, BITS_K=keys.bits, BITS_V=values.bits, GROUP_K=keys.group, GROUP_V=values.group,
        EVEN_K=even_k, EVEN_V=even_v, CAPPED=softcap is not None, PRECISION=precision_of(q.dtype),
        SWIFT=swift and even_k and even_v and k_dim == wide_k, num_warps=layout.warps, num_stages=layout.stages,
        maxnreg=168 if swift else None,  # three programs side by side; what mixes exact tokens in would take more
    )  # fmt: skip
    # Channels are shared out, so that many programs read few numbers.
    piece = min(16, power_of_two(v_dim))
    _merge[(units * rows, -(-v_dim // piece))](
        part, weight, lengths, out, lse, units, workers, R=rows, BLOCK=layout.block, UNITS=wide, DV=v_dim, PIECE=piece,
        WIDE=128, num_warps=4,
    )  # fmt: skip
    return out, lse


def decode_packed(
    q: Tensor,
    keys: PackedSide,
    values: PackedSide,
    lengths: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row over packed tokens and the exact ones behind them, in one pass.

    Packed tokens are rounded to the dtype of the tail, as a store that unpacks them does; only their bytes are fetched.

    Args:
        q: [B, H, 1, Dk], in the dtype of the tails.
        keys: with scales per channel and `group` tokens.
        values: with scales per token and `group` channels.
        lengths: int32 [P] on the device, tokens of each pair, exact ones included; the sides may have packed
            different numbers of them.
        scale: factor of the scores; None: Dk ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [B, H, 1, Dv] in the dtype of q, lse [B, H, 1] float32; 0 and -inf where a pair holds nothing.
    """
    units = check_tails(q, keys.tail, values.tail, lengths)
    for name, side in (("keys", keys), ("values", values)):
        dim = side.tail.shape[2]
        share = dim if name == "keys" else dim // side.group
        fits = side.codes.shape[2] * 8 == dim * side.bits and side.scale.shape[2] == share
        if side.bits not in (2, 4, 8) or not fits or side.scale.shape != side.zero.shape:
            shapes = f"codes {tuple(side.codes.shape)}, scale {tuple(side.scale.shape)}, {side.bits} bits"
            raise BadArgument(name, shapes, f"for {dim} channels in groups of {side.group} they do not fit together")
        if any(x.dtype != torch.int32 or x.numel() != units for x in (side.packed, lengths)):
            raise BadArgument(name, str(side.packed.dtype), "lengths and packed tokens are int32, one per pair")
        if any(x.stride(2) != 1 for x in (side.codes, side.scale, side.zero, side.tail)):
            raise BadArgument(name, "strides", "channels must be adjacent")
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    sides: list[Any] = []
    for s in (_dense(keys), _dense(values)):
        sides += [s.codes, s.scale, s.zero, s.tail, s.packed, s.bits, s.group]
    return _op(q.contiguous(), *sides, lengths, factor, softcap)


def _dense(side: PackedSide) -> PackedSide:
    """The same with tokens of one pair adjacent, which bodies always are, whatever room lies behind them."""
    if all(x.stride(1) == x.shape[2] for x in (side.codes, side.scale, side.zero)) and (
        side.scale.stride(0) == side.zero.stride(0)
    ):
        return side
    codes, scale, zero = (x.contiguous() for x in (side.codes, side.scale, side.zero))
    return replace(side, codes=codes, scale=scale, zero=zero)


_SCHEMA = ", ".join(
    f"Tensor {x}_codes, Tensor {x}_scale, Tensor {x}_zero, Tensor {x}_tail, Tensor {x}_packed, SymInt {x}_bits, "
    f"SymInt {x}_group"
    for x in "kv"
)
_SCHEMA = f"(Tensor q, {_SCHEMA}, Tensor lengths, float scale, float? softcap) -> (Tensor, Tensor)"


@torch.library.custom_op("foveate::decode_packed", mutates_args=(), schema=_SCHEMA)
def _op(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    keys, values = (PackedSide(*others[i : i + 7]) for i in (0, 7))  # type: ignore[misc]
    return run(q, keys, values, *others[14:])


@_op.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs(q, others[10].shape[2])
