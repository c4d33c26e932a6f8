"""Decode over tokens that are held as codes in a basis: queries are turned into it once, and what values add up to is
turned back once, so that of a token its bits alone are fetched."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.coded import CodedSide, Coding, levels_dtype
from foveate.attention.triton.basis import BARE, PIECE, turn, turn_back, wide
from foveate.attention.triton.workers import (
    LN2,
    Tuning,
    capped,
    check_tails,
    gather_channels,
    in_base_2,
    jit,
    leave,
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

BOOST = tl.constexpr(1024.0)
"""What weights of values are multiplied by, so that float16 tells small ones apart: they are below 14 without."""


@jit
def _fields(fields, head, C: tl.constexpr, WC: tl.constexpr):
    """Bytes, shifts and masks of a head's components [WC]."""
    c = tl.arange(0, WC)
    place = fields + head * 3 * C + c
    keep = c < C
    return (
        tl.load(place, mask=keep, other=0), tl.load(place + C, mask=keep, other=0),
        tl.load(place + 2 * C, mask=keep, other=0),
    )  # fmt: skip


@jit
def _bits(codes, n, byte, keep, width, ONE: tl.constexpr, MASKED: tl.constexpr):
    """Of tokens n behind codes: the 16 bits from each component's byte on, [WC, n], and the codes of their sizes [n];
    0 for those that are not kept. Rows have `width` bytes; ONE: a single one.

    Components are the first dimension, since neighbours there are fetched by neighbouring threads.
    """
    rows = n * width
    place = byte[:, None] + rows[None, :]
    if MASKED:
        x = tl.load(codes + place, mask=keep[None, :], other=0).to(tl.int32)
        size = tl.load(codes + rows, mask=keep, other=0).to(tl.int32) & 31
        if not ONE:
            x |= tl.load(codes + place + 1, mask=keep[None, :], other=0).to(tl.int32) << 8
    else:
        x = tl.load(codes + place).to(tl.int32)
        size = tl.load(codes + rows).to(tl.int32) & 31
        if not ONE:
            x |= tl.load(codes + place + 1).to(tl.int32) << 8
    return x, size


@jit
def _last(codes, n, width):
    """The largest code of a size of tokens n: whether one of them points to a first token."""
    return tl.max(tl.load(codes + n * width) & 31, 0)


@jit
def _components(x, shift, mask, levels):
    """The levels that the codes in 16 bits stand for."""
    return tl.load((levels + mask)[:, None] + ((x >> shift[:, None]) & mask[:, None]))


@jit
def _scores(turned, bare, norm, x, size, last, shift, mask, levels, sizes, valid, FROM: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Products of queries and coded keys [M, n]; bare [M]: where those with the vectors beside the basis lie."""
    s = tl.dot(turned, _components(x, shift, mask, levels), input_precision=PRECISION)
    mean = tl.load(bare, mask=valid, other=0.0)
    s = s * norm[:, None] * tl.load(sizes + size)[None, :] + mean[:, None]
    # Few blocks hold a token that points to a first one.
    if last >= FROM:
        for i in tl.static_range(32 - FROM):  # type: ignore[general]
            other = tl.load(bare + 1 + i, mask=valid, other=0.0)
            s = tl.where((size == FROM + i)[None, :], other[:, None], s)
    return s


@jit
def _weigh(s, top, mass):
    """The running softmax: weights, how much what was found before shrinks, the new maximum and mass."""
    new = tl.maximum(top, tl.max(s, 1))
    # Where nothing was seen yet the maximum is -inf, and -inf - -inf would be NaN.
    anchor = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - anchor[:, None])
    shrink = tl.exp2(top - anchor)
    return p, shrink, new, mass * shrink + tl.sum(p, 1)


@jit
def _add(p, shrink, x, size, last, shift, mask, levels, sizes, acc, beside, FROM: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
    """Coded values by their weights p [M, n] in the basis, and the mass of each first token that is pointed to."""
    level = tl.trans(_components(x, shift, mask, levels))
    by = tl.load(sizes + size) * BOOST
    acc = tl.dot((p * by[None, :]).to(level.dtype), level, acc * shrink[:, None], input_precision=PRECISION)
    beside = beside * shrink[:, None]
    if last >= FROM:
        for i in tl.static_range(32 - FROM):  # type: ignore[general]
            pointed = tl.sum(tl.where((size == FROM + i)[None, :], p, 0.0), 1)
            beside += tl.where((tl.arange(0, BARE) == i + 1)[None, :], pointed[:, None], 0.0)
    return acc, beside


@jit
def _query(turned, row, valid, dtype: tl.constexpr, WC: tl.constexpr):
    """Query rows row [M] in the basis, their largest numbers, and where their products beside the basis lie."""
    mine = turned + row * (WC + BARE)
    qt = tl.load(mine[:, None] + tl.arange(0, WC)[None, :], mask=valid[:, None], other=0.0)
    # Of largest number 1, float16 holds them well, whatever the basis.
    norm = tl.maximum(tl.max(tl.abs(qt), 1), 1e-30)
    return (qt / norm[:, None]).to(dtype), norm, mine + WC


@jit
def _leave(
    part, weight, slot, row, valid, acc, exact, beside, coded, top, mass, R: tl.constexpr, WC: tl.constexpr,
    WD: tl.constexpr,
):  # fmt: skip
    """Write what was found of one unit; coded [M]: the mass of coded values."""
    TOTAL: tl.constexpr = WC + WD + BARE
    leave(part, weight, slot, row, valid, acc * (1 / BOOST), exact, top, mass, R, TOTAL, WC, WD)
    # What points to no first token has the mean.
    i = tl.arange(0, BARE)
    beside = tl.where((i == 0)[None, :], (coded - tl.sum(beside, 1))[:, None], beside)
    place = part + (slot.to(tl.int64) * R + row) * TOTAL + WC + WD
    tl.store(place[:, None] + i[None, :], beside / tl.where(mass > 0, mass, 1.0)[:, None], mask=valid[:, None])


@jit
def _whole(k_packed, v_packed, lengths, number, keep, BLOCK: tl.constexpr):
    """Blocks of pairs in which all keys and values are coded."""
    coded = tl.minimum(tl.load(k_packed + number, mask=keep, other=0), tl.load(v_packed + number, mask=keep, other=0))
    return tl.minimum(coded, tl.load(lengths + number, mask=keep, other=0)) // BLOCK


# Layers have rows of other widths each, and all of them one kernel.
@jit(do_not_specialize=["units", "workers", "stride_k", "stride_v", "width_k", "width_v"])
def _decode(
    turned, k_codes, k_packed, k_heads, k_fields, k_levels, k_sizes, v_codes, v_packed, v_heads, v_fields, v_levels,
    v_sizes, lengths, part, weight, factor, softcap, units, workers, stride_k, stride_v, width_k, width_v,
    R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr,
    WCK: tl.constexpr, WCV: tl.constexpr, WV: tl.constexpr, FROM_K: tl.constexpr, FROM_V: tl.constexpr,
    ONE_K: tl.constexpr, ONE_V: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks that are coded throughout."""
    worker, number = tl.program_id(0), tl.arange(0, UNITS)
    row, n = tl.arange(0, M), tl.arange(0, BLOCK)
    valid = row < R
    at, end, unit, before = share_of(
        worker, workers, _whole(k_packed, v_packed, lengths, number, number < units, BLOCK)
    )  # fmt: skip
    while at < end:
        blocks = _whole(k_packed, v_packed, lengths, unit, unit < units, BLOCK)
        stop = tl.minimum(end, before + blocks)
        if stop > at:
            pair = unit.to(tl.int64)
            byte_k, shift_k, mask_k = _fields(k_fields, tl.load(k_heads + unit).to(tl.int64), CK, WCK)
            byte_v, shift_v, mask_v = _fields(v_fields, tl.load(v_heads + unit).to(tl.int64), CV, WCV)
            qt, norm, bare = _query(turned, pair * R + row, valid, k_levels.dtype.element_ty, WCK)
            top = tl.full([M], float("-inf"), tl.float32)
            mass = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, WCV], tl.float32)
            beside = tl.zeros([M, BARE], tl.float32)
            first = at - before
            at_k = k_codes + pair * stride_k + tl.cast(first * BLOCK, tl.int64) * width_k
            at_v = v_codes + pair * stride_v + tl.cast(first * BLOCK, tl.int64) * width_v
            last_k, last_v = _last(at_k, n, width_k), _last(at_v, n, width_v)
            for j in tl.range(first, stop - before):
                # The first bytes of the next block's rows are asked for now, and with them come most of the others.
                step = tl.where(j + 1 < stop - before, BLOCK, 0)
                next_k, next_v = at_k + step * width_k, at_v + step * width_v
                ahead_k = tl.load(next_k + n * width_k)
                ahead_v = tl.load(next_v + n * width_v)
                # Nothing is added to the widths, but in a way that keeps addresses from being made before the loop and
                # held all along: there are no registers for so many.
                xk, size_k = _bits(at_k, n, byte_k, n >= 0, width_k + (last_k >> 5), ONE_K, False)
                s = _scores(qt, bare, norm, xk, size_k, last_k, shift_k, mask_k, k_levels, k_sizes, valid, FROM_K,
                            PRECISION)  # fmt: skip
                s *= factor
                if CAPPED:
                    s = capped(s, softcap)
                p, shrink, top, mass = _weigh(s, top, mass)
                xv, size_v = _bits(at_v, n, byte_v, n >= 0, width_v + (last_v >> 5), ONE_V, False)
                acc, beside = _add(p, shrink, xv, size_v, last_v, shift_v, mask_v, v_levels, v_sizes, acc, beside,
                                   FROM_V, PRECISION)  # fmt: skip
                last_k, last_v = tl.max(ahead_k & 31, 0), tl.max(ahead_v & 31, 0)
                at_k, at_v = next_k, next_v
            _leave(part, weight, worker + unit, row, valid, acc, tl.zeros([M, WV], tl.float32), beside, mass, top,
                   mass, R, WCV, WV)  # fmt: skip
        at = stop
        before += blocks
        unit += 1


@jit(do_not_specialize=["stride_kc", "stride_vc", "width_k", "width_v"])
def _edge(
    q, turned, k_codes, k_tail, k_packed, k_heads, k_fields, k_levels, k_sizes, v_codes, v_tail, v_packed, v_heads,
    v_fields, v_levels, v_sizes, lengths, part, weight, factor, softcap, stride_kc, stride_k, stride_kt, stride_vc,
    stride_v, stride_vt, width_k, width_v,
    R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, WCK: tl.constexpr, WCV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    FROM_K: tl.constexpr, FROM_V: tl.constexpr, ONE_K: tl.constexpr, ONE_V: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The newest tokens, of which some are exact: few, so that a program does all of a pair."""
    unit, n, row = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, M)
    valid, pair = row < R, unit.to(tl.int64)
    length, pk, pv = tl.load(lengths + unit), tl.load(k_packed + unit), tl.load(v_packed + unit)
    byte_k, shift_k, mask_k = _fields(k_fields, tl.load(k_heads + unit).to(tl.int64), CK, WCK)
    byte_v, shift_v, mask_v = _fields(v_fields, tl.load(v_heads + unit).to(tl.int64), CV, WCV)
    qt, norm, bare = _query(turned, pair * R + row, valid, k_levels.dtype.element_ty, WCK)
    q0, _ = rows_of_q(q, pair * R + row, valid, DK, WK, 0)
    kc, kt = k_codes + pair * stride_kc, k_tail + pair * stride_k
    vc, vt = v_codes + pair * stride_vc, v_tail + pair * stride_v
    top = tl.full([M], float("-inf"), tl.float32)
    mass, coded = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    acc, exact = tl.zeros([M, WCV], tl.float32), tl.zeros([M, WV], tl.float32)
    beside = tl.zeros([M, BARE], tl.float32)
    for j in tl.range(tl.minimum(tl.minimum(pk, pv), length) // BLOCK, (length + BLOCK - 1) // BLOCK):
        here = j * BLOCK + n
        xk, size_k = _bits(kc, tl.where(here < pk, here, 0), byte_k, here < pk, width_k, ONE_K, True)
        s = _scores(qt, bare, norm, xk, size_k, tl.max(size_k, 0), shift_k, mask_k, k_levels, k_sizes, valid, FROM_K,
                    PRECISION)  # fmt: skip
        keep = (here >= pk) & (here < length)
        k = tile_of(kt, tl.where(keep, here - pk, 0).to(tl.int64) * stride_kt, keep, 0, WK, DK, True)
        s = tl.where((here < pk)[None, :], s, tl.dot(q0, tl.trans(k), input_precision=PRECISION)) * factor
        if CAPPED:
            s = capped(s, softcap)
        p, shrink, top, mass = _weigh(tl.where((here < length)[None, :], s, float("-inf")), top, mass)
        inside = tl.where((here < pv)[None, :], p, 0.0)
        xv, size_v = _bits(vc, tl.where(here < pv, here, 0), byte_v, here < pv, width_v, ONE_V, True)
        acc, beside = _add(inside, shrink, xv, size_v, tl.max(size_v, 0), shift_v, mask_v, v_levels, v_sizes, acc,
                           beside, FROM_V, PRECISION)  # fmt: skip
        coded = coded * shrink + tl.sum(inside, 1)
        keep = (here >= pv) & (here < length)
        v = tile_of(vt, tl.where(keep, here - pv, 0).to(tl.int64) * stride_vt, keep, 0, WV, DV, True)
        exact = tl.dot((p - inside).to(v.dtype), v, exact * shrink[:, None], input_precision=PRECISION)
    _leave(part, weight, unit, row, valid, acc, exact, beside, coded, top, mass, R, WCV, WV)


@jit(do_not_specialize=["units", "workers"])
def _merge(
    part, weight, k_packed, v_packed, lengths, edge, edge_weight, found, lse, units, workers,
    R: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, TOTAL: tl.constexpr, PIECE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    unit, row, number = tl.program_id(0) // R, tl.program_id(0) % R, tl.arange(0, UNITS)
    d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    blocks = _whole(k_packed, v_packed, lengths, number, number < units, BLOCK)
    x, a = gather_channels(part, weight, unit, row, blocks, workers, float("-inf"), 0.0, d, R, TOTAL, UNITS, WIDE)
    at = unit.to(tl.int64) * R + row
    b = tl.load(edge_weight + at)
    top = tl.maximum(a, b)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp2(a - anchor), tl.exp2(b - anchor)
    mass = tl.where(a + b > 0, a + b, 1.0)
    tl.store(found + at * TOTAL + d, (x * a + tl.load(edge + at * TOTAL + d) * b) / mass)
    tl.store(lse + at, tl.where(a + b > 0, anchor + tl.log2(mass), top) * LN2, mask=tl.program_id(1) == 0)


def tuning(q: Tensor, components: int) -> Tuning:
    """A layout whose tiles stay in registers."""
    if q.element_size() == 4 or components > 128:
        return Tuning(16, 4, 1, 2)
    return Tuning(32, 8, 1, 2)


def run(
    q: Tensor, keys: CodedSide, values: CodedSide, lengths: Tensor, scale: float, softcap: float | None,
    layout: Tuning | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decode_coded` in a layout of one's own (for measurements)."""
    batch, heads, _, k_dim = q.shape
    units, v_dim = lengths.numel(), values.tail.shape[2]
    rows, (ck, cv) = batch * heads // units, (x.coding.back.shape[1] for x in (keys, values))
    layout = layout or tuning(q, max(ck, cv))
    wck, wcv, wk, wv = wide(ck), wide(cv), wide(k_dim), wide(v_dim)
    workers, total = multiprocessors(q.device) * layout.per_sm, wcv + wv + BARE.value
    turned = turn(q, keys, rows)
    found = torch.empty(units * rows, total, dtype=torch.float32, device=q.device)
    part, weight = partials(workers + units, rows, total, q.device)
    edge, edge_weight = partials(units, rows, total, q.device)
    out, lse = outputs(q, v_dim)
    numbers, base_2 = power_of_two(units), in_base_2(scale, softcap)
    widths = keys.codes.shape[2], values.codes.shape[2]
    # All workers of a multiprocessor fit on it at once.
    registers = min(255, 65536 // (32 * layout.warps * layout.per_sm) // 8 * 8)
    both: dict[str, Any] = {
        "R": rows, "M": max(16, power_of_two(rows)), "BLOCK": layout.block, "CK": ck, "CV": cv, "WCK": wck, "WCV": wcv,
        "WV": wv, "FROM_K": keys.coding.pointers, "FROM_V": values.coding.pointers, "CAPPED": softcap is not None,
        "ONE_K": widths[0] == 1, "ONE_V": widths[1] == 1, "PRECISION": precision_of(q.dtype),
        "num_warps": layout.warps,
    }  # fmt: skip
    k_tables, v_tables = ((x.heads, x.coding.fields, x.coding.levels, x.coding.sizes) for x in (keys, values))
    _decode[(workers,)](
        turned, keys.codes, keys.packed, *k_tables, values.codes, values.packed, *v_tables, lengths, part, weight,
        *base_2, units, workers, keys.codes.stride(0), values.codes.stride(0), *widths, UNITS=numbers,
        num_stages=layout.stages, maxnreg=registers, **both,
    )  # fmt: skip
    _edge[(units,)](
        q, turned, keys.codes, keys.tail, keys.packed, *k_tables, values.codes, values.tail, values.packed, *v_tables,
        lengths, edge, edge_weight, *base_2, keys.codes.stride(0), keys.tail.stride(0), keys.tail.stride(1),
        values.codes.stride(0), values.tail.stride(0), values.tail.stride(1), *widths, DK=k_dim, DV=v_dim, WK=wk,
        num_stages=1, **both,
    )  # fmt: skip
    _merge[(units * rows, total // PIECE)](
        part, weight, keys.packed, values.packed, lengths, edge, edge_weight, found, lse, units, workers, R=rows,
        BLOCK=layout.block, UNITS=numbers, TOTAL=total, PIECE=PIECE, WIDE=128, num_warps=4,
    )  # fmt: skip
    turn_back(found, values, out)
    return out, lse


def decode_coded(
    q: Tensor, keys: CodedSide, values: CodedSide, lengths: Tensor, scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention of one query per row over coded tokens and the exact ones behind them, in one pass.

    Sums are in float32; queries in the basis, levels and weights of values are rounded to the dtype of the levels.

    Args:
        q: [B, H, 1, Dk], in the dtype of the tails.
        keys, values: of the P pairs; they may have coded different numbers of tokens.
        lengths: int32 [P] on the device, tokens of each pair, exact ones included.
        scale: factor of the scores; None: Dk ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [B, H, 1, Dv] in the dtype of q, lse [B, H, 1] float32; 0 and -inf where a pair holds nothing.
    """
    units = check_tails(q, keys.tail, values.tail, lengths)
    for name, side in (("keys", keys), ("values", values)):
        if any(len(x) != units for x in (side.codes, side.tail, side.heads, side.first)):
            raise BadArgument(name, tuple(side.codes.shape), f"lengths are of {units} pairs")
        if any(x.dtype != torch.int32 or x.numel() != units for x in (side.packed, lengths)):
            raise BadArgument(name, str(side.packed.dtype), "lengths and coded tokens are int32, one per pair")
        if side.codes.stride()[1:] != (side.codes.shape[2], 1) or side.tail.stride(2) != 1:
            raise BadArgument(name, "strides", "tokens of codes and channels of tails must be adjacent")
        if side.first.shape[1] > 32 - side.coding.pointers or 32 - side.coding.pointers >= BARE.value:
            raise BadArgument(name, side.coding.pointers, f"{side.first.shape[1]} first tokens take as many codes")
    if {x.coding.levels.dtype for x in (keys, values)} != {levels_dtype(q.dtype)}:
        raise BadArgument("keys", str(keys.coding.levels.dtype), f"levels are {levels_dtype(q.dtype)} for {q.dtype}")
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    sides: list[Any] = []
    for side in (keys, values):
        sides += [*side[:4], side.first.contiguous(), *side.coding]
    return _op(q.contiguous(), *sides, lengths, factor, softcap)


_SCHEMA = ", ".join(
    ", ".join(f"Tensor {x}_{name}" for name in (*CodedSide._fields[:5], *Coding._fields[:5])) + f", SymInt {x}_pointers"
    for x in "kv"
)
_SCHEMA = f"(Tensor q, {_SCHEMA}, Tensor lengths, float scale, float? softcap) -> (Tensor, Tensor)"


@torch.library.custom_op("foveate::decode_coded", mutates_args=(), schema=_SCHEMA)
def _op(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    keys, values = (CodedSide(*others[i : i + 5], coding=Coding(*others[i + 5 : i + 11])) for i in (0, 11))
    return run(q, keys, values, *others[22:])


@_op.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs(q, others[12].shape[2])
