"""Decode over latents for many heads on Hopper, where matrix products take as long as reading.

Triton waits for all matrix products before a softmax. Here two groups of four warps take turns, so that the matrix
units always have work: the even group makes the scores of every second block of 64 tokens, the odd group those of the
others, and each adds up one half of the output columns over all, giving its weights to the other through shared memory
(the schedule that FlashMLA describes). A third group fetches: tokens by descriptor, once for scores and values, each
half of a block as soon as its room is free, in pieces of 64 channels, of which scores are made as they arrive. There is
room for one block alone, so that reading would begin when products end: the next block is called into the L2 cache
before, by all tiles that read it, a part each.

Blocks of 128 tokens of all units stand in one row and are split evenly among workers, as `workers` describes; the
program of (worker, tile) reads those of the worker for 64 query rows.
"""

# Kernels are compiled from this text; what their functions return outside of it is nobody's concern.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

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

jit: Any = gluon.jit

TILE = 64
"""Query rows of a program."""
BLOCK = 128
"""Tokens that the two groups read together."""

_LOW = gl.constexpr(-3.0e38)
"""Below all logits, and finite: differences of it are no NaN."""
# Barriers. Pieces of 64 channels arrive: 9 of the even block, 9 of the odd one, in the order in which scores want them.
# Halves are free again in the order in which they are fetched: what is first of the even block, first of the odd one,
# second of the even one, second of the odd one. A group adds up the values of the first half of its own block and of
# the second half of the other one, which are the same columns: 0 to 255 for the even group.
_HERE = gl.constexpr(0)
_FREE = gl.constexpr(18)
_Q_HERE = gl.constexpr(22)
_Q_FREE = gl.constexpr(23)
_TOP = gl.constexpr(24)
_WEIGHTS = gl.constexpr(25)  # of the even group; 26: of the odd group
_BARRIERS = gl.constexpr(27)

_S = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_O = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
_S_ROW = gl.constexpr(gl.SliceLayout(1, _S.value))
_O_ROW = gl.constexpr(gl.SliceLayout(1, _O.value))
_P = gl.constexpr(gl.DotOperandLayout(0, _O.value, 2))
_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_CHUNK = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


def start(
    q: Tensor,
    c: Tensor,
    lengths: Tensor,
    pairs: Tensor | None,
    part: Tensor,
    weight: Tensor,
    factor: float,
    workers: int,
) -> None:
    """What each of the workers finds of each unit (row worker + unit of part and weight).

    Args:
        q: [B, H, N, 576], contiguous; c: [B, C, 576], whose tokens are one distance apart throughout.
        lengths: int32 [B], tokens of each unit; pairs: int32 [B], the row of q of each unit; None: the unit itself.
        part: [workers + B, H * N, 512], weight (log-masses, base 2): [workers + B, H * N]; float32.
        factor: scale times log2(e), positive.
    """
    (batch, heads, queries, dim), units = q.shape, c.shape[0]
    rows, stride = heads * queries, c.stride(0) // c.stride(1)
    tiles = -(-rows // TILE)
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def pieces(x: Tensor, height: int, distance: int) -> TensorDescriptor:
        return TensorDescriptor(x, [height, dim], [distance, 1], [TILE, 64], layout)

    _decode[(workers * tiles,)](
        pieces(q, batch * rows, dim), pieces(c, (units - 1) * stride + c.shape[1], c.stride(1)), c, c.stride(1),
        lengths, lengths if pairs is None else pairs, part, weight, factor, units, workers, stride, rows, queries,
        tiles,
        UNITS=max(128, 1 << (units - 1).bit_length()), PAIRS=pairs is not None, num_warps=4,
    )  # fmt: skip


@jit
def _plus(a, b):
    return a + b


@jit
def _part_of(lengths, unit, before, end):
    """Length and blocks of a unit, and where a worker stops in it."""
    length = gl.load(lengths + unit)
    blocks = (length + 127) // 128
    return length, blocks, gl.minimum(end, before + blocks)


@jit
def _fetch_half(
    desc, rooms, bars, t, phase, FREE: gl.constexpr, CHANNEL: gl.constexpr, ROOM: gl.constexpr, HERE: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """COUNT pieces of a block from CHANNEL on, when their room is free."""
    mbarrier.wait(bars.index(_FREE + FREE), phase)
    for i in gl.static_range(COUNT):
        mbarrier.expect(bars.index(HERE + i), 64 * 64 * 2)
        tma.async_copy_global_to_shared(desc, [t, CHANNEL + 64 * i], bars.index(HERE + i), rooms.index(ROOM + i))


@jit
def _announce(c, apart, first, start, stop, tile, tiles):
    """Call a tile's share of the 128 tokens from `start` on, those before `stop`, into the L2 cache."""
    row = gl.arange(0, 128, _LINE)
    # One tile alone is bound by memory's rate, and only delayed by it.
    wanted = (start + row < stop) & (row * tiles // 128 == tile) & (tiles > 1)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 1152; mov.u32 $0, 0; }",
        "=r,l,r", [c + (first + start + row).to(gl.int64) * apart, wanted.to(gl.int32)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _fetch(
    q_desc, c_desc, c, apart, q, even, odd, bars, lengths, pairs, at, end, unit, before, tile, tiles, stride, rows,
    PAIRS: gl.constexpr,
):  # fmt: skip
    """The fetching group."""
    phase = 1
    q_phase = 1
    while at < end:
        length, blocks, stop = _part_of(lengths, unit, before, end)
        if stop > at:
            pair = unit
            if PAIRS:
                pair = gl.load(pairs + unit)
            row = pair * rows + tile * 64
            mbarrier.wait(bars.index(_Q_FREE), q_phase)
            q_phase ^= 1
            mbarrier.expect(bars.index(_Q_HERE), 64 * 576 * 2)
            for i in gl.static_range(9):
                tma.async_copy_global_to_shared(q_desc, [row, 64 * i], bars.index(_Q_HERE), q.index(i))
            last = gl.minimum(length, (stop - before) * 128)
            for j in range(at - before, stop - before):
                t = unit * stride + j * 128
                _fetch_half(c_desc, even, bars, t, phase, 0, 0, 0, _HERE, 4)
                _fetch_half(c_desc, odd, bars, t + 64, phase, 1, 256, 4, _HERE + 9, 4)
                _fetch_half(c_desc, even, bars, t, phase, 2, 256, 4, _HERE + 4, 5)
                _fetch_half(c_desc, odd, bars, t + 64, phase, 3, 0, 0, _HERE + 13, 4)
                # Its place holds the weights of the odd group in between.
                mbarrier.expect(bars.index(_HERE + 17), 64 * 64 * 2)
                tma.async_copy_global_to_shared(c_desc, [t + 64, 512], bars.index(_HERE + 17), odd.index(8))
                _announce(c, apart, unit * stride, j * 128 + 128, last, tile, tiles)
                phase ^= 1
        at = stop
        before += blocks
        unit += 1


@jit
def _clear(rooms, kept):
    """Zero the values of the tokens from `kept` on."""
    n = gl.arange(0, 64, gl.SliceLayout(1, _CHUNK))
    for i in gl.static_range(8):
        part = rooms.index(i)
        y = part.load(_CHUNK)
        part.store(gl.where(gl.expand_dims(n < kept, 1), y, gl.zeros([64, 64], rooms.dtype, _CHUNK)))


@jit
def _masked(s, start, length, tile, queries, own):
    """Scores of the 64 tokens from `start` on, -inf where a query does not see them. What the tokens behind the length
    hold may be anything, and a weight of 0 would not make up for NaN, so that they are cleared."""
    if start + 64 > length - queries + 1:
        here = start + gl.arange(0, 64, gl.SliceLayout(0, _S))
        row = tile * 64 + gl.arange(0, 64, _S_ROW)
        ends = length - queries + 1 + row % queries
        s = gl.where(gl.expand_dims(here, 0) < gl.expand_dims(ends, 1), s, float("-inf"))
        if start + 64 > length:
            _clear(own, length - start)
            fence_async_shared()
    return s


@jit
def _scores(q, own, bars, zero, phase, acc, SIDE: gl.constexpr, LATER: gl.constexpr):
    """Scores [64, 64] of the own block. LATER: the products before it go on meanwhile, and the room that they read is
    given free when they end."""
    s = gl.zeros([64, 64], gl.float32, _S)
    for i in gl.static_range(9):
        # The odd block's channels from 256 on come first.
        piece = zero + ((i + 4 * SIDE) % 8 if i < 8 else 8)
        mbarrier.wait(bars.index(_HERE + 9 * SIDE + i), phase)
        keys = own.index(piece).permute((1, 0))
        s = warpgroup_mma(q.index(piece), keys, s, use_acc=i > 0, is_async=True)
        if LATER and i == 0:
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(bars.index(_FREE + 3 - SIDE), count=1)
    s = warpgroup_mma_wait(0, deps=(s,))
    return s, acc


@jit
def _columns(rooms, zero, SIDE: gl.constexpr):
    """Columns [64, 256] of a block that a group adds up."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    return rooms._reinterpret(rooms.dtype, [2, 64, 256], layout).index(zero + SIDE)


@jit
def _absorb_even(s, acc, top, mass, factor, own, other, spare, tops, bars, zero, phase):
    """Both blocks into the columns of the even group; returns with the products with the odd block under way."""
    new = gl.maximum(top, gl.max(s, 1) * factor)
    tops[0].store(new)
    mbarrier.arrive(bars.index(_TOP), count=1)
    p = gl.exp2(s * factor - gl.expand_dims(new, 1))
    shrink = gl.exp2(top - new)
    mass = mass * shrink + gl.sum(p, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, _O_ROW), 1)
    acc = warpgroup_mma(gl.convert_layout(p.to(spare.dtype), _P), _columns(own, zero, 0), acc, is_async=True)
    mbarrier.wait(bars.index(_WEIGHTS + 1), phase)
    top = tops[1].load(_S_ROW)
    shrink = gl.exp2(new - top)
    spare.index(zero).store((p * gl.expand_dims(shrink, 1)).to(spare.dtype))
    fence_async_shared()
    mbarrier.arrive(bars.index(_WEIGHTS), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(bars.index(_FREE), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, _O_ROW), 1)
    acc = warpgroup_mma(other.index(zero + 8), _columns(other, zero, 0), acc, is_async=True)
    return acc, top, mass * shrink


@jit
def _absorb_odd(s, acc, top, mass, factor, own, other, spare, tops, bars, zero, phase, even_phase):
    """Both blocks into the columns of the odd group; returns with the products with the even block under way."""
    high = gl.max(s, 1) * factor
    mbarrier.wait(bars.index(_TOP), phase)
    new = gl.maximum(tops[0].load(_S_ROW), high)
    tops[1].store(new)
    p = gl.exp2(s * factor - gl.expand_dims(new, 1))
    small = p.to(spare.dtype)
    own.index(zero + 8).store(small)
    fence_async_shared()
    mbarrier.arrive(bars.index(_WEIGHTS + 1), count=1)
    shrink = gl.exp2(top - new)
    mass = mass * shrink + gl.sum(p, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, _O_ROW), 1)
    acc = warpgroup_mma(gl.convert_layout(small, _P), _columns(own, zero, 1), acc, is_async=True)
    mbarrier.wait(bars.index(_WEIGHTS), even_phase)
    acc = warpgroup_mma(spare.index(zero), _columns(other, zero, 1), acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(bars.index(_FREE + 1), count=1)
    return acc, new, mass


@jit
def _absorb(
    s, acc, top, mass, start, length, tile, queries, factor, own, other, spare, tops, bars, zero, phase,
    even_phase, SIDE: gl.constexpr,
):  # fmt: skip
    s = _masked(s, start, length, tile, queries, own)
    if SIDE == 0:
        acc, top, mass = _absorb_even(s, acc, top, mass, factor, own, other, spare, tops, bars, zero, phase)
    else:
        acc, top, mass = _absorb_odd(s, acc, top, mass, factor, own, other, spare, tops, bars, zero, phase, even_phase)
    return acc, top, mass


@jit
def _reckon(
    q, own, other, spare, tops, bars, part, weight, factor, lengths, at, end, unit, before, worker, tile, rows,
    queries, SIDE: gl.constexpr,
):  # fmt: skip
    """A group of four warps: scores of its blocks, outputs of its columns."""
    phase = 0
    q_phase = 0
    told = 0
    while at < end:
        length, blocks, stop = _part_of(lengths, unit, before, end)
        if stop > at:
            mbarrier.wait(bars.index(_Q_HERE), q_phase)
            q_phase ^= 1
            acc = gl.zeros([64, 256], gl.float32, _O)
            top = gl.full([64], _LOW, gl.float32, _S_ROW)
            mass = gl.zeros([64], gl.float32, _S_ROW)
            # Shared tiles are indexed by a number that is 0, which the compiler cannot know: it would make the
            # descriptors of all tiles before the loop, and has no registers to hold them.
            s, acc = _scores(q, own, bars, at >> 31, phase, acc, SIDE, False)
            for j in range(at - before, stop - before - 1):
                start = j * 128 + SIDE * 64
                acc, top, mass = _absorb(
                    s, acc, top, mass, start, length, tile, queries, factor, own, other, spare, tops, bars,
                    j >> 31, told, phase, SIDE,
                )  # fmt: skip
                told ^= 1
                phase ^= 1
                s, acc = _scores(q, own, bars, j >> 31, phase, acc, SIDE, True)
            start = (stop - before - 1) * 128 + SIDE * 64
            acc, top, mass = _absorb(
                s, acc, top, mass, start, length, tile, queries, factor, own, other, spare, tops, bars,
                stop >> 31, told, phase, SIDE,
            )  # fmt: skip
            told ^= 1
            phase ^= 1
            mbarrier.arrive(bars.index(_Q_FREE), count=1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(bars.index(_FREE + 3 - SIDE), count=1)
            # Each group has summed the weights of its own blocks. Neither goes on before the other has read them.
            if SIDE == 0:
                tops[0].store(mass)
                mbarrier.arrive(bars.index(_TOP), count=1)
                mbarrier.wait(bars.index(_WEIGHTS + 1), told)
                mass += tops[1].load(_S_ROW)
            else:
                mbarrier.wait(bars.index(_TOP), told)
                tops[1].store(mass)
                mass += tops[0].load(_S_ROW)
                mbarrier.arrive(bars.index(_WEIGHTS + 1), count=1)
            told ^= 1
            _leave(part, weight, (worker + unit).to(gl.int64) * rows, tile, rows, acc, top, mass, SIDE)
        at = stop
        before += blocks
        unit += 1


@jit
def _leave(part, weight, slot, tile, rows, acc, top, mass, SIDE: gl.constexpr):
    seen = mass > 0
    mass = gl.where(seen, mass, 1.0)
    if SIDE == 0:
        row = tile * 64 + gl.arange(0, 64, _S_ROW)
        gl.store(weight + slot + row, gl.where(seen, top + gl.log2(mass), float("-inf")), mask=row < rows)
    row = tile * 64 + gl.arange(0, 64, _O_ROW)
    d = SIDE * 256 + gl.arange(0, 256, gl.SliceLayout(0, _O))
    place = part + gl.expand_dims((slot + row) * 512, 1) + gl.expand_dims(d, 0)
    acc = acc * gl.expand_dims(gl.convert_layout(1 / mass, _O_ROW), 1)
    gl.store(place, acc, mask=gl.expand_dims(row < rows, 1))


@jit(do_not_specialize=["units", "workers", "stride", "rows", "queries", "tiles"])
def _decode(
    q_desc, c_desc, c, apart, lengths, pairs, part, weight, factor, units, workers, stride, rows, queries, tiles,
    UNITS: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    worker = gl.program_id(0) // tiles
    tile = gl.program_id(0) % tiles
    number = gl.arange(0, UNITS, _LINE)
    blocks = (gl.load(lengths + number, mask=number < units, other=0) + 127) // 128
    ends = gl.associative_scan(blocks, 0, _plus)
    total = gl.sum(blocks, 0)
    at = ((worker.to(gl.int64) * total) // workers).to(gl.int32)
    end = (((worker + 1).to(gl.int64) * total) // workers).to(gl.int32)
    unit = gl.sum((ends <= at).to(gl.int32), 0)
    before = gl.sum(gl.where(ends <= at, blocks, 0), 0)

    kind: gl.constexpr = c_desc.dtype
    slim: gl.constexpr = c_desc.layout
    q = gl.allocate_shared_memory(kind, [9, 64, 64], slim)
    even = gl.allocate_shared_memory(kind, [9, 64, 64], slim)
    odd = gl.allocate_shared_memory(kind, [9, 64, 64], slim)
    # Weights of the even group. Those of the odd one take the room of the last channels of its block, which only
    # scores need.
    spare = gl.allocate_shared_memory(kind, [1, 64, 64], slim)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tops = (gl.allocate_shared_memory(gl.float32, [64], flat), gl.allocate_shared_memory(gl.float32, [64], flat))
    bars = gl.allocate_shared_memory(gl.int64, [_BARRIERS, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(_BARRIERS):
        mbarrier.init(bars.index(b), count=2 if b == _Q_FREE else 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _fetch,
                (
                    q_desc, c_desc, c, apart, q, even, odd, bars, lengths, pairs, at, end, unit, before, tile, tiles,
                    stride, rows, PAIRS,
                ),
            ),
            (
                _reckon,
                (
                    q, even, odd, spare, tops, bars, part, weight, factor, lengths, at, end, unit, before,
                    worker, tile, rows, queries, 0,
                ),
            ),
            (
                _reckon,
                (
                    q, odd, even, spare, tops, bars, part, weight, factor, lengths, at, end, unit, before,
                    worker, tile, rows, queries, 1,
                ),
            ),
        ],
        [4, 4],
        [232, 232],
    )  # fmt: skip
