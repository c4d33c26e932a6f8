"""Steps of the block-sparse forward kernel: a tile of queries meets a tile of keys, with a mask or without."""

from __future__ import annotations

import triton.language as tl

from foveate.attention.triton.block_sparse_tiles import jit


@jit
def scores(q, k, factor, cap, CAP: tl.constexpr):
    """Scores: capped ones in units of log 2, others to be multiplied by `factor`."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if CAP:
        s = cap - 2 * cap / (tl.exp2(s * factor) + 1)
    return s


@jit
def absorb(acc, total, top, s, v, factor):
    """One step of the online softmax with finite scores."""
    new = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new[:, None])
    alpha = tl.exp2(top - new)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="tf32x3")
    return acc, total, new


@jit
def whole(
    acc, total, top, q, k_desc, v_desc, k_base, v_base, ksm, vsm, b, h, start, factor, cap, BN: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr, CAP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The tile of keys that begins at slot `start`, of which every query reads everything."""
    offset = tl.arange(0, BN)
    dk, dv = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    if TMA:
        k = k_desc.load([b, h, start, 0]).reshape(BN, WIDE_K)
    else:
        k_at = k_base + start.to(tl.int64) * ksm + offset[:, None] * ksm + dk[None, :]
        k = tl.load(k_at) if DK == WIDE_K else tl.load(k_at, mask=(dk < DK)[None, :], other=0.0)
    s = scores(q, k, factor, cap, CAP)
    if TMA:
        v = v_desc.load([b, h, start, 0]).reshape(BN, WIDE_V)
    else:
        v_at = v_base + start.to(tl.int64) * vsm + offset[:, None] * vsm + dv[None, :]
        v = tl.load(v_at) if DV == WIDE_V else tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
    return absorb(acc, total, top, s, v, 1.0 if CAP else factor)


@jit
def masked(
    acc, total, top, q, k_base, v_base, ksm, vsm, cols, valid, ends, high, at, factor, cap, window, sink, beyond,
    DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr, CAP: tl.constexpr,
    SPAN: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """One tile of keys, each pair tested: causal, readable, and with a span inside (NEAR) or outside of it. Slots that
    no row of the tile may read are never fetched."""
    dk, dv = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    held = valid & (cols < high)
    slot = cols.to(tl.int64)
    k = tl.load(k_base + slot[:, None] * ksm + dk[None, :], mask=held[:, None] & (dk < DK)[None, :], other=0.0)
    v = tl.load(v_base + slot[:, None] * vsm + dv[None, :], mask=held[:, None] & (dv < DV)[None, :], other=0.0)
    seen = held[None, :] & (cols[None, :] < ends[:, None])
    if SPAN:
        distance = at[:, None] - cols[None, :]
        close = (distance >= 0) & (distance >= beyond) & ((cols < sink)[None, :] | (distance < window))
        seen = seen & (close if NEAR else ~close)
    s = scores(q, k, factor, cap, CAP)
    s = tl.where(seen, s if CAP else s * factor, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - anchor[:, None])
    alpha = tl.exp2(top - anchor)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="tf32x3")
    return acc, total, new


@jit
def listed_cols(list_base, t, count, BN: tl.constexpr, K_BLOCK: tl.constexpr):
    """Slots of step t of a list, and which of them are listed: each step has BN slots, of several blocks or of one."""
    offset = tl.arange(0, BN)
    if K_BLOCK >= BN:
        steps: tl.constexpr = K_BLOCK // BN
        entry = t // steps
        block = tl.load(list_base + entry, mask=entry < count, other=0)
        cols = block * K_BLOCK + t % steps * BN + offset
        return cols, (offset >= 0) & (entry < count)
    else:
        entry = t * (BN // K_BLOCK) + offset // K_BLOCK
        block = tl.load(list_base + entry, mask=entry < count, other=0)
        return block * K_BLOCK + offset % K_BLOCK, entry < count


@jit
def near_tiles(
    acc, total, top, q, k_desc, v_desc, k_base, v_base, ksm, vsm, b, h, ends, high, at, real, factor, cap,
    window, sink, beyond, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr,
    WIDE_V: tl.constexpr, CAP: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All that a span shows: tiles of the sink, and of what lies between the oldest window and the newest query.
    Those that every query of the tile sees as a whole need no mask."""
    earliest = tl.min(tl.where(real, at, 1 << 30), 0)
    latest = tl.max(tl.where(real, at, 0), 0)
    sinks = tl.cdiv(tl.minimum(sink, high), BN)
    recent = tl.maximum(tl.maximum(earliest - window + 1, 0) // BN, sinks)
    last = tl.maximum(tl.cdiv(high, BN), recent)
    shared = tl.minimum(tl.min(tl.where(real, ends, 1 << 30), 0), earliest - tl.maximum(beyond, 0) + 1)
    shared = tl.maximum(shared, 0)  # slots below this one are in nobody's future, and far enough behind everybody
    sunk = tl.minimum(tl.minimum(sink, shared) // BN, sinks)
    begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(latest - window + 1, 0), BN), recent), last)
    end = tl.minimum(tl.maximum(shared // BN, begin), last)
    for t in tl.range(0, sunk + end - begin, num_stages=STAGES):
        start = tl.where(t < sunk, t, t - sunk + begin) * BN
        acc, total, top = whole(
            acc, total, top, q, k_desc, v_desc, k_base, v_base, ksm, vsm, b, h, start, factor, cap,
            BN, DK, DV, WIDE_K, WIDE_V, CAP, TMA,
        )  # fmt: skip
    cut, left = sinks - sunk, begin - recent
    for t in tl.range(0, cut + left + last - end, num_stages=STAGES):
        tile = tl.where(t < cut, t + sunk, tl.where(t < cut + left, t - cut + recent, t - cut - left + end))
        cols = tile * BN + tl.arange(0, BN)
        acc, total, top = masked(
            acc, total, top, q, k_base, v_base, ksm, vsm, cols, cols >= 0, ends, high, at, factor, cap,
            window, sink, beyond, DK, DV, WIDE_K, WIDE_V, CAP, True, True,
        )  # fmt: skip
    return acc, total, top
