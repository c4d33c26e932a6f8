"""Block-sparse attention for Hopper with the exponentials of one step running under the matrix products of the next.

Triton waits for all matrix products before a softmax; here the order is given by hand, in Gluon. For the plain case:
whole blocks of keys by descriptor, bottom-right causality, no span, no softcap.
"""

# Kernels are compiled from this text; what their functions return outside of it is nobody's concern.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foveate.attention.triton.block_sparse_tiles import Tiles, Tiling

jit: Any = gluon.jit


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
    factor: float,
    warps: int,
    stages: int,
) -> None:
    """The kernel over tiles that were found before (see `block_sparse.forward`); factor: scale times log2(e)."""
    kind = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    k_dim, v_dim, columns = q.shape[3], v.shape[3], how.columns
    k_layout = gl.NVMMASharedLayout.get_default_for([1, 1, columns, k_dim], kind)
    v_layout = gl.NVMMASharedLayout.get_default_for([1, 1, columns, v_dim], kind)
    k_desc = TensorDescriptor(k, list(k.shape), list(k.stride()), [1, 1, columns, k_dim], k_layout)
    v_desc = TensorDescriptor(v, list(v.shape), list(v.stride()), [1, 1, columns, v_dim], v_layout)
    _overlapped[(places.order.numel(),)](
        q, k_desc, v_desc, out, lse, lists, places.full, places.stop, places.order,
        *q.stride()[:3], *out.stride()[:3], *(lists.stride(i) if lists.shape[i] > 1 else 0 for i in range(3)),
        q.shape[2], k.shape[2], places.order.shape[1], -(-q.shape[2] // how.rows), factor,
        HK=k.shape[1], GROUP=q.shape[1] // k.shape[1], LIST_GROUP=q.shape[1] // lists.shape[1],
        Q_BLOCK=q_block, STEPS=k_block // columns, ROWS=how.rows, BM=how.rows * how.pack, BN=columns, DK=k_dim,
        DV=v_dim, STAGES=stages, num_warps=warps,
    )  # fmt: skip


@jit
def _softmax(s, top, total, factor):
    """Probabilities of one tile, and the running maximum and sum of the rows."""
    new = gl.maximum(top, gl.max(s, 1) * factor)
    anchor = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * factor - gl.expand_dims(anchor, 1))
    alpha = gl.exp2(top - anchor)
    return p, new, total * alpha + gl.sum(p, 1), alpha


@jit
def _fetch(desc, buffer, bar, b, h, start, pred, BYTES: gl.constexpr):
    mbarrier.expect(bar, BYTES, pred=pred)
    tma.async_copy_global_to_shared(desc, [b, h, start, 0], bar, buffer, pred=pred)


@jit
def _start(base, t, STEPS: gl.constexpr, BN: gl.constexpr):
    """First slot of step t of a list; of its first step where t is none."""
    step = gl.maximum(t, 0)
    return (gl.load(base + step // STEPS) * STEPS + step % STEPS) * BN


@jit
def _overlapped(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, lists_ptr, full_ptr, stop_ptr, order_ptr,
    qsb, qsh, qsn, osb, osh, osn, sb, sh, sq, queries, keys, count, across, factor,
    HK: gl.constexpr, GROUP: gl.constexpr, LIST_GROUP: gl.constexpr, Q_BLOCK: gl.constexpr, STEPS: gl.constexpr,
    ROWS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, DV, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    KIND: gl.constexpr = k_desc.dtype

    pid = gl.program_id(0)
    segment = pid // count
    index = gl.load(order_ptr + pid)
    tile = segment * count + index
    b = segment // HK
    h = segment % HK
    row = index % across * ROWS
    head = h * GROUP + index // across * (BM // ROWS)
    wide = b.to(gl.int64)
    base = lists_ptr + wide * sb + (head // LIST_GROUP).to(gl.int64) * sh + (row // Q_BLOCK).to(gl.int64) * sq
    stop = gl.load(stop_ptr + tile) * STEPS
    full = gl.load(full_ptr + tile) * STEPS

    # Steps run from the newest keys to the oldest, so that those under the mask come first.
    k_buffers = gl.allocate_shared_memory(KIND, [STAGES, 1, 1, BN, DK], k_desc.layout)
    v_buffers = gl.allocate_shared_memory(KIND, [STAGES, 1, 1, BN, DV], v_desc.layout)
    k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(x), count=1)
        mbarrier.init(v_bars.index(x), count=1)
    fence_async_shared()
    K_BYTES: gl.constexpr = BN * DK * 2
    V_BYTES: gl.constexpr = BN * DV * 2
    v_start = 0
    for x in gl.static_range(STAGES):
        v_start = _start(base, stop - 1 - x, STEPS, BN)
        _fetch(k_desc, k_buffers.index(x), k_bars.index(x), b, h, v_start, x < stop, K_BYTES)
        if x < STAGES - 1:
            _fetch(v_desc, v_buffers.index(x), v_bars.index(x), b, h, v_start, x < stop, V_BYTES)
    # The last of them is fetched in the loop, one step behind its keys.
    k_start = _start(base, stop - 1 - STAGES, STEPS, BN)

    r = gl.arange(0, BM, gl.SliceLayout(1, LOAD))
    d = gl.arange(0, DK, gl.SliceLayout(0, LOAD))
    i = row + r % ROWS
    q_at = (head + r // ROWS).to(gl.int64) * qsh + i.to(gl.int64) * qsn
    q_at = q_ptr + wide * qsb + gl.expand_dims(q_at, 1) + gl.expand_dims(d, 0)
    q = gl.load(q_at, mask=gl.expand_dims(i < queries, 1), other=0.0)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DK], KIND)
    q_smem = gl.allocate_shared_memory(KIND, [BM, DK], q_layout, q)
    fence_async_shared()

    sr = gl.arange(0, BM, S_ROW)
    si = row + sr % ROWS
    ends = gl.where(si < queries, gl.minimum(keys - queries + si + 1, keys), 0)
    offset = gl.arange(0, BN, gl.SliceLayout(0, S))
    top = gl.full([BM], float("-inf"), gl.float32, S_ROW)
    total = gl.full([BM], 0.0, gl.float32, S_ROW)
    acc = gl.zeros([BM, DV], gl.float32, OUT)
    zeros = gl.zeros([BM, BN], gl.float32, S)

    if stop > 0:
        mbarrier.wait(k_bars.index(0), 0)
        k0 = k_buffers.index(0).reshape([BN, DK]).permute((1, 0))
        s = warpgroup_mma(q_smem, k0, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        first = _start(base, stop - 1, STEPS, BN)
        if stop > full:
            s = gl.where(gl.expand_dims(first + offset, 0) < gl.expand_dims(ends, 1), s, float("-inf"))
        pf, top, total, alpha = _softmax(s, top, total, factor)
        p = gl.convert_layout(pf.to(KIND), P)
        gl.thread_barrier()
        _fetch(k_desc, k_buffers.index(0), k_bars.index(0), b, h, k_start, stop > STAGES, K_BYTES)
        last = STAGES - 1
        _fetch(v_desc, v_buffers.index(last), v_bars.index(last), b, h, v_start, last < stop, V_BYTES)
        v_start = k_start
        k_start = _start(base, stop - 2 - STAGES, STEPS, BN)
        for j in range(1, stop):
            stage = j % STAGES
            before = (j - 1) % STAGES
            mbarrier.wait(k_bars.index(stage), (j // STAGES) & 1)
            kj = k_buffers.index(stage).reshape([BN, DK]).permute((1, 0))
            s_going = warpgroup_mma(q_smem, kj, zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_bars.index(before), ((j - 1) // STAGES) & 1)
            acc_going = warpgroup_mma(p, v_buffers.index(before).reshape([BN, DV]), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_going])
            if stop - 1 - j >= full:
                at = _start(base, stop - 1 - j, STEPS, BN)
                s = gl.where(gl.expand_dims(at + offset, 0) < gl.expand_dims(ends, 1), s, float("-inf"))
            pf, top, total, alpha = _softmax(s, top, total, factor)
            following = _start(base, stop - 2 - j - STAGES, STEPS, BN)
            acc, p = warpgroup_mma_wait(0, deps=[acc_going, p])
            gl.thread_barrier()
            _fetch(k_desc, k_buffers.index(stage), k_bars.index(stage), b, h, k_start, j + stop > STAGES, K_BYTES)
            more = j - 1 + STAGES < stop
            _fetch(v_desc, v_buffers.index(before), v_bars.index(before), b, h, v_start, more, V_BYTES)
            v_start = k_start
            k_start = following
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW), 1)
            p = gl.convert_layout(pf.to(KIND), P)
        end = (stop - 1) % STAGES
        mbarrier.wait(v_bars.index(end), ((stop - 1) // STAGES) & 1)
        acc_going = warpgroup_mma(p, v_buffers.index(end).reshape([BN, DV]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc_going])

    some = total > 0
    mass = (top + gl.log2(gl.where(some, total, 1.0))) * 0.6931471805599453
    flat = (wide * HK * GROUP + head + sr // ROWS) * queries + si
    gl.store(lse_ptr + flat, gl.where(some, mass, float("-inf")), mask=si < queries)
    shrink = gl.convert_layout(1.0 / gl.where(some, total, 1.0), O_ROW)
    acc = acc * gl.expand_dims(shrink, 1)
    r2 = gl.arange(0, BM, O_ROW)
    i2 = row + r2 % ROWS
    d2 = gl.arange(0, DV, gl.SliceLayout(0, OUT))
    out_at = (head + r2 // ROWS).to(gl.int64) * osh + i2.to(gl.int64) * osn
    out_at = out_ptr + wide * osb + gl.expand_dims(out_at, 1) + gl.expand_dims(d2, 0)
    gl.store(out_at, acc.to(KIND), mask=gl.expand_dims(i2 < queries, 1))
