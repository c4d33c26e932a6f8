"""Decode over listed keys that stand elsewhere for this read: each is turned to its place as it is read."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.decode_moved import read_moved, serves
from foveate.attention.triton.splits import merge_splits
from foveate.attention.triton.turning import channels, circle, halves, others, product, tokens_at_once, turned
from foveate.attention.triton.workers import (
    capped,
    check_heads,
    in_base_2,
    jit,
    multiprocessors,
    outputs,
    partials,
    power_of_two,
    precision_of,
)
from foveate.errors import BadArgument


@jit(do_not_specialize=["width", "splits"])
def _read(
    q, k, v, lists, places, lengths, frequencies, part, weight, factor, softcap, width, splits, stride_k, stride_kt,
    stride_v, stride_vt, stride_l, stride_p, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    DV: tl.constexpr, VP: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr,
    REST: tl.constexpr, RP: tl.constexpr, OTHERS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = unit // SHARE
    row, n, d = tl.arange(0, M), tl.arange(0, BLOCK), tl.arange(0, FP)
    valid = row < R
    entry, inside = (split * BLOCK + n) // PAGE, (split * BLOCK + n) % PAGE
    listed = tl.load(lists + unit * stride_l + entry, mask=entry < width, other=-1)
    place = tl.load(places + unit * stride_p + entry, mask=entry < width, other=0) + inside
    slot = listed * PAGE + inside
    keep = (listed >= 0) & (slot < tl.load(lengths + pair))
    slot = tl.where(keep, slot, 0)
    far = slot.to(tl.int64)
    speed = tl.load(frequencies + d, mask=d < F, other=0.0)
    cos, sin = circle((place - slot).to(tl.float32)[:, None] * speed[None, :])
    k1, k2 = halves(k, pair * stride_k + far * stride_kt, keep, FIRST, F, FP)
    k1, k2 = turned(k1, k2, cos, sin)
    kind = k.dtype.element_ty
    q1, q2 = halves(q, (unit * R + row) * DK, valid, FIRST, F, FP)
    s = product(q1, k1.to(kind), tl.zeros([M, BLOCK], tl.float32), False, PRECISION)
    s = product(q2, k2.to(kind), s, False, PRECISION)
    if REST:
        q3 = others(q, (unit * R + row) * DK, valid, OTHERS, REST, RP)
        s = product(q3, others(k, pair * stride_k + far * stride_kt, keep, OTHERS, REST, RP), s, False, PRECISION)
    s *= factor
    if CAPPED:
        s = capped(s, softcap)
    s = tl.where(keep[None, :], s, float("-inf"))
    top = tl.max(s, 1)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - anchor[:, None])
    mass = tl.sum(p, 1)
    c = tl.arange(0, VP)
    x = v + pair * stride_v + far[:, None] * stride_vt + c[None, :]
    values = tl.load(x, mask=keep[:, None] & (c < DV)[None, :], other=0.0)
    out = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    seen = mass > 0
    mass = tl.where(seen, mass, 1.0)
    to = (unit * R + row) * splits + split
    tl.store(weight + to, tl.where(seen, top + tl.log2(mass), float("-inf")), mask=valid)
    tl.store(part + to[:, None] * DV + c[None, :], out / mass[:, None], mask=valid[:, None] & (c < DV)[None, :])


def decode_framed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    places: Tensor,
    lengths: Tensor,
    frequencies: Tensor,
    *,
    last: bool = False,
    page: int = 1,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row over listed pages, the first key of each at the place given for it.

    Slots that are not read are never touched and may hold anything.

    Args:
        q: [U, R, 1, Dk], the query heads of each unit; U is a multiple of P, so many units read one pair.
        k, v: [P, C, Dk] and [P, C, Dv]; the key in slot p was turned by p.
        lists, places: int32 [U, K], neighbours side by side; a page of -1 is none.
        lengths: int32 [P], slots that may be read.
        frequencies: float32 [F], angle per position of each pair of channels, which lie F apart.
        last: the 2 F rotated channels are the last ones, not the first.
        page: slots per page.

    Returns:
        out [U, R, 1, Dv] in the dtype of q, lse [U, R, 1] float32; 0 and -inf where nothing is read.
    """
    _, _, queries, rows = check_heads(q, k.shape[2], 1)
    if queries != 1 or k.stride(2) != 1 or v.stride(2) != 1 or k.dtype != v.dtype or q.shape[0] % len(k):
        given = f"{tuple(q.shape)}, keys {tuple(k.shape)} {k.dtype}, values {v.dtype}"
        raise BadArgument("q", given, "give one query per row, keys and values of one dtype with adjacent channels")
    if lists.shape != places.shape or lists.dtype != torch.int32 or places.dtype != torch.int32 or page < 1:
        given = f"{tuple(lists.shape)} {lists.dtype}, places {tuple(places.shape)} {places.dtype}, pages of {page}"
        raise BadArgument("lists", given, "give int32 lists and places of one shape, pages of 1 or more slots")
    if not Angles(frequencies, last).fit(k.shape[2]) or frequencies.dtype != torch.float32 or rows < 1:
        raise BadArgument("frequencies", f"{frequencies.numel()} {frequencies.dtype}", "give float32, one per pair")
    lists, places = (x if x.stride(1) == 1 else x.contiguous() for x in (lists, places))
    return _op(
        q.contiguous(), k, v, lists, places, lengths.contiguous(), frequencies.contiguous(), last, page, scale, softcap
    )


@torch.library.custom_op(
    "foveate::decode_framed",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lists, Tensor places, Tensor lengths, Tensor frequencies, bool last, "
    "SymInt page, float scale, float? softcap) -> (Tensor, Tensor)",
)
def _op(
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
    (units, rows, _, dim), width, v_dim = q.shape, lists.shape[1], v.shape[2]
    if width and serves(rows, page):
        return read_moved(q, k, v, lists, places, lengths, frequencies, last, page, scale, softcap)
    block, wide = tokens_at_once(max(dim, v_dim), k.element_size()), power_of_two(v_dim)
    if units * width * page < 4 * block * multiprocessors(q.device):
        block = max(16, block // 2)  # of few keys, more programs with less to turn each
    splits = max(1, -(-width * page // block))
    part, weight = partials(units * rows * splits, 1, v_dim, q.device)
    _read[(units, splits)](
        q, k, v, lists, places, lengths, frequencies, part, weight, *in_base_2(scale, softcap),
        width, splits, k.stride(0), k.stride(1), v.stride(0), v.stride(1), lists.stride(0), places.stride(0), R=rows,
        M=max(16, power_of_two(rows)), BLOCK=block, PAGE=page, DV=v_dim, VP=max(16, wide),
        **channels(dim, frequencies.numel(), last), CAPPED=softcap is not None, PRECISION=precision_of(k.dtype),
        SHARE=units // len(k), num_warps=4,
    )  # fmt: skip
    return merge_splits(q, part, weight)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs(q, v.shape[2])
