"""Decode over listed blocks that stand elsewhere as wholes, each query head over a list of its own.

All keys of a block are turned by the same angle, so the query is turned instead, once for a block; keys and values are
met as they lie. Products are those of one row, which no matrix unit is needed for: they stay in float32.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from foveate.attention.triton.splits import merge_splits
from foveate.attention.triton.turning import channels, circle, halves, held_halves, others, turned
from foveate.attention.triton.workers import capped, in_base_2, jit, partials, power_of_two

LEAST = 32
"""Slots of a block from which on a program that meets one block alone is worth it."""


def serves(rows: int, page: int) -> bool:
    """Whether units of `rows` query heads over blocks of `page` slots are read here."""
    return rows == 1 and page >= LEAST


@jit(do_not_specialize=["width", "splits"])
def _read(
    q, k, v, lists, places, lengths, frequencies, part, weight, factor, softcap, width, splits, stride_k, stride_kt,
    stride_v, stride_vt, stride_l, stride_p, BLOCK: tl.constexpr, PAGE: tl.constexpr, PIECES: tl.constexpr,
    DV: tl.constexpr, VP: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr,
    REST: tl.constexpr, RP: tl.constexpr, OTHERS: tl.constexpr, CAPPED: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry, piece = split // PIECES, split % PIECES
    listed = tl.load(lists + unit * stride_l + entry)
    place = tl.load(places + unit * stride_p + entry)
    pair = unit // SHARE
    inside = piece * BLOCK + tl.arange(0, BLOCK)
    slot = listed * PAGE + inside
    keep = (listed >= 0) & (inside < PAGE) & (slot < tl.load(lengths + pair))
    far = tl.where(keep, slot, 0).to(tl.int64)
    k1, k2 = held_halves(k + pair * stride_k, far * stride_kt, keep, FIRST, F, FP)
    c = tl.arange(0, VP)
    x = v + pair * stride_v + far[:, None] * stride_vt + c[None, :]
    values = tl.load(x, mask=keep[:, None] & (c < DV)[None, :], other=0.0)  # on its way while keys are looked at
    d, one = tl.arange(0, FP), tl.zeros([1], tl.int32)
    cos, sin = circle((listed * PAGE - place).to(tl.float32) * tl.load(frequencies + d, mask=d < F, other=0.0))
    q1, q2 = halves(q, unit * DK + one, one == 0, FIRST, F, FP)
    q1, q2 = turned(q1, q2, cos[None, :], sin[None, :])
    s = tl.sum(k1.to(tl.float32) * q1 + k2.to(tl.float32) * q2, 1)
    if REST:
        q3 = others(q, unit * DK + one, one == 0, OTHERS, REST, RP).to(tl.float32)
        s += tl.sum(others(k + pair * stride_k, far * stride_kt, keep, OTHERS, REST, RP).to(tl.float32) * q3, 1)
    s *= factor
    if CAPPED:
        s = capped(s, softcap)
    s = tl.where(keep, s, float("-inf"))
    top = tl.max(s, 0)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top))
    mass = tl.sum(p, 0)
    out = tl.sum(p[:, None] * values.to(tl.float32), 0)
    some = tl.where(mass > 0, mass, 1.0)
    to = unit * splits + split
    tl.store(weight + to, tl.where(mass > 0, top + tl.log2(some), float("-inf")))
    tl.store(part + to * DV + c, out / some, mask=c < DV)


def read_moved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    places: Tensor,
    lengths: Tensor,
    frequencies: Tensor,
    last: bool,
    page: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`decode_framed.decode_framed` of units that `serves`: q [U, 1, 1, Dk], lists and places int32 [U, K]."""
    (units, _, _, dim), width, v_dim = q.shape, lists.shape[1], v.shape[2]
    # A program holds its keys and values in registers, so that all of them are under way at once.
    block = min(power_of_two(page), max(16, min(64, 8192 // power_of_two(max(dim, v_dim)))))
    pieces = -(-page // block)
    splits = width * pieces
    part, weight = partials(units * splits, 1, v_dim, q.device)
    constants: dict[str, Any] = channels(dim, frequencies.numel(), last)
    _read[(units, splits)](
        q, k, v, lists, places, lengths, frequencies, part, weight, *in_base_2(scale, softcap), width, splits,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), lists.stride(0), places.stride(0), BLOCK=block, PAGE=page,
        PIECES=pieces, DV=v_dim, VP=max(16, power_of_two(v_dim)), **constants, CAPPED=softcap is not None,
        SHARE=units // len(k), num_warps=4,
    )  # fmt: skip
    return merge_splits(q, part, weight)
