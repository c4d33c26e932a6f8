"""Column sums and entropies of a causal attention map from a known lse: one program per tile, no map in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.block_sparse import LOG2E, described, descriptor, padded
from foveate.attention.triton.block_sparse_tiles import Place, jit, row_ends, strides

_MANY = 512
"""Programs that keep a GPU busy."""


def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    at: Place | None = None,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    held: int | None = None,
    each: bool = False,
    entropy: bool = False,
) -> Tensor:
    """For each key the probabilities exp(score - lse) of all queries that see it, by causality and length.

    The sums of a window are those of its queries alone: give the last W rows of q and lse.

    Args:
        q: [B, H, N, Dk]; k: [B, Hk, M, Dk]; last axis contiguous.
        lse: [B, H, N], natural logarithm; -inf where a query saw nothing.
        scale, softcap: as given to `attend`.
        at: where queries and keys stand, without a span.
        valid: int [B], how many queries count in each row; None: all.
        slots: int32 [B, 1 or Hk, M], where the keys stand among `held` ones, ascending; None: each at its own number.
            What stands behind them all is none.
        each: a sum for each query head, instead of one for its group.
        entropy: sum -p ln p instead of p.

    Returns:
        [B, Hk or H, M] float32.
    """
    at = at or Place()
    batch, heads, queries, dim = q.shape
    k_heads, keys = k.shape[1:3]
    sums = torch.empty(batch, heads if each else k_heads, keys, dtype=torch.float32, device=q.device)
    how = _layout(q.dtype, dim, sums.numel())
    across = -(-keys // how.keys)
    mass = _masses(lse, valid, how.queries)
    tma = how.tma and described(q)
    options = {} if how.registers is None else {"maxnreg": how.registers}
    _columns[(batch * sums.shape[1] * across,)](
        q, k, mass, sums, descriptor(q, how.queries, padded(dim)) if tma else None, at.first, at.lengths, slots,
        *q.stride()[:3], *k.stride()[:3], *strides(at.first), *strides(at.lengths), *strides(slots),
        queries, mass.shape[2], keys if held is None else held, keys, across,
        scale * LOG2E if softcap is None else 2 * scale * LOG2E / softcap, 0.0 if softcap is None else softcap * LOG2E,
        OUT_HEADS=sums.shape[1], HEADS=heads, K_GROUP=heads // k_heads, D=dim, WIDE=padded(dim),
        CAP=softcap is not None, ENTROPY=entropy, TMA=tma, BM=how.queries, BN=how.keys, STAGES=how.stages,
        num_warps=how.warps, num_stages=how.stages, **options,
    )  # fmt: skip
    return sums


class _Layout(NamedTuple):
    """Keys and queries of a tile, warps, tiles of queries in flight, most registers of a thread, and whether queries
    come by tensor descriptor."""

    keys: int
    queries: int
    warps: int
    stages: int
    registers: int | None
    tma: bool


def _layout(dtype: torch.dtype, dim: int, sums: int) -> _Layout:
    """Two programs share a processor, so that one's exponentials run under the other's products; wide tiles of keys
    fetch queries less often, which would take as long as either."""
    if dtype == torch.float32 or dim > 128:
        return _Layout(64, 32, 4, 2, None, False)
    if sums >= _MANY * 256:
        return _Layout(256, 64, 8, 2, 128, True)
    return _Layout(128, 64, 4, 2, None, True)


def _masses(lse: Tensor, valid: Tensor | None, rows: int) -> Tensor:
    """lse [B, H, N] in base 2 and whole tiles of `rows`; inf for queries that saw nothing, do not count or are none."""
    mass = torch.where(lse == -torch.inf, torch.inf, lse.float() * LOG2E)
    if valid is not None:
        counts = torch.arange(lse.shape[2], device=lse.device) < valid.view(-1, 1, 1)
        mass = mass.masked_fill_(~counts, torch.inf)
    return F.pad(mass, (0, -lse.shape[2] % rows), value=torch.inf)


def row_entropies(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    at: Place | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """-sum p ln p of each query over the keys that it sees, in nats. Arguments as for `column_sums`.

    Returns:
        [B, H, N] float32; 0 where a query saw nothing or does not count.
    """
    at = at or Place()
    batch, heads, queries, dim = q.shape
    k_heads, keys = k.shape[1:3]
    out = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    wide = q.dtype == torch.float32 or dim > 128
    rows, columns = (64, 32) if wide else (128, 64)
    across = -(-queries // rows)
    _entropies[(batch * heads * across,)](
        q, k, lse.float().contiguous(), out, valid, at.first, at.lengths,
        *q.stride()[:3], *k.stride()[:3], *strides(at.first), *strides(at.lengths),
        queries, keys, across,
        scale * LOG2E if softcap is None else 2 * scale * LOG2E / softcap, 0.0 if softcap is None else softcap * LOG2E,
        HEADS=heads, K_GROUP=heads // k_heads, D=dim, WIDE=padded(dim),
        CAP=softcap is not None, BM=rows, BN=columns, num_warps=4 if wide else 8, num_stages=2,
    )  # fmt: skip
    return out


@jit
def _weights(
    k, mass, q_desc, q_base, b, head, start, qsn, queries, factor, cap,
    D: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Probabilities p [keys, queries] of queries from `start` on, or -p ln p, without regard to what is seen; queries
    that do not count give 0."""
    if TMA:
        q = q_desc.load([b, head, start, 0]).reshape(BM, WIDE)
    else:
        d = tl.arange(0, WIDE)
        i = tl.minimum(start + tl.arange(0, BM), queries - 1)
        q = tl.load(q_base + i.to(tl.int64)[:, None] * qsn + d[None, :], mask=(d < D)[None, :], other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    x = (cap - 2 * cap / (tl.exp2(s * factor) + 1) if CAP else s * factor) - mass[None, :]
    return _surprise(x) if ENTROPY else tl.exp2(x)


@jit
def _surprise(x):
    """-p ln p of p = 2 ** x; 0 where x is -inf."""
    x = tl.maximum(x, -1000.0)
    return tl.exp2(x) * x * -0.6931471805599453


@jit(do_not_specialize=["columns", "across"])
def _columns(
    q_ptr, k_ptr, mass_ptr, sums_ptr, q_desc, first_ptr, lengths_ptr, slots_ptr,
    qsb, qsh, qsn, ksb, ksh, ksm, fsb, fsh, lsb, lsh, ssb, ssh, queries, wide, keys, columns, across, factor, cap,
    OUT_HEADS: tl.constexpr, HEADS: tl.constexpr, K_GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    CAP: tl.constexpr, ENTROPY: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // OUT_HEADS
    pid = tl.program_id(0)
    # Early keys are seen by most queries: they run first, for all heads side by side.
    tile = pid // OUT_HEADS % across
    b = pid // OUT_HEADS // across
    head = pid % OUT_HEADS * GROUP
    h = head // K_GROUP
    first = keys - queries
    if first_ptr is not None:
        first = tl.load(first_ptr + b * fsb + h * fsh).to(tl.int32)
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b * lsb + h * lsh).to(tl.int32), keys)
    cols = tile * BN + tl.arange(0, BN)
    slot = cols
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b * ssb + h * ssh + cols, mask=cols < columns, other=2147483647)
    held = (cols < columns) & (slot < length) & (slot < first + queries)
    d = tl.arange(0, WIDE)
    k_at = k_ptr + b.to(tl.int64) * ksb + h.to(tl.int64) * ksh + cols.to(tl.int64)[:, None] * ksm + d[None, :]
    k = tl.load(k_at, mask=held[:, None] & (d < D)[None, :], other=0.0)
    # Tiles of queries: those that see some of the keys, then those that see all of them.
    low = tl.maximum(tl.min(slot, 0) - first, 0) // BM
    high = tl.cdiv(tl.maximum(tl.max(tl.where(held, slot, 0), 0) - first, 0), BM)
    end = tl.where(tl.min(slot, 0) < length, tl.cdiv(queries, BM), 0)
    high = tl.maximum(tl.minimum(high, end), low)
    r = tl.arange(0, BM)
    sums = tl.zeros((BN,), tl.float32)
    for g in range(GROUP):
        q_base = q_ptr + b.to(tl.int64) * qsb + (head + g).to(tl.int64) * qsh
        mass_at = mass_ptr + (b.to(tl.int64) * HEADS + head + g) * wide + r
        for t in tl.range(low, high, num_stages=STAGES):
            mass = tl.load(mass_at + t * BM)
            p = _weights(
                k, mass, q_desc, q_base, b, head + g, t * BM, qsn, queries, factor, cap,
                D, WIDE, BM, CAP, ENTROPY, TMA,
            )  # fmt: skip
            sums += tl.sum(tl.where((slot - first)[:, None] <= (t * BM + r)[None, :], p, 0.0), 1)
        for t in tl.range(high, end, num_stages=STAGES):
            mass = tl.load(mass_at + t * BM)
            sums += tl.sum(
                _weights(
                    k, mass, q_desc, q_base, b, head + g, t * BM, qsn, queries, factor, cap,
                    D, WIDE, BM, CAP, ENTROPY, TMA,
                ), 1,
            )  # fmt: skip
    to = sums_ptr + (b.to(tl.int64) * OUT_HEADS + pid % OUT_HEADS) * columns + cols
    tl.store(to, tl.where(held, sums, 0.0), mask=cols < columns)


@jit
def _entropies(
    q_ptr, k_ptr, lse_ptr, out_ptr, valid_ptr, first_ptr, lengths_ptr,
    qsb, qsh, qsn, ksb, ksh, ksm, fsb, fsh, lsb, lsh, queries, keys, across, factor, cap,
    HEADS: tl.constexpr, K_GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # Late queries see most keys: they run first, for all heads side by side.
    tile = across - 1 - pid // HEADS % across
    b = pid // HEADS // across
    head = pid % HEADS
    h = head // K_GROUP
    count = queries
    if valid_ptr is not None:
        count = tl.minimum(tl.load(valid_ptr + b).to(tl.int32), queries)
    i = tile * BM + tl.arange(0, BM)
    real = i < count
    d = tl.arange(0, WIDE)
    q_at = q_ptr + b.to(tl.int64) * qsb + head.to(tl.int64) * qsh + i.to(tl.int64)[:, None] * qsn + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    at = (b.to(tl.int64) * HEADS + head) * queries + i
    lse = tl.load(lse_ptr + at, mask=real, other=float("-inf"))
    mass = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    ends = row_ends(i, b, h, first_ptr, lengths_ptr, fsb, fsh, lsb, lsh, queries, keys)
    k_base = k_ptr + b.to(tl.int64) * ksb + h.to(tl.int64) * ksh
    found = tl.zeros((BM,), tl.float32)
    for start in tl.range(0, tl.max(tl.where(real, ends, 0), 0), BN):
        cols = start + tl.arange(0, BN)
        k_at = k_base + cols.to(tl.int64)[:, None] * ksm + d[None, :]
        k = tl.load(k_at, mask=(cols < keys)[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor
        if CAP:
            s = cap - 2 * cap / (tl.exp2(s) + 1)
        x = tl.where(cols[None, :] < ends[:, None], s - mass[:, None], float("-inf"))
        found += tl.sum(_surprise(x), 1)
    tl.store(out_ptr + at, found, mask=i < queries)
