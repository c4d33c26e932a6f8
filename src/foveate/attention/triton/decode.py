"""Decode over all tokens of stores whose (row, store head) pairs hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import (
    LOG2E,
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


@dataclass(frozen=True)
class Stores:
    """Keys and values of P (row, store head) pairs, of one band or of several; pair p holds lengths[p] tokens.

    Args:
        k, v: [P, C, Dk] and [P, C, Dv] for one band. Of several bands those of any one; `starts` says where the pairs
            are, and only the strides of a token are read off here, which all bands must share. v may be a view of k.
        lengths: int32 [P] on the device.
        starts: int64 [2, P] on the device: where the keys and where the values of each pair begin, in elements from
            the first of k and of v. Multiples of 8. They may lead into other tensors, which the caller keeps alive.
        pairs: int32 [P] on the device: row * Hs + store head of each pair; None: p itself.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    starts: Tensor | None = None
    pairs: Tensor | None = None

    @classmethod
    def of(cls, bands: Sequence[tuple[Tensor, Tensor, Tensor]], lengths: Tensor) -> Stores:
        """The stores of several bands (k [P, C, Dk], v [P, C, Dv], pair numbers [P]), whose lengths stand one behind
        the other in `lengths`. To be made anew whenever a band moves: it notes addresses."""
        (k, v, pairs), *others = bands
        if not others:
            return cls(k, v, lengths, None, pairs.to(torch.int32))
        starts: list[list[Tensor]] = [[], []]
        for band in bands:
            for side, (base, x) in enumerate(((k, band[0]), (v, band[1]))):
                away = x.data_ptr() - base.data_ptr()
                if x.stride()[1:] != base.stride()[1:] or x.dtype != base.dtype or x.device != base.device:
                    given = f"{x.dtype} {x.stride()[1:]} beside {base.dtype} {base.stride()[1:]}"
                    raise BadArgument("bands", given, "dtype, device and strides of a token must be the same in all")
                first = torch.arange(x.shape[0], device=x.device) * x.stride(0)
                starts[side].append(first + away // x.element_size())
        numbers = torch.cat([band[2] for band in bands]).to(torch.int32)
        return cls(k, v, lengths, torch.stack([torch.cat(side) for side in starts]), numbers)


@jit
def pair_blocks(lengths, units, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of every pair [UNITS]."""
    number = tl.arange(0, UNITS)
    length = tl.load(lengths + number, mask=number < units, other=0)
    return (length + BLOCK - 1) // BLOCK


@jit
def places(starts, unit, units, stride_k, stride_v, STARTS: tl.constexpr):
    """Where the keys and values of a pair begin. Multiples of 8, which wide loads want to know."""
    if STARTS:
        return tl.load(starts + unit) // 8 * 8, tl.load(starts + units + unit) // 8 * 8
    else:
        return unit.to(tl.int64) * stride_k, unit.to(tl.int64) * stride_v


@jit
def _step(
    q0, q1, k, v, scores, j, length, row, valid, acc0, acc1, top, mass, factor, softcap, stride_kt, stride_vt, stride_s,
    N: tl.constexpr, BLOCK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, MASKED: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Block j of a pair's tokens; MASKED where not every query sees all of it."""
    n = tl.arange(0, BLOCK)
    here = j * BLOCK + n
    keep = here < length
    kp = k + tl.cast(j * BLOCK, tl.int64) * stride_kt
    k0 = tile_of(kp, n * stride_kt, keep, 0, K0, DK, MASKED)
    k1 = k0
    if K1:
        k1 = tile_of(kp, n * stride_kt, keep, K0, K1, DK, MASKED)
    s = logits(q0, q1, k0, k1, factor, softcap, K1, CAPPED, PRECISION)
    if MASKED:
        if N == 1:
            s = tl.where(keep[None, :], s, float("-inf"))
        else:
            s = tl.where(here[None, :] < (length - N + 1 + row % N)[:, None], s, float("-inf"))
    if SCORES:
        tl.store(scores + row[:, None] * stride_s + here[None, :], s, mask=valid[:, None] & keep[None, :])
    v0, v1 = k0, k1
    if not SHARED:
        vp = v + tl.cast(j * BLOCK, tl.int64) * stride_vt
        v0 = tile_of(vp, n * stride_vt, keep, 0, V0, DV, MASKED)
        v1 = v0
        if V1:
            v1 = tile_of(vp, n * stride_vt, keep, V0, V1, DV, MASKED)
    return absorb(s, v0, v1, acc0, acc1, top, mass, V1, PRECISION)


@jit(do_not_specialize=["units", "workers"])
def _decode(
    q, k, v, lengths, starts, pairs, part, weight, scores, factor, softcap, units, workers,
    stride_k, stride_kt, stride_v, stride_vt, stride_s,
    R: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    STARTS: tl.constexpr, PAIRS: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    LEAN: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0) // TILES
    row = tl.program_id(0) % TILES * M + tl.arange(0, M)
    valid = row < R
    at, end, unit, before = share_of(worker, workers, pair_blocks(lengths, units, UNITS, BLOCK))
    while at < end:
        length = tl.load(lengths + unit)
        blocks = (length + BLOCK - 1) // BLOCK
        stop = tl.minimum(end, before + blocks)
        if stop > at:
            pair = unit
            if PAIRS:
                pair = tl.load(pairs + unit)
            q0, q1 = rows_of_q(q, pair.to(tl.int64) * R + row, valid, DK, K0, K1)
            k_at, v_at = places(starts, unit, units, stride_k, stride_v, STARTS)
            s_at = scores + pair.to(tl.int64) * R * stride_s
            first = at - before
            # Up to here every query sees all tokens of a block.
            whole = tl.minimum(tl.maximum((length - N + 1) // BLOCK, first), stop - before)
            top = tl.full([M], float("-inf"), tl.float32)
            mass = tl.zeros([M], tl.float32)
            acc0 = tl.zeros([M, V0], tl.float32)
            acc1 = tl.zeros([M, V1 if V1 else 16], tl.float32)
            if not LEAN:
                for j in tl.range(first, whole):
                    acc0, acc1, top, mass = _step(
                        q0, q1, k + k_at, v + v_at, s_at, j, length, row, valid, acc0, acc1, top, mass, factor, softcap,
                        stride_kt, stride_vt, stride_s, N, BLOCK, DK, DV, K0, K1, V0, V1, False, SHARED, CAPPED,
                        PRECISION, SCORES,
                    )  # fmt: skip
            for j in tl.range(first if LEAN else whole, stop - before):
                acc0, acc1, top, mass = _step(
                    q0, q1, k + k_at, v + v_at, s_at, j, length, row, valid, acc0, acc1, top, mass, factor, softcap,
                    stride_kt, stride_vt, stride_s, N, BLOCK, DK, DV, K0, K1, V0, V1, True, SHARED, CAPPED, PRECISION,
                    SCORES,
                )  # fmt: skip
            leave(part, weight, worker + unit, row, valid, acc0, acc1, top, mass, R, DV, V0, V1)
        at = stop
        before += blocks
        unit += 1


@jit(do_not_specialize=["units", "workers"])
def _merge(
    part, weight, lengths, pairs, sinks, out, lse, units, workers,
    R: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, DV: tl.constexpr,
    PIECE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) // R
    row = tl.program_id(0) % R
    d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    blocks = pair_blocks(lengths, units, UNITS, BLOCK)
    pair = unit
    if PAIRS:
        pair = tl.load(pairs + unit)
    place = pair.to(tl.int64) * R + row
    if SINKS:
        top = tl.load(sinks + (place // N) % H).to(tl.float32) * LOG2E
        mass = 1.0
    else:
        top = float("-inf")
        mass = 0.0
    value, total = gather_channels(part, weight, unit, row, blocks, workers, top, mass, d, R, DV, UNITS, WIDE)
    deliver_channels(out, lse, place, d, value, total, tl.program_id(1) == 0, DV)


def tuning(q: Tensor, k_dim: int, rows: int) -> Tuning:
    """The layout that was fastest where it was measured (H100, half precision), else one that fits."""
    row_bytes = k_dim * q.element_size()
    if rows > 32 and row_bytes <= 1152:  # much work per token: one program fills a multiprocessor
        # In float32, blocks of 16 tokens over eight warps read beyond their tile in Triton 3.6.
        return Tuning(64, 8, 2, 1) if q.element_size() == 2 else Tuning(16, 4, 2, 1)
    if row_bytes <= 128:
        return Tuning(128, 4, 3, 2)
    half = q.element_size() == 2
    if row_bytes <= 256:
        return Tuning(128, 8, 3, 1) if half else Tuning(64, 4, 3, 2)
    if row_bytes <= 512:
        return Tuning(64, 8, 2, 1) if half else Tuning(32, 4, 3, 2)
    return Tuning(32, 4, 4 if half else 3, 1) if row_bytes <= 1152 else Tuning(16, 4, 2, 1)


def run(
    q: Tensor,
    stores: Stores,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    layout: Tuning | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_ragged` in a layout of one's own (for measurements).

    Args:
        scores: float32 [B, H, N, S], S from the longest length on, to be filled with the logits in base 2, as they
            enter the softmax; nothing is written behind a length.
    """
    latent = import_module("foveate.attention.triton.decode_latent")  # which is built on this module
    if layout is None and scores is None and latent.overlaps(q, stores, scale, softcap)[0]:
        return latent.overlapped(q, stores, scale, sinks)
    k, v = stores.k, stores.v
    k_dim, v_dim, units = k.shape[-1], v.shape[-1], stores.lengths.shape[0]
    batch, heads, queries, _ = q.shape
    rows = queries * (batch * heads // units)
    shared = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v_dim <= k_dim
    layout = layout or tuning(q, k_dim, rows)
    tile = min(64 if k_dim * q.element_size() <= 1152 else 16, max(16, power_of_two(rows)))
    tiles = -(-rows // tile)
    workers = max(1, multiprocessors(q.device) * layout.per_sm // tiles)
    part, weight = partials(workers + units, rows, v_dim, q.device)
    out, lse = outputs(q, v_dim)
    capped = softcap is not None
    wide = power_of_two(units)
    some = stores.lengths  # stands where a pointer is not read
    starts, pairs = stores.starts, stores.pairs
    _decode[(workers * tiles,)](
        q, k, v, stores.lengths, some if starts is None else starts, some if pairs is None else pairs, part, weight,
        weight if scores is None else scores, *in_base_2(scale, softcap),
        units, workers, k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0 if scores is None else scores.stride(2),
        R=rows, N=queries, M=tile, TILES=tiles, BLOCK=layout.block, UNITS=wide, STARTS=starts is not None,
        PAIRS=pairs is not None, SHARED=shared, CAPPED=capped, PRECISION=precision_of(q.dtype), LEAN=tile >= 64,
        SCORES=scores is not None,
        **shapes(k_dim, v_dim, shared=shared), num_warps=layout.warps, num_stages=layout.stages,
    )  # fmt: skip
    # Each row is merged by a few small programs: what one load fetches is all that most of them wait for.
    piece = min(64, power_of_two(v_dim))
    _merge[(units * rows, -(-v_dim // piece))](
        part, weight, stores.lengths, some if pairs is None else pairs, some if sinks is None else sinks, out, lse,
        units, workers, R=rows, N=queries, H=heads, BLOCK=layout.block, UNITS=wide, DV=v_dim, PIECE=piece,
        WIDE=32, PAIRS=pairs is not None, SINKS=sinks is not None, num_warps=2,
    )  # fmt: skip
    return out, lse


def decode_ragged(
    q: Tensor, stores: Stores, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the newest N queries of each row over all tokens that its store heads hold.

    The N queries are the last N tokens of the store, and see what came before them; query head h reads store head
    h // (H / Hs). Nothing is read behind a length, and every output is written. Never waits for the device, and the
    shapes of everything depend on shapes alone, so that it can be captured in a CUDA graph.

    Args:
        q: [B, H, N, Dk], N from 1 to 8.
        stores: all B * Hs pairs.
        scale: factor of the scores; None: Dk ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: [H] learned logits that take softmax mass without a value.

    Returns:
        out [B, H, N, Dv] in the dtype of q, lse [B, H, N] float32. Where a query sees nothing, 0 and -inf (the sink,
        if there is one).
    """
    k, v, units = stores.k, stores.v, stores.lengths.shape[0]
    if k.dim() != 3 or v.dim() != 3 or k.stride(2) != 1 or v.stride(2) != 1:
        raise BadArgument("stores", (k.shape, k.stride(), v.shape, v.stride()), "give [pairs, tokens, head size] each")
    check_heads(q, k.shape[2], max(1, units // max(1, q.shape[0])))
    if units % q.shape[0] or (stores.starts is None and k.shape[0] != units):
        raise BadArgument("stores.lengths", units, f"give one length per pair of {q.shape[0]} rows and their heads")
    if stores.lengths.dtype != torch.int32:
        raise BadArgument("stores.lengths", str(stores.lengths.dtype), "lengths are int32")
    factor = k.shape[2] ** -0.5 if scale is None else float(scale)
    return _op(q.contiguous(), k, v, stores.lengths, stores.starts, stores.pairs, factor, softcap, sinks)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? starts, Tensor? pairs, float scale, float? softcap, "
    "Tensor? sinks) -> (Tensor, Tensor)"
)


@torch.library.custom_op("foveate::decode_ragged", mutates_args=(), schema=_SCHEMA)
def _op(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return run(q, Stores(*others[:5]), *others[5:])


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs(q, v.shape[-1])
