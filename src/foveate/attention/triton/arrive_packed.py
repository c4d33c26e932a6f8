"""One new token of every pair of a packed store, in one launch: it goes behind the exact tail, the token that leaves
that is packed, and what changed is counted."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two


@dataclass(frozen=True)
class PackedArrival:
    """One side (keys or values) of P pairs as a new token meets it.

    Args:
        tail: [P, C, D], exact tokens, of which one behind the last has room.
        start: int32 [P], the token in the tail's first slot; None: token 0.
        packed: int32 [P], tokens in the body, where a step packs the token that leaves the tail; None: it packs none.
        codes, scale, zero: the body, with scales per token (see `decode_packed.PackedSide`); None as `packed` is.
        bits: 2, 4 or 8.
        group: channels that share a scale, a multiple of 8 / bits.
        exact: newest tokens that stay exact, at least 1.
    """

    tail: Tensor
    start: Tensor | None = None
    packed: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    bits: int = 8
    group: int = 1
    exact: int = 1


@jit
def _neighbour(x, UP: tl.constexpr):
    """The next float16 above (UP) or below."""
    word = x.to(tl.int16, bitcast=True).to(tl.int32)
    # Of a negative number the bits count away from 0, which has two signs.
    away = (word < 0) != UP
    word = tl.where((word & 0x7FFF) == 0, 1 if UP else 0x8001, tl.where(away, word + 1, word - 1))
    return word.to(tl.int16).to(tl.float16, bitcast=True)


@jit
def _steps(low, high, BITS: tl.constexpr, SHARE: tl.constexpr):
    """Zero points and scales in float16 of numbers from `low` to `high`, rounded outwards as `Quantised.pack` does."""
    zero = low.to(tl.float16)
    zero = tl.where(zero.to(tl.float32) > low, _neighbour(zero, False), zero)
    step = (high - zero.to(tl.float32)) * SHARE
    scale = step.to(tl.float16)
    return tl.where(scale.to(tl.float32) < step, _neighbour(scale, True), scale), zero


@jit
def _side(
    new, tail, start, packed, codes, scale, zero, unit, length, stride, stride_t, stride_c, stride_s,
    EXACT: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SHARE: tl.constexpr, STARTED: tl.constexpr, PACKS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    pair = unit.to(tl.int64)
    begin = 0
    if STARTED:
        begin = tl.load(start + unit)
    tail += pair * stride
    d = tl.arange(0, WIDE)
    x = tl.load(new + pair * D + d, mask=d < D, other=0.0)
    if PACKS:
        PER: tl.constexpr = 8 // BITS
        ACROSS: tl.constexpr = D // GROUP
        EACH: tl.constexpr = GROUP // PER
        codes += pair * stride_c
        scale += pair * stride_s
        zero += pair * stride_s
        done = tl.load(packed + unit)
        g = tl.arange(0, GROUPS)[:, None, None]
        byte = tl.arange(0, BYTES)[None, :, None]
        i = tl.arange(0, PER)[None, None, :]
        inside = (g < ACROSS) & (byte < EACH)
        channel = g * GROUP + byte * PER + i
        real = inside & (i < PER)
        # What the last step packed is still read in the tail: now as the body holds it.
        last = done - 1
        held = last >= begin
        at = tl.maximum(last, 0).to(tl.int64)
        y = tl.load(codes + at * (ACROSS * EACH) + g * EACH + byte, mask=inside & held, other=0)
        by = tl.load(scale + at * ACROSS + g, mask=(g < ACROSS) & held, other=0.0).to(tl.float32)
        low = tl.load(zero + at * ACROSS + g, mask=(g < ACROSS) & held, other=0.0).to(tl.float32)
        y = ((y.to(tl.int32) >> (BITS * i)) & (2**BITS - 1)).to(tl.float32) * by + low
        # Of the tail's tokens this one leaves.
        due = length + 1 - done > EXACT
        leaves = tail + tl.maximum(done - begin, 0).to(tl.int64) * stride_t + channel
        e = tl.load(leaves, mask=real & due, other=0.0).to(tl.float32)
        tl.store(tail + (at - begin) * stride_t + channel, y.to(tail.dtype.element_ty), mask=real & held)
        bottom = tl.min(tl.min(tl.where(real, e, float("inf")), 2), 1)
        top = tl.max(tl.max(tl.where(real, e, float("-inf")), 2), 1)
        g = tl.arange(0, GROUPS)
        by, low = _steps(tl.where(g < ACROSS, bottom, 0.0), tl.where(g < ACROSS, top, 0.0), BITS, SHARE)
        place = done.to(tl.int64) * ACROSS + g
        tl.store(scale + place, by, mask=(g < ACROSS) & due)
        tl.store(zero + place, low, mask=(g < ACROSS) & due)
        step = tl.maximum(by.to(tl.float32), 1e-30)[:, None, None]
        c = tl.div_rn(e - low.to(tl.float32)[:, None, None], tl.broadcast_to(step, e.shape))
        # Added to 1.5 * 2 ** 23, a number is rounded to the nearest integer, of two equally near ones to the even one.
        c = tl.minimum((c + 12582912.0) - 12582912.0, 2**BITS - 1)
        word = tl.sum(c.to(tl.int32) << (BITS * i), 2)
        b = tl.arange(0, BYTES)[None, :]
        g = g[:, None]
        place = done.to(tl.int64) * (ACROSS * EACH) + g * EACH + b
        tl.store(codes + place, word.to(tl.uint8), mask=(g < ACROSS) & (b < EACH) & due)
        tl.store(packed + unit, tl.where(due, done + 1, done))
    tl.store(tail + (length - begin).to(tl.int64) * stride_t + d, x, mask=d < D)


@jit(do_not_specialize=["stride_p"])
def _arrive(
    k_new, v_new, k_tail, k_start, k_packed, k_codes, k_scale, k_zero, v_tail, v_start, v_packed, v_codes, v_scale,
    v_zero, lengths, seen, positions, stride_p, stride_k, stride_kt, stride_kc, stride_ks, stride_v, stride_vt,
    stride_vc, stride_vs,
    EXACT_K: tl.constexpr, DK: tl.constexpr, WK: tl.constexpr, BITS_K: tl.constexpr, GROUP_K: tl.constexpr,
    SHARE_K: tl.constexpr, STARTED_K: tl.constexpr, PACKS_K: tl.constexpr, GROUPS_K: tl.constexpr,
    BYTES_K: tl.constexpr,
    EXACT_V: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, BITS_V: tl.constexpr, GROUP_V: tl.constexpr,
    SHARE_V: tl.constexpr, STARTED_V: tl.constexpr, PACKS_V: tl.constexpr, GROUPS_V: tl.constexpr,
    BYTES_V: tl.constexpr,
    VALUES: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    length = tl.load(lengths + unit)
    now = tl.load(seen + unit)
    _side(
        k_new, k_tail, k_start, k_packed, k_codes, k_scale, k_zero, unit, length, stride_k, stride_kt, stride_kc,
        stride_ks, EXACT_K, DK, WK, BITS_K, GROUP_K, SHARE_K, STARTED_K, PACKS_K, GROUPS_K, BYTES_K,
    )  # fmt: skip
    if VALUES:
        _side(
            v_new, v_tail, v_start, v_packed, v_codes, v_scale, v_zero, unit, length, stride_v, stride_vt, stride_vc,
            stride_vs, EXACT_V, DV, WV, BITS_V, GROUP_V, SHARE_V, STARTED_V, PACKS_V, GROUPS_V, BYTES_V,
        )  # fmt: skip
    if PLACED:
        tl.store(positions + unit.to(tl.int64) * stride_p + length, now.to(tl.int32))
    tl.store(lengths + unit, length + 1)
    tl.store(seen + unit, now + 1)


def serves(bits: int, group: int, exact: int) -> bool:
    """Whether the kernel packs tokens with these bits, channels per scale and newest exact tokens."""
    return bits in (2, 4, 8) and group % (8 // bits) == 0 and exact >= 1


def arrive_packed(
    k_new: Tensor,
    v_new: Tensor | None,
    keys: PackedArrival,
    values: PackedArrival | None,
    lengths: Tensor,
    seen: Tensor,
    positions: Tensor | None,
) -> None:
    """Take in one token of every pair, in place, and pack the ones that leave. Never waits for the device.

    A token that is packed now is read in the tail as it came until the next one arrives; from then on as it is packed.

    Args:
        k_new: [P, 1, Dk]; v_new: [P, 1, Dv], None where values are a view of the keys.
        keys, values: where to.
        lengths: int32 [P], tokens of each pair; seen: int64 [P], position of the new token. Both grow by one.
        positions: int32 [P, C] that notes the position of each token, or None.
    """
    values = keys if values is None else values
    k_flat = k_new.reshape(-1, keys.tail.shape[2]).contiguous()
    v_flat = k_flat if v_new is None else v_new.reshape(-1, values.tail.shape[2]).contiguous()
    k_tensors, k_strides, k_constants = _prepared(keys, lengths, "K")
    v_tensors, v_strides, v_constants = _prepared(values, lengths, "V")
    _arrive[(lengths.shape[0],)](
        k_flat, v_flat, *k_tensors, *v_tensors, lengths, seen, lengths if positions is None else positions,
        0 if positions is None else positions.stride(0), *k_strides, *v_strides, **k_constants, **v_constants,
        VALUES=v_new is not None, PLACED=positions is not None, num_warps=1,
    )  # fmt: skip


def _prepared(
    side: PackedArrival, some: Tensor, name: str
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, int | float | bool]]:
    """Tensors, strides and constants of one side; `some` stands where a pointer is not read."""
    dim = side.tail.shape[2]
    tensors = (
        side.tail,
        *(some if t is None else t for t in (side.start, side.packed, side.codes, side.scale, side.zero)),
    )
    packs = side.codes is not None and side.scale is not None
    strides = (
        side.tail.stride(0),
        side.tail.stride(1),
        side.codes.stride(0) if side.codes is not None else 0,
        side.scale.stride(0) if side.scale is not None else 0,
    )
    constants = {
        "EXACT": side.exact,
        "D": dim,
        "W": power_of_two(dim),
        "BITS": side.bits,
        "GROUP": side.group,
        "SHARE": 1 / (2**side.bits - 1),
        "STARTED": side.start is not None,
        "PACKS": packs,
        "GROUPS": power_of_two(dim // side.group),
        "BYTES": power_of_two(side.group * side.bits // 8),
    }
    return tensors, strides, {key + (name if key in "DW" else f"_{name}"): value for key, value in constants.items()}
