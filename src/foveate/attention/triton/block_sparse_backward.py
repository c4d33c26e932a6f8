"""Gradients of block-sparse attention: of queries tile by tile over their lists, of keys and values over the lists
turned around, so that every number is written by one program and nothing is added atomically."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.block_sparse import LOG2E, Config, listed_cols, padded, tiling
from foveate.attention.triton.block_sparse_tiles import Place, jit, row_ends, strides, tiles


def config(dtype: torch.dtype, k_dim: int, v_dim: int) -> Config:
    """The layout of both kernels."""
    widest = max(k_dim, v_dim)
    if dtype == torch.float32:
        return Config(32, 16 if widest > 128 else 32, 4, 1, tma=False)
    return Config(64, 64, 4 if widest <= 128 else 8, 2, tma=False)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    q_block: int,
    k_block: int,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    at: Place | None = None,
    layout: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        q, k, v, lists, q_block, k_block, scale, softcap, at: as given to `block_sparse.forward`, without a span.
        out, lse: what it gave.
        grad_out: [B, H, N, Dv].
        grad_lse: [B, H, N]; None: lse was not used.
    """
    at = at or Place()
    layout = layout or config(q.dtype, q.shape[3], v.shape[3])
    batch, heads, queries, k_dim = q.shape
    k_heads, keys, v_dim = k.shape[1], k.shape[2], v.shape[3]
    # softmax: dscore = p (dp - sum(out dout) + dlse).
    delta = (out.float() * grad_out.float()).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse.float()
    delta, grad_out, lse = delta.contiguous(), grad_out.to(q.dtype).contiguous(), lse.contiguous()
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=q.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=q.device)
    wide_k, wide_v = padded(k_dim), padded(v_dim)
    factor = scale * LOG2E if softcap is None else 2 * scale * LOG2E / softcap
    cap = 0.0 if softcap is None else softcap * LOG2E
    group = heads // k_heads
    numbers = {
        "HK": k_heads, "GROUP": group, "LIST_GROUP": heads // lists.shape[1], "Q_BLOCK": q_block, "K_BLOCK": k_block,
        "DK": k_dim, "DV": v_dim, "WIDE_K": wide_k, "WIDE_V": wide_v, "CAP": softcap is not None,
        "num_warps": layout.warps, "num_stages": layout.stages,
    }  # fmt: skip
    where = (at.first, at.lengths, *strides(at.first), *strides(at.lengths))

    how = tiling(layout, q_block, k_block, group, True)
    places = tiles(lists, q_block, k_block, (batch, heads, k_heads, queries, keys), how, at)
    _queries[(places.order.numel(),)](
        q, k, v, grad_out, lse, delta, grad_q, lists, places.stop, places.order, *where,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(lists.stride(i) if lists.shape[i] > 1 else 0 for i in range(3)),
        queries, keys, places.order.shape[1], -(-queries // how.rows), scale, factor, cap,
        ROWS=how.rows, BN=how.columns, **numbers,
    )  # fmt: skip

    turned, counts = transposed(lists, -(-keys // k_block))
    columns = max(16, min(k_block, layout.columns))
    blocks, steps = turned.shape[2], -(-k_block // columns)
    _keys[(batch * k_heads * blocks * steps,)](
        q, k, v, grad_out, lse, delta, grad_k, grad_v, turned, counts, *where,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        queries, keys, blocks, turned.shape[1], turned.shape[3], scale, factor, cap,
        ROWS=how.rows, BN=columns, **numbers,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def transposed(lists: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that list it, ascending: int32 [B, h, blocks, nq], not written behind their
    number, which is [B, h, blocks]."""
    batch, heads, q_blocks, _ = lists.shape
    table = torch.zeros(batch, heads, q_blocks, blocks + 1, dtype=torch.uint8, device=lists.device)
    table.scatter_(-1, torch.where(lists < 0, blocks, lists).long(), 1)
    table = table[..., :blocks].transpose(2, 3).contiguous()
    turned = torch.empty(batch, heads, blocks, q_blocks, dtype=torch.int32, device=lists.device)
    counts = torch.empty(batch, heads, blocks, dtype=torch.int32, device=lists.device)
    _compact[(counts.numel(),)](table, turned, counts, q_blocks, CHUNK=128, num_warps=4)
    return turned, counts


@jit
def _compact(table_ptr, turned_ptr, counts_ptr, width, CHUNK: tl.constexpr):
    pid = tl.program_id(0)
    base = pid.to(tl.int64) * width
    found = 0
    for start in range(0, width, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        listed = tl.load(table_ptr + base + entry, mask=entry < width, other=0).to(tl.int32)
        place = found + tl.cumsum(listed, 0) - 1
        tl.store(turned_ptr + base + place, entry, mask=listed > 0)
        found += tl.sum(listed, 0)
    tl.store(counts_ptr + pid, found)


@jit
def _weights(q, k, do, v, lse2, delta, seen, scale, factor, cap, CAP: tl.constexpr):
    """Probabilities of a tile, and the gradient of its raw scores."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor
    slope = scale
    if CAP:
        bent = 1 - 2 / (tl.exp2(s) + 1)
        s = bent * cap
        slope = scale * (1 - bent * bent)
    p = tl.where(seen, tl.exp2(s - lse2[:, None]), 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="tf32x3")
    return p, p * (dp - delta[:, None]) * slope


@jit
def _rows(
    q_ptr, do_ptr, lse_ptr, delta_ptr, b, head, i, queries, qsb, qsh, qsn, heads,
    DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """What a tile of queries brings; a row that read nothing gets an lse of 0, since it is masked everywhere."""
    dk, dv = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    real = i < queries
    row = i.to(tl.int64)
    flat = (b.to(tl.int64) * heads + head) * queries + row
    q_base = q_ptr + b.to(tl.int64) * qsb + head.to(tl.int64) * qsh
    q = tl.load(q_base + row[:, None] * qsn + dk[None, :], mask=real[:, None] & (dk < DK)[None, :], other=0.0)
    do = tl.load(do_ptr + flat[:, None] * DV + dv[None, :], mask=real[:, None] & (dv < DV)[None, :], other=0.0)
    lse = tl.load(lse_ptr + flat, mask=real, other=0.0)
    delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
    return q, do, tl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634), delta, flat


@jit
def _queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, lists_ptr, stop_ptr, order_ptr, first_ptr, lengths_ptr,
    fsb, fsh, lsb, lsh, qsb, qsh, qsn, ksb, ksh, ksm, vsb, vsh, vsm, sb, sh, sq,
    queries, keys, count, across, scale, factor, cap,
    HK: tl.constexpr, GROUP: tl.constexpr, LIST_GROUP: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr,
    WIDE_V: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    segment = pid // count
    index = tl.load(order_ptr + pid)
    b = segment // HK
    h = segment % HK
    head = h * GROUP + index // across
    row = index % across * ROWS
    i = row + tl.arange(0, ROWS)
    ends = row_ends(i, b, h, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys)
    high = tl.max(ends, 0)
    q, do, lse2, delta, flat = _rows(
        q_ptr, do_ptr, lse_ptr, delta_ptr, b, head, i, queries, qsb, qsh, qsn, HK * GROUP, DK, DV, WIDE_K, WIDE_V
    )
    dk, dv = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    k_base = k_ptr + b.to(tl.int64) * ksb + h.to(tl.int64) * ksh
    v_base = v_ptr + b.to(tl.int64) * vsb + h.to(tl.int64) * vsh
    base = lists_ptr + b.to(tl.int64) * sb + (head // LIST_GROUP).to(tl.int64) * sh + (row // Q_BLOCK).to(tl.int64) * sq
    stop = tl.load(stop_ptr + segment * count + index)
    end = stop * (K_BLOCK // BN) if K_BLOCK >= BN else tl.cdiv(stop, BN // K_BLOCK)
    dq = tl.zeros((ROWS, WIDE_K), tl.float32)
    for t in range(end):
        cols, valid = listed_cols(base, t, stop, BN, K_BLOCK)
        held = valid & (cols < high)
        slot = cols.to(tl.int64)
        k = tl.load(k_base + slot[:, None] * ksm + dk[None, :], mask=held[:, None] & (dk < DK)[None, :], other=0.0)
        v = tl.load(v_base + slot[:, None] * vsm + dv[None, :], mask=held[:, None] & (dv < DV)[None, :], other=0.0)
        seen = held[None, :] & (cols[None, :] < ends[:, None])
        _, ds = _weights(q, k, do, v, lse2, delta, seen, scale, factor, cap, CAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")
    to = dq_ptr + flat[:, None] * DK + dk[None, :]
    tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=(i < queries)[:, None] & (dk < DK)[None, :])


@jit
def _keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, turned_ptr, counts_ptr, first_ptr, lengths_ptr,
    fsb, fsh, lsb, lsh, qsb, qsh, qsn, ksb, ksh, ksm, vsb, vsh, vsm,
    queries, keys, blocks, list_heads, width, scale, factor, cap,
    HK: tl.constexpr, GROUP: tl.constexpr, LIST_GROUP: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr,
    WIDE_V: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (K_BLOCK + BN - 1) // BN
    TILES: tl.constexpr = Q_BLOCK // ROWS
    pid = tl.program_id(0)
    block = pid // STEPS % blocks
    segment = pid // STEPS // blocks
    b = segment // HK
    h = segment % HK
    offset = tl.arange(0, BN)
    cols = block * K_BLOCK + pid % STEPS * BN + offset
    mine = (cols < keys) & (offset < K_BLOCK)
    # Slots behind the length may hold anything; whoever reads a slot sees it in some row, so the others count as zero.
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b * lsb + h * lsh).to(tl.int32), keys)
    first = keys - queries
    if first_ptr is not None:
        first = tl.load(first_ptr + b * fsb + h * fsh).to(tl.int32)
    held = mine & (cols < tl.minimum(length, first + queries))
    slot = cols.to(tl.int64)
    nk, nv = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    k_base = k_ptr + b.to(tl.int64) * ksb + h.to(tl.int64) * ksh
    v_base = v_ptr + b.to(tl.int64) * vsb + h.to(tl.int64) * vsh
    k = tl.load(k_base + slot[:, None] * ksm + nk[None, :], mask=held[:, None] & (nk < DK)[None, :], other=0.0)
    v = tl.load(v_base + slot[:, None] * vsm + nv[None, :], mask=held[:, None] & (nv < DV)[None, :], other=0.0)
    dk = tl.zeros((BN, WIDE_K), tl.float32)
    dv = tl.zeros((BN, WIDE_V), tl.float32)
    for g in range(GROUP):
        head = h * GROUP + g
        list_row = (b.to(tl.int64) * list_heads + head // LIST_GROUP) * blocks + block
        count = tl.load(counts_ptr + list_row)
        for t in range(count * TILES):
            q_block = tl.load(turned_ptr + list_row * width + t // TILES)
            i = (q_block * TILES + t - t // TILES * TILES) * ROWS + tl.arange(0, ROWS)
            ends = row_ends(i, b, h, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys)
            q, do, lse2, delta, _ = _rows(
                q_ptr, do_ptr, lse_ptr, delta_ptr, b, head, i, queries, qsb, qsh, qsn, HK * GROUP,
                DK, DV, WIDE_K, WIDE_V,
            )  # fmt: skip
            seen = held[None, :] & (cols[None, :] < ends[:, None])
            p, ds = _weights(q, k, do, v, lse2, delta, seen, scale, factor, cap, CAP)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="tf32x3")
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="tf32x3")
    flat = (b.to(tl.int64) * HK + h) * keys + slot
    dk_at, dv_at = dk_ptr + flat[:, None] * DK + nk[None, :], dv_ptr + flat[:, None] * DV + nv[None, :]
    tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=mine[:, None] & (nk < DK)[None, :])
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=mine[:, None] & (nv < DV)[None, :])
