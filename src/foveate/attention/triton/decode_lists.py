"""Decode over listed pages or tokens of a store, read where they lie."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import (
    Tuning,
    absorb,
    check_heads,
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
    shapes,
    share_of,
    tile_of,
)
from foveate.errors import BadArgument

PAGES = (1, 2, 4, 8, 16, 32, 64, 128)
SHORT = 8192
"""Most tokens of a short list."""


@jit
def _tokens(
    number, valid, lengths, counts, windows, sink, window, width, stride_c, stride_ch, HEADS: tl.constexpr,
    STORES: tl.constexpr, LISTS: tl.constexpr, PAGE: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """What units `number` hold and read: their length, first tokens, newest tokens, and listed tokens.

    A unit is one row and one of HEADS heads, the finer ones of the store heads and of those that have lists.
    """
    row, head = number // HEADS, number % HEADS
    store = head // (HEADS // STORES)
    length = tl.load(lengths + row * STORES + store, mask=valid, other=0)
    count = tl.load(counts + row * stride_c + head // (HEADS // LISTS) * stride_ch, mask=valid, other=0)
    if WINDOWS:
        window = tl.load(windows + store, mask=valid, other=0)
        count = tl.where(window < length, count, 0)  # of a head that reads everything
    first = tl.minimum(length, sink)
    # A window that reaches back to the first tokens begins behind them.
    last = length - tl.maximum(length - window, first)
    return length, first, last, tl.minimum(tl.maximum(count, 0), width) * PAGE


@jit
def _blocks(
    lengths, counts, windows, units, sink, window, width, stride_c, stride_ch, HEADS: tl.constexpr,
    STORES: tl.constexpr, LISTS: tl.constexpr, PAGE: tl.constexpr, WINDOWS: tl.constexpr, UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks of every unit [UNITS]."""
    number = tl.arange(0, UNITS)
    _, first, last, listed = _tokens(
        number, number < units, lengths, counts, windows, sink, window, width, stride_c, stride_ch, HEADS, STORES,
        LISTS, PAGE, WINDOWS,
    )  # fmt: skip
    return (first + last + listed + BLOCK - 1) // BLOCK


@jit(do_not_specialize=["units", "workers", "sink", "window", "width"])
def _decode(
    q, k, v, lists, counts, lengths, windows, part, weight, scores, factor, softcap, units, workers, sink, window,
    width, stride_k, stride_kt, stride_v, stride_vt, stride_l, stride_lh, stride_c, stride_ch, stride_s,
    R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, HEADS: tl.constexpr,
    STORES: tl.constexpr, LISTS: tl.constexpr, PAGE: tl.constexpr, WINDOWS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    NEAR: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    row = tl.arange(0, M)
    valid = row < R
    every = _blocks(
        lengths, counts, windows, units, sink, window, width, stride_c, stride_ch, HEADS, STORES, LISTS, PAGE, WINDOWS,
        UNITS, BLOCK,
    )  # fmt: skip
    at, end, unit, before = share_of(worker, workers, every)
    n = tl.arange(0, BLOCK)
    while at < end:
        length, first, last, listed = _tokens(
            unit, unit >= 0, lengths, counts, windows, sink, window, width, stride_c, stride_ch, HEADS, STORES, LISTS,
            PAGE, WINDOWS,
        )  # fmt: skip
        near = first + last
        blocks = (near + listed + BLOCK - 1) // BLOCK
        stop = tl.minimum(end, before + blocks)
        if stop > at:
            q0, q1 = rows_of_q(q, unit.to(tl.int64) * R + row, valid, DK, K0, K1)
            head = unit % HEADS
            pair = (unit // HEADS * STORES + head // (HEADS // STORES)).to(tl.int64)
            kp, vp = k + pair * stride_k, v + pair * stride_v
            # One list may serve all pairs: then its stride is 0.
            entries = lists + (unit // HEADS).to(tl.int64) * stride_l + head // (HEADS // LISTS) * stride_lh
            top = tl.full([M], float("-inf"), tl.float32)
            mass = tl.zeros([M], tl.float32)
            acc0 = tl.zeros([M, V0], tl.float32)
            acc1 = tl.zeros([M, V1 if V1 else 16], tl.float32)
            for j in tl.range(at - before, stop - before):
                # Tokens in the order first, newest, listed.
                t = j * BLOCK + n - near
                page = tl.load(entries + t // PAGE, mask=(t >= 0) & (t < listed), other=-1)
                slot = page * PAGE + t % PAGE
                keep = (page >= 0) & (slot < length)
                if NEAR:
                    # What is read as near is not read again.
                    keep = keep & (slot >= first) & (slot < length - last)
                    t += near
                    slot = tl.where(t < first, t, tl.where(t < near, length - near + t, slot))
                    keep = keep | (t < near)
                far = tl.where(keep, slot, 0).to(tl.int64)
                k0 = tile_of(kp, far * stride_kt, keep, 0, K0, DK, True)
                k1 = k0
                if K1:
                    k1 = tile_of(kp, far * stride_kt, keep, K0, K1, DK, True)
                s = logits(q0, q1, k0, k1, factor, softcap, K1, CAPPED, PRECISION)
                s = tl.where(keep[None, :], s, float("-inf"))
                if SCORES:
                    # By the place among the tokens: 64 bits, as there may be many of them for each of many rows.
                    to = scores + (unit.to(tl.int64) * R + row)[:, None] * stride_s + (j * BLOCK + n)[None, :]
                    tl.store(to, s, mask=valid[:, None] & (j * BLOCK + n < near + listed)[None, :])
                v0 = tile_of(vp, far * stride_vt, keep, 0, V0, DV, True)
                v1 = v0
                if V1:
                    v1 = tile_of(vp, far * stride_vt, keep, V0, V1, DV, True)
                acc0, acc1, top, mass = absorb(s, v0, v1, acc0, acc1, top, mass, V1, PRECISION)
            leave(part, weight, worker + unit, row, valid, acc0, acc1, top, mass, R, DV, V0, V1)
        at = stop
        before += blocks
        unit += 1


@jit(do_not_specialize=["units", "workers", "sink", "window", "width"])
def _merge(
    part, weight, counts, lengths, windows, out, lse, units, workers, sink, window, width, stride_c, stride_ch,
    R: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, HEADS: tl.constexpr, STORES: tl.constexpr,
    LISTS: tl.constexpr, PAGE: tl.constexpr, WINDOWS: tl.constexpr, DV: tl.constexpr, PIECE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    blocks = _blocks(
        lengths, counts, windows, units, sink, window, width, stride_c, stride_ch, HEADS, STORES, LISTS, PAGE, WINDOWS,
        UNITS, BLOCK,
    )  # fmt: skip
    unit = (place // R).to(tl.int32)
    value, mass = gather_channels(
        part, weight, unit, place % R, blocks, workers, float("-inf"), 0.0, d, R, DV, UNITS, WIDE
    )
    deliver_channels(out, lse, place, d, value, mass, tl.program_id(1) == 0, DV)


def tuning(q: Tensor, k_dim: int, *, short: bool = False) -> Tuning:
    """The layout that is used unless a caller names another.

    Of short lists, two workers on a multiprocessor take longer than one: they leave more to be merged (4,096 tokens on
    an H100, 17.5 us instead of 21).
    """
    row_bytes = k_dim * q.element_size()
    if row_bytes <= 128:
        return Tuning(128, 4, 3, 2)
    if row_bytes <= 256:
        return Tuning(32, 4, 5, 1) if short else Tuning(64, 4, 5, 2)
    return Tuning(32, 4, 3, 2) if row_bytes <= 512 else Tuning(16, 4, 2, 1)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    counts: Tensor,
    lengths: Tensor,
    page: int,
    near: tuple[int, int] | None,
    scale: float,
    softcap: float | None,
    layout: Tuning | None = None,
    windows: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_lists` in a layout of one's own (for measurements).

    Args:
        windows: int32 [Hs], how many of the newest slots each store head reads besides its list, in place of `near`'s;
            from the length on it reads everything, and no list.
        scores: float32 [B, H, 1, S], S from the slots that any head reads on, to be filled with the logits in base 2
            by place: first slots, newest ones, then the list's in its order; -inf where an entry is not read.
    """
    batch, heads, _, k_dim = q.shape
    v_dim, stores, listed = v.shape[2], k.shape[0] // batch, lists.shape[1]
    finer = max(stores, listed)
    units, rows = batch * finer, heads // finer
    layout = layout or tuning(q, k_dim, short=lists.shape[2] * page <= SHORT)
    workers = multiprocessors(q.device) * layout.per_sm
    part, weight = partials(workers + units, rows, v_dim, q.device)
    out, lse = outputs(q, v_dim)
    sink, window = near or (0, 0)
    width = lists.shape[2]
    ends = lengths if windows is None else windows  # the former stands where a pointer is not read
    same: dict[str, Any] = {
        "R": rows, "BLOCK": layout.block, "UNITS": power_of_two(units), "HEADS": finer, "STORES": stores,
        "LISTS": listed, "PAGE": page, "WINDOWS": windows is not None,
    }  # fmt: skip
    _decode[(workers,)](
        q, k, v, lists, counts, lengths, ends, part, weight, weight if scores is None else scores,
        *in_base_2(scale, softcap), units, workers, sink, window, width,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), lists.stride(0), lists.stride(1),
        counts.stride(0), counts.stride(1), 0 if scores is None else scores.stride(1), M=max(16, power_of_two(rows)),
        NEAR=near is not None or windows is not None, CAPPED=softcap is not None, PRECISION=precision_of(q.dtype),
        SCORES=scores is not None, **same, **shapes(k_dim, v_dim),
        num_warps=layout.warps, num_stages=layout.stages,
    )  # fmt: skip
    # Channels are shared out: where some heads read everything (windows), most parts are theirs.
    piece = min(16, power_of_two(v_dim))
    _merge[(units * rows, -(-v_dim // piece))](
        part, weight, counts, lengths, ends, out, lse, units, workers, sink, window, width, counts.stride(0),
        counts.stride(1), DV=v_dim, PIECE=piece, WIDE=32 if windows is None else 128, **same,
    )  # fmt: skip
    return out, lse


def decode_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    counts: Tensor,
    lengths: Tensor,
    *,
    page: int = 1,
    near: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row over the listed pages of a store, and over its first and newest slots.

    Slots that are not read are never touched and may hold anything. Shapes depend on shapes alone, nothing waits for
    the device, every output is written.

    Args:
        q: [B, H, 1, Dk].
        k, v: [B * Hs, C, Dk] and [B * Hs, C, Dv], a band that holds every pair.
        lists: int32 [B, h, K], pages per row and head, unique; h is 1, Hs or H.
        counts: int32 [B, h], how many of the K are meant; a page of -1 is none.
        lengths: int32 [B, Hs], slots in use. Of the last page only these are read.
        page: slots per page, a power of two up to 128.
        near: (sink, window): slots [0, sink) and [length - window, length) are read as well, and counted once.
        scale: factor of the scores; None: Dk ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [B, H, 1, Dv] in the dtype of q, lse [B, H, 1] float32; 0 and -inf where nothing is read.
    """
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.stride(2) != 1:
            raise BadArgument(name, (tuple(x.shape), x.stride()), "give [pairs, tokens, head size], channels adjacent")
    batch, heads, queries, _ = check_heads(q, k.shape[2], k.shape[0] // max(1, q.shape[0]))
    stores = k.shape[0] // batch
    if queries != 1 or k.shape[0] % batch:
        raise BadArgument("q", tuple(q.shape), f"lists are read by one query per row; the store has {k.shape[0]} pairs")
    if lists.dim() != 3 or lists.shape[0] != batch or lists.shape[1] not in (1, stores, heads):
        raise BadArgument("lists", tuple(lists.shape), f"give [{batch}, 1, {stores} or {heads}, K]")
    if counts.shape != lists.shape[:2] or lengths.numel() != k.shape[0]:
        given = f"{tuple(counts.shape)}, lengths {tuple(lengths.shape)}"
        raise BadArgument("counts", given, f"give counts {tuple(lists.shape[:2])}, lengths [{batch}, {stores}]")
    for name, x in (("lists", lists), ("counts", counts), ("lengths", lengths)):
        if x.dtype != torch.int32:
            raise BadArgument(name, str(x.dtype), "it is int32")
    if page not in PAGES:
        raise BadArgument("page", page, "give a power of two up to 128")
    if near is not None and min(near) < 0:
        raise BadArgument("near", near, "give a sink and a window of 0 or more slots")
    factor = k.shape[2] ** -0.5 if scale is None else float(scale)
    lists = lists if lists.stride(2) == 1 else lists.contiguous()
    return _op(q.contiguous(), k, v, lists, counts, lengths.contiguous(), page, near, factor, softcap)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor lists, Tensor counts, Tensor lengths, SymInt page, SymInt[]? near, "
    "float scale, float? softcap) -> (Tensor, Tensor)"
)


@torch.library.custom_op("foveate::decode_lists", mutates_args=(), schema=_SCHEMA)
def _op(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return run(q, *others)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs(q, v.shape[2])
