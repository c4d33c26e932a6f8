"""Decode over packed stores in bfloat16, whose numbers are made where the matrix unit wants them.

Codes are read as words of 16 bits. Number j of all words meets every (16 / bits)-th channel of the queries from the
j-th on, so that nothing is shuffled. A code behind the exponent of a float16 is the code plus a constant, for which the
zero point makes up: three instructions make two numbers. Products are of float16, whose eleven bits hold a code times
its scale better than bfloat16 does. Some programs read blocks of which both sides are packed, others what is behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from foveate.attention.triton.decode_packed import _empty, _side, merge_parts, packed_blocks
from foveate.attention.triton.workers import (
    LOG2E,
    Tuning,
    absorb,
    jit,
    leave,
    logits,
    multiprocessors,
    partials,
    power_of_two,
    precision_of,
    rows_of_q,
    share_of,
)

if TYPE_CHECKING:
    from foveate.attention.triton.decode_packed import PackedSide

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
SPLIT = 64
"""Tokens behind the packed blocks that one program reads."""
LONGEST = 1024
"""Slots of the longest tail: more would be too much for such programs."""


def _ptx(j: int, bits: int) -> str:
    """PTX of code j of two words times their scales plus low. The code is brought to the uppermost bits of a float16's
    fraction, behind the exponent of 2 ** bits: what is added is as small as can be."""
    at = 10 - bits
    shift, mask, front = j * bits - at, ((1 << bits) - 1) << at, (15 + bits) << 10
    move = f"shr.u32 y, $1, {shift};" if shift > 0 else f"shl.b32 y, $1, {-shift};" if shift else "mov.b32 y, $1;"
    take = f"lop3.b32 y, y, {mask * 0x10001:#x}, {front * 0x10001:#x}, 0xEA;"  # (y & mask) | front
    return f"{{ .reg .b32 y; {move} {take} fma.rn.f16x2 $0, y, $2, $3; }}"


_text: Any = triton.constexpr_function(_ptx)


@jit
def _numbers(x, scale, low, J: tl.constexpr, BITS: tl.constexpr):
    """Numbers J of int16 words x: (2 ** BITS + code) * scale + low, in float16 like these two."""
    if INTERPRETED:
        code = (x.to(tl.int32) >> (J * BITS)) & (2**BITS - 1)
        return ((code + 2**BITS).to(tl.float32) * scale.to(tl.float32) + low.to(tl.float32)).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _text(J, BITS), "=r,r,r,r", [x, scale, low], dtype=tl.float16, is_pure=True, pack=2
        )


@jit
def _half(x, J: tl.constexpr):
    """Number J of the four float16 in each int64."""
    return (x >> (16 * J)).to(tl.int16).to(tl.float16, bitcast=True)


@jit
def _spread(x, SPANS: tl.constexpr, SPAN: tl.constexpr, W: tl.constexpr):
    """Rows x [SPANS, W], each for the SPAN tokens that share it: [SPANS * SPAN, W]."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [SPANS, SPAN, W]), [SPANS * SPAN, W])


@jit
def _widen(x, BLOCK: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr):
    """Columns x [BLOCK, GROUPS], each for the words that share it: [BLOCK, W]."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [BLOCK, GROUPS, W // GROUPS]), [BLOCK, W])


@jit
def _queries(q, at, valid, by, J: tl.constexpr, PER: tl.constexpr, W: tl.constexpr):
    """Every PER-th channel of the rows at `at` [M] from the J-th on, as shares of the largest: [W, M]."""
    d = PER * tl.arange(0, W) + J
    x = tl.load(q + at[None, :] + d[:, None], mask=valid[None, :], other=0.0).to(tl.float32)
    return (x * by[None, :]).to(tl.float16)


@jit
def _behind(
    q, kc, ks, kz, kt, vc, vs, vz, vt, part, weight, slot, unit, pk, pv, length, first, last, factor, softcap,
    stride_kt, stride_vt,
    R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BITS: tl.constexpr,
    GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens first.. to last of a pair, of which some are exact."""
    row = tl.arange(0, M)
    valid = row < R
    q0, q1 = rows_of_q(q, unit.to(tl.int64) * R + row, valid, DK, DK, 0)
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for t in tl.range(first, last, BLOCK, num_stages=1):
        k = _side(kc, ks, kz, kt, pk, length, t, stride_kt, DK, DK, BITS, GROUP_K, BLOCK, True, BLOCK % GROUP_K == 0,
                  True)  # fmt: skip
        s = logits(q0, q1, k, k, factor, softcap, 0, CAPPED, PRECISION)
        s = tl.where((t + tl.arange(0, BLOCK) < length)[None, :], s, float("-inf"))
        v = _side(vc, vs, vz, vt, pv, length, t, stride_vt, DV, DV, BITS, GROUP_V, BLOCK, False, True, True)
        acc, _, top, mass = absorb(s, v, v, acc, acc, top, mass, 0, PRECISION)
    leave(part, weight, slot, row, valid, acc, acc, top, mass, R, DV, DV, 0)


@jit(do_not_specialize=["units", "workers"])
def _decode_words(
    q, k_words, k_codes, k_scales, k_zeros, k_scale, k_zero, k_tail, k_packed, v_words, v_codes, v_scale, v_zero,
    v_tail, v_packed, lengths, part, weight, factor, softcap, units, workers, stride_kc, stride_ks, stride_k, stride_kt,
    stride_vc, stride_vs, stride_v, stride_vt,
    R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BITS: tl.constexpr, GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, TAILS: tl.constexpr, SPLIT: tl.constexpr,
    SPANS: tl.constexpr, SMALL: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 16 // BITS
    W: tl.constexpr = DK // PER
    V: tl.constexpr = DV // PER
    GROUPS: tl.constexpr = DV // GROUP_V
    SPAN: tl.constexpr = BLOCK // SPANS
    worker = tl.program_id(0)
    if worker < units * TAILS:
        unit = worker // TAILS
        pair = unit.to(tl.int64)
        pk, pv, length = tl.load(k_packed + unit), tl.load(v_packed + unit), tl.load(lengths + unit)
        base = tl.minimum(tl.minimum(pk, pv), length) // BLOCK * BLOCK
        first = base + (worker - unit * TAILS) * SPLIT
        _behind(
            q, k_codes + pair * stride_kc * 2, k_scale + pair * stride_ks * 4, k_zero + pair * stride_ks * 4,
            k_tail + pair * stride_k, v_codes + pair * stride_vc * 2, v_scale + pair * stride_vs,
            v_zero + pair * stride_vs, v_tail + pair * stride_v, part, weight, workers + units + worker, unit, pk, pv,
            length, first, tl.minimum(first + SPLIT, length), factor, softcap, stride_kt, stride_vt, R,
            16 if M < 16 else M, SMALL, DK, DV, BITS, GROUP_K, GROUP_V, CAPPED, PRECISION,
        )  # fmt: skip
    else:
        worker -= units * TAILS
        row = tl.arange(0, M)
        valid = row < R
        blocks = packed_blocks(k_packed, v_packed, lengths, units, UNITS, BLOCK)
        at, end, unit, before = share_of(worker, workers, blocks)
        n = tl.arange(0, BLOCK)[:, None]
        w, u = tl.arange(0, W)[None, :], tl.arange(0, V)[None, :]
        g, span = tl.arange(0, GROUPS)[None, :], tl.arange(0, SPANS)[:, None]
        while at < end:
            least = tl.minimum(tl.load(k_packed + unit), tl.load(v_packed + unit))
            mine = tl.minimum(least, tl.load(lengths + unit)) // BLOCK
            stop = tl.minimum(end, before + mine)
            if stop > at:
                pair = unit.to(tl.int64)
                place = (pair * R + row) * DK
                d = tl.arange(0, DK)
                whole = tl.load(q + place[:, None] + d[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
                most = tl.max(tl.abs(whole), 1)
                # Whatever bfloat16 holds, float16 holds as a share of the largest.
                by = 1 / tl.where(most > 0, most, 1.0)
                q0, q1 = _queries(q, place, valid, by, 0, PER, W), _queries(q, place, valid, by, 1, PER, W)
                q2, q3 = _queries(q, place, valid, by, 2, PER, W), _queries(q, place, valid, by, 3, PER, W)
                parts = (q0, q1, q2, q3)
                if PER == 8:
                    q4, q5 = _queries(q, place, valid, by, 4, PER, W), _queries(q, place, valid, by, 5, PER, W)
                    q6, q7 = _queries(q, place, valid, by, 6, PER, W), _queries(q, place, valid, by, 7, PER, W)
                    parts = (q0, q1, q2, q3, q4, q5, q6, q7)
                factors = (factor * most)[None, :]
                kc, ks, kz = k_words + pair * stride_kc, k_scales + pair * stride_ks, k_zeros + pair * stride_ks
                vc, vs, vz = v_words + pair * stride_vc, v_scale + pair * stride_vs, v_zero + pair * stride_vs
                top = tl.full([M], float("-inf"), tl.float32)
                mass = tl.zeros([M], tl.float32)
                a0 = tl.zeros([V, M], tl.float32)
                a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
                for i in tl.range(at - before, stop - before):
                    t = i * BLOCK
                    x = tl.load(kc + (t + n).to(tl.int64) * W + w)
                    there = (t // GROUP_K + span).to(tl.int64) * (DK // 4) + (PER // 4) * w
                    scales, zeros = tl.load(ks + there), tl.load(kz + there)
                    others, lows = scales, zeros
                    if PER == 8:
                        others, lows = tl.load(ks + there + 1), tl.load(kz + there + 1)
                    s = tl.zeros([BLOCK, M], tl.float32)
                    for j in tl.static_range(PER):
                        scale = _half(scales if j < 4 else others, j % 4)
                        low = _half(zeros if j < 4 else lows, j % 4) - scale * (2.0**BITS)
                        k = _numbers(x, _spread(scale, SPANS, SPAN, W), _spread(low, SPANS, SPAN, W), j, BITS)
                        s = tl.dot(k, parts[j], s)
                    s *= factors
                    if CAPPED:
                        s = softcap * (1 - 2 / (1 + tl.exp2(s * (2 * LOG2E))))
                    # Weights are at most 1024, so that small ones do not vanish in float16.
                    new = tl.maximum(top, tl.max(s, 0) - 10)
                    p = tl.exp2(s - new[None, :])
                    shrink = tl.exp2(top - new)
                    mass = mass * shrink + tl.sum(p, 0)
                    top = new
                    p, fade = p.to(tl.float16), shrink[None, :]
                    y = tl.load(vc + (t + n).to(tl.int64) * V + u)
                    here = (t + n).to(tl.int64) * GROUPS + g
                    one = tl.load(vs + here)
                    low = _widen(tl.load(vz + here) - one * (2.0**BITS), BLOCK, GROUPS, V)
                    scale = _widen(one, BLOCK, GROUPS, V)
                    a0 = tl.dot(tl.trans(_numbers(y, scale, low, 0, BITS)), p, a0 * fade)
                    a1 = tl.dot(tl.trans(_numbers(y, scale, low, 1, BITS)), p, a1 * fade)
                    a2 = tl.dot(tl.trans(_numbers(y, scale, low, 2, BITS)), p, a2 * fade)
                    a3 = tl.dot(tl.trans(_numbers(y, scale, low, 3, BITS)), p, a3 * fade)
                    if PER == 8:
                        a4 = tl.dot(tl.trans(_numbers(y, scale, low, 4, BITS)), p, a4 * fade)
                        a5 = tl.dot(tl.trans(_numbers(y, scale, low, 5, BITS)), p, a5 * fade)
                        a6 = tl.dot(tl.trans(_numbers(y, scale, low, 6, BITS)), p, a6 * fade)
                        a7 = tl.dot(tl.trans(_numbers(y, scale, low, 7, BITS)), p, a7 * fade)
                even, odd = tl.interleave(tl.trans(a0), tl.trans(a2)), tl.interleave(tl.trans(a1), tl.trans(a3))
                if PER == 8:
                    even = tl.interleave(
                        tl.interleave(tl.trans(a0), tl.trans(a4)), tl.interleave(tl.trans(a2), tl.trans(a6))
                    )
                    odd = tl.interleave(
                        tl.interleave(tl.trans(a1), tl.trans(a5)), tl.interleave(tl.trans(a3), tl.trans(a7))
                    )
                acc = tl.interleave(even, odd)
                leave(part, weight, worker + unit, row, valid, acc, acc, top, mass, R, DV, DV, 0)
            at = stop
            before += mine
            unit += 1


def suits(q: Tensor, keys: PackedSide, values: PackedSide, rows: int) -> bool:
    """Whether these sides can be decoded here, with `rows` queries a pair; others are left to the general kernel."""
    bits, dims = keys.bits, (q.shape[3], values.tail.shape[2])
    if q.dtype != torch.bfloat16 or bits not in (2, 4) or values.bits != bits or rows > 16:
        return False
    words = 16 // bits
    sizes = all(x == power_of_two(x) for x in (*dims, keys.group, values.group))
    shapes = min(dims) >= 16 * words and max(dims) <= 128 and keys.group >= 16 and values.group >= words
    tails = max(keys.tail.shape[1], values.tail.shape[1]) <= LONGEST
    read = (keys.codes, values.codes, keys.scale, keys.zero)
    return sizes and shapes and tails and all(x.stride(0) % 8 == 0 and x.storage_offset() % 8 == 0 for x in read)


def _registers(device: torch.device, layout: Tuning) -> dict[str, int]:
    """So few that as many programs as were asked for run side by side."""
    most = 65536 // (32 * layout.warps * layout.per_sm) // 8 * 8
    return {"maxnreg": most} if device.type == "cuda" and most < 255 else {}


def run(
    q: Tensor,
    keys: PackedSide,
    values: PackedSide,
    lengths: Tensor,
    scale: float,
    softcap: float | None,
    layout: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_packed` of sides that suit, in a layout of one's own (for measurements)."""
    batch, heads, _, k_dim = q.shape
    units, v_dim = lengths.numel(), values.tail.shape[2]
    rows = batch * heads // units
    layout = layout or Tuning(32, 1, 3, 10)
    block = layout.block if layout.block % keys.group == 0 else min(layout.block, keys.group)
    # Behind the packed blocks there is at most what the tails hold, and a block that is not full.
    tails = -(-(max(keys.tail.shape[1], values.tail.shape[1]) + block) // SPLIT)
    # All programs at once, so that none begins when the others end.
    places = multiprocessors(q.device) * layout.per_sm
    workers = max(places - units * tails, places // 2)
    part, weight = partials(workers + units * (1 + tails), rows, v_dim, q.device)
    out, lse = _empty(q, v_dim)
    k_words, v_words = keys.codes.view(torch.int16), values.codes.view(torch.int16)
    k_scales, k_zeros = keys.scale.view(torch.int64), keys.zero.view(torch.int64)
    _decode_words[(workers + units * tails,)](
        q, k_words, keys.codes, k_scales, k_zeros, keys.scale, keys.zero, keys.tail, keys.packed, v_words, values.codes,
        values.scale, values.zero, values.tail, values.packed, lengths, part, weight,
        scale / softcap if softcap is not None else scale * LOG2E.value,
        softcap * LOG2E.value if softcap is not None else 0.0,
        units, workers, k_words.stride(0), k_scales.stride(0), keys.tail.stride(0), keys.tail.stride(1),
        v_words.stride(0), values.scale.stride(0), values.tail.stride(0), values.tail.stride(1),
        R=rows, M=max(8, power_of_two(rows)), BLOCK=block, UNITS=power_of_two(units), DK=k_dim, DV=v_dim,
        BITS=keys.bits, GROUP_K=keys.group, GROUP_V=values.group, TAILS=tails, SPLIT=SPLIT,
        SPANS=max(1, block // keys.group), SMALL=min(SPLIT, 16 * layout.warps), CAPPED=softcap is not None,
        PRECISION=precision_of(q.dtype), num_warps=layout.warps, num_stages=layout.stages,
        **_registers(q.device, layout),
    )  # fmt: skip
    merge_parts(part, weight, keys, values, lengths, out, lse, workers, block, tails)
    return out, lse
