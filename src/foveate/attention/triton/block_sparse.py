"""Block-sparse attention forward: tiles of queries over the key blocks of their lists, and over a span beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.block_sparse_steps import absorb, listed_cols, masked, near_tiles, scores, whole
from foveate.attention.triton.block_sparse_tiles import Place, Tiles, Tiling, given_ends, jit, near, strides, tiles
from foveate.attention.triton.workers import knows_gluon

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """How the kernel is laid out on the chip; no choice changes the result beyond rounding.

    Args:
        rows, columns: largest tile of queries and of keys.
        warps, stages: warps of a program, and tiles of K and V in flight.
        tma: fetch blocks by tensor descriptors where the machine and the strides allow it.
        specialize: give loading its own warps.
        ahead: read the next list entry one step early, so that no step waits for it.
        registers: most registers of a thread, which lets more programs share a processor; None: the compiler's choice.
        hopper: the kernel for Hopper, where it can serve (see `block_sparse_hopper`); else this one.
    """

    rows: int = 128
    columns: int = 128
    warps: int = 8
    stages: int = 2
    tma: bool = True
    specialize: bool = False
    ahead: bool = True
    registers: int | None = None
    hopper: bool = True


def config(dtype: torch.dtype, k_dim: int, v_dim: int, k_block: int) -> Config:
    """The layout that was fastest where it was measured (H100)."""
    widest = max(k_dim, v_dim)
    if dtype == torch.float32:
        return Config(64, 32, 8, 1, tma=False)
    if widest > 128:
        return Config(128, 64, 8, 2, tma=k_block >= 64)
    if k_block >= 64:
        return Config(128, 64, 4, 2)
    return Config(128, 64, 8, 2, tma=False, registers=128)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    q_block: int,
    k_block: int,
    *,
    scale: float,
    softcap: float | None = None,
    at: Place | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    layout: Config | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over listed blocks, one program per tile of queries, the heaviest first.

    Args:
        q: [B, H, N, Dk]; k: [B, Hk, M, Dk]; v: [B, Hk, M, Dv]; last axis contiguous, the others anyhow.
        lists: int32 [B, 1 or Hk or H, ceil(N / q_block), K], as in `Selection`.
        q_block, k_block: powers of two from 16 to 128; any multiple of 128 too.
        at: where queries and keys stand, and a span that is read beside the lists.
        prior: (out, lse) of a part over other keys, to be continued.
        layout: None takes `config`.
        out: memory for the result.

    Returns:
        out [B, H, N, Dv] in the dtype of q, lse [B, H, N] float32; 0 and -inf where a query reads nothing.
    """
    at = at or Place()
    layout = layout or config(q.dtype, q.shape[3], v.shape[3], k_block)
    shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    batch, heads, k_heads, queries, _ = shape
    group = heads // k_heads
    how = tiling(layout, q_block, k_block, group, lists.shape[1] == heads and group > 1)
    places = tiles(lists, q_block, k_block, shape, how, at)
    out = q.new_empty(batch, heads, queries, v.shape[3]) if out is None else out
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    launch(q, k, v, lists, places, out, lse, q_block, k_block, how, layout, at, scale, softcap, prior)
    return out, lse


def tiling(layout: Config, q_block: int, k_block: int, group: int, own_lists: bool) -> Tiling:
    """Tiles for a layout: small query blocks of heads that share a list stand in one tile."""
    rows = min(q_block, layout.rows, 128)
    pack = 1
    while not own_lists and rows * pack * 2 <= layout.rows and group % (pack * 2) == 0:
        pack *= 2
    return Tiling(rows, pack, layout.columns)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    places: Tiles,
    out: Tensor,
    lse: Tensor,
    q_block: int,
    k_block: int,
    how: Tiling,
    layout: Config,
    at: Place,
    scale: float,
    softcap: float | None,
    prior: tuple[Tensor, Tensor] | None,
) -> None:
    """The kernel alone, over tiles that were found before (see `forward`)."""
    plain = softcap is None and prior is None and all(x is None for x in at) and lists.shape[3] > 0
    if layout.hopper and plain and _for_hopper(q, k, v, out, k_block, how):
        from foveate.attention.triton import block_sparse_hopper

        block_sparse_hopper.launch(q, k, v, lists, places, out, lse, q_block, k_block, how, scale * LOG2E)
        return
    k_dim, v_dim, group = q.shape[3], v.shape[3], q.shape[1] // k.shape[1]
    wide_k, wide_v = padded(k_dim), padded(v_dim)
    tma = layout.tma and k_block >= how.columns and described(k) and described(v)
    described_k = descriptor(k, how.columns, wide_k) if tma else None
    described_v = descriptor(v, how.columns, wide_v) if tma else None
    span = at.span
    window, sink = near(span)
    rows = how.rows * how.pack
    options = {} if layout.registers is None else {"maxnreg": layout.registers}
    count = places.order.shape[1]
    _block_sparse[(places.order.numel(),)](
        q, k, v, described_k, described_v, out, lse,
        None if prior is None else prior[0].contiguous(), None if prior is None else prior[1].contiguous(),
        lists, places.begin, places.full, places.stop, places.order,
        at.first, at.lengths, at.positions, at.ends,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *(lists.stride(i) if lists.shape[i] > 1 else 0 for i in range(3)),
        *strides(at.first), *strides(at.lengths),
        0 if at.positions is None or at.positions.shape[0] == 1 else at.positions.stride(0),
        0 if at.ends is None or at.ends.shape[0] == 1 else at.ends.stride(0),
        q.shape[2], k.shape[2], count, -(-q.shape[2] // how.rows),
        scale * LOG2E if softcap is None else 2 * scale * LOG2E / softcap,
        0.0 if softcap is None else softcap * LOG2E,
        window, sink, 0 if span is None else span.beyond, k.shape[1],
        GROUP=group, LIST_GROUP=q.shape[1] // lists.shape[1], Q_BLOCK=q_block, K_BLOCK=k_block,
        ROWS=how.rows, PACK=how.pack, BM=rows, BN=how.columns, DK=k_dim, DV=v_dim, WIDE_K=wide_k, WIDE_V=wide_v,
        SPAN=span is not None, CAP=softcap is not None, LISTED=lists.shape[3] > 0, TMA=tma, AHEAD=layout.ahead,
        STAGES=layout.stages, SPECIALIZE=layout.specialize,
        num_warps=layout.warps if rows == layout.rows else min(4, layout.warps), num_stages=layout.stages, **options,
    )  # fmt: skip


def _for_hopper(q: Tensor, k: Tensor, v: Tensor, out: Tensor, k_block: int, how: Tiling) -> bool:
    """Whether the kernel for Hopper can serve: half precision, whole tiles, everything by descriptor."""
    if q.dtype == torch.float32 or not knows_gluon(q.device)[0]:
        return False
    fits = q.shape[3] == v.shape[3] and q.shape[3] in (64, 128) and how.rows >= 16 and how.rows * how.pack == 128
    return fits and k_block >= 64 and all(described(x) for x in (q, k, v, out))


def padded(dim: int) -> int:
    """The size of a tile's row that holds a head of `dim` numbers."""
    return max(16, 1 << (dim - 1).bit_length())


def described(x: Tensor) -> bool:
    """Whether blocks of x [B, Hk, M, D] can be fetched by descriptor: address and strides in units of 16 bytes."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(x.stride(i) * size % 16 == 0 and x.stride(i) > 0 for i in range(3))
    if not aligned or x.stride(3) != 1:
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] >= 9


def descriptor(x: Tensor, columns: int, wide: int) -> object:
    """The tensor descriptor of x [B, Hk, M, D] for tiles of `columns` slots of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, columns, wide])


@jit(do_not_specialize=["sb", "sh", "sq", "count", "across", "window", "sink", "beyond", "k_heads"])
def _block_sparse(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, prior_out, prior_lse,
    lists_ptr, begin_ptr, full_ptr, stop_ptr, order_ptr, first_ptr, lengths_ptr, positions_ptr,
    ends_ptr,
    qsb, qsh, qsn, ksb, ksh, ksm, vsb, vsh, vsm, osb, osh, osn, sb, sh, sq, fsb, fsh, lsb, lsh, psb, esb,
    queries, keys, count, across, factor, cap, window, sink, beyond, k_heads,
    GROUP: tl.constexpr, LIST_GROUP: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    WIDE_K: tl.constexpr, WIDE_V: tl.constexpr, SPAN: tl.constexpr, CAP: tl.constexpr, LISTED: tl.constexpr,
    TMA: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    segment = pid // count
    index = tl.load(order_ptr + pid)
    tile = segment * count + index
    b = segment // k_heads
    h = segment % k_heads
    row = index % across * ROWS
    r = tl.arange(0, BM)
    head = h * GROUP + index // across * PACK + r // ROWS
    i = row + r % ROWS
    real = (i < queries) & (r < ROWS * PACK)
    ends = given_ends(i, b, h, ends_ptr, esb, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys)
    ends = tl.where(real, ends, 0)
    high = tl.max(ends, 0)
    at = i
    if SPAN:
        if positions_ptr is None:
            at = keys - queries + i
        else:
            at = tl.load(positions_ptr + b * psb + i, mask=real, other=0).to(tl.int32)

    wide = b.to(tl.int64)
    dk, dv = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    q_at = q_ptr + wide * qsb + head.to(tl.int64)[:, None] * qsh + i.to(tl.int64)[:, None] * qsn + dk[None, :]
    if DK == WIDE_K:
        q = tl.load(q_at, mask=real[:, None], other=0.0)
    else:
        q = tl.load(q_at, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
    k_base = k_ptr + wide * ksb + h.to(tl.int64) * ksh
    v_base = v_ptr + wide * vsb + h.to(tl.int64) * vsh

    flat = (wide * k_heads * GROUP + head) * queries + i
    if prior_out is None:
        acc = tl.zeros((BM, WIDE_V), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        top = tl.full((BM,), float("-inf"), tl.float32)
    else:
        top = tl.load(prior_lse + flat, mask=real, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        had = real & (top > float("-inf"))
        acc = tl.load(prior_out + flat[:, None] * DV + dv[None, :], mask=had[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc.to(tl.float32)

    if LISTED:
        first_head = h * GROUP + index // across * PACK
        base = lists_ptr + wide * sb + (first_head // LIST_GROUP).to(tl.int64) * sh + (row // Q_BLOCK).to(tl.int64) * sq
        stop = tl.load(stop_ptr + tile)
        full = tl.load(full_ptr + tile)
        begin = 0
        if SPAN:
            begin = tl.load(begin_ptr + tile)
        # In steps of BN keys: those that need no mask, and after (and before) them those that do.
        if K_BLOCK >= BN:
            lo, hi, end = begin * (K_BLOCK // BN), full * (K_BLOCK // BN), stop * (K_BLOCK // BN)
        else:
            lo, hi, end = tl.cdiv(begin, BN // K_BLOCK), full // (BN // K_BLOCK), tl.cdiv(stop, BN // K_BLOCK)
        if SPAN:
            for t in tl.range(0, lo, num_stages=1):
                cols, valid = listed_cols(base, t, stop, BN, K_BLOCK)
                acc, total, top = masked(
                    acc, total, top, q, k_base, v_base, ksm, vsm, cols, valid, ends, high, at, factor, cap,
                    window, sink, beyond, DK, DV, WIDE_K, WIDE_V, CAP, True, False,
                )  # fmt: skip
        if K_BLOCK >= BN:
            steps: tl.constexpr = K_BLOCK // BN
            block = tl.load(base + lo // steps, mask=lo < hi, other=0)
            for t in tl.range(lo, hi, num_stages=STAGES, warp_specialize=SPECIALIZE):
                if not AHEAD:
                    block = tl.load(base + t // steps)
                start = block * K_BLOCK
                if steps > 1:
                    start += t % steps * BN
                acc, total, top = whole(
                    acc, total, top, q, k_desc, v_desc, k_base, v_base, ksm, vsm, b, h, start, factor, cap,
                    BN, DK, DV, WIDE_K, WIDE_V, CAP, TMA,
                )  # fmt: skip
                if AHEAD:
                    block = tl.load(base + tl.minimum(t + 1, hi - 1) // steps)
        else:
            several: tl.constexpr = BN // K_BLOCK
            offset = tl.arange(0, BN)
            block = tl.load(base + lo * several + offset // K_BLOCK, mask=(offset >= 0) & (lo < hi), other=0)
            for t in tl.range(lo, hi, num_stages=STAGES, warp_specialize=SPECIALIZE):
                if not AHEAD:
                    block = tl.load(base + t * several + offset // K_BLOCK)
                slot = (block * K_BLOCK + offset % K_BLOCK).to(tl.int64)
                k_at = k_base + slot[:, None] * ksm + dk[None, :]
                k = tl.load(k_at) if DK == WIDE_K else tl.load(k_at, mask=(dk < DK)[None, :], other=0.0)
                s = scores(q, k, factor, cap, CAP)
                v_at = v_base + slot[:, None] * vsm + dv[None, :]
                v = tl.load(v_at) if DV == WIDE_V else tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
                acc, total, top = absorb(acc, total, top, s, v, 1.0 if CAP else factor)
                if AHEAD:
                    block = tl.load(base + tl.minimum(t + 1, hi - 1) * several + offset // K_BLOCK)
        for t in tl.range(tl.maximum(lo, hi), end, num_stages=1):
            cols, valid = listed_cols(base, t, stop, BN, K_BLOCK)
            acc, total, top = masked(
                acc, total, top, q, k_base, v_base, ksm, vsm, cols, valid, ends, high, at, factor, cap,
                window, sink, beyond, DK, DV, WIDE_K, WIDE_V, CAP, SPAN, False,
            )  # fmt: skip
    if SPAN:
        acc, total, top = near_tiles(
            acc, total, top, q, k_desc, v_desc, k_base, v_base, ksm, vsm, b, h, ends, high, at, real, factor, cap,
            window, sink, beyond, BN, DK, DV, WIDE_K, WIDE_V, CAP, TMA, STAGES,
        )  # fmt: skip

    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    mass = (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    tl.store(lse_ptr + flat, tl.where(some, mass, float("-inf")), mask=real)
    out_at = out_ptr + wide * osb + head.to(tl.int64)[:, None] * osh + i.to(tl.int64)[:, None] * osn + dv[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
