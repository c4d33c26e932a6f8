"""How far down the order of its codes a query head chooses, and how many tokens heads of a pair choose together.

Source: windowed lookup by codes, A2ATS (2502.12665), section 3.
"""

from __future__ import annotations

import triton.language as tl

from foveate.attention.triton.topk import ordered
from foveate.attention.triton.workers import jit


@jit(do_not_specialize=["sink", "window", "room", "most"])
def widen(first, counts, lengths, wanted, sink, window, room, most, count, N: tl.constexpr):
    """How many of its best tokens each query head of a pair may choose, `most` at most, so that all of them together
    have room; `first` [P, X]: the best rank that any head gives a token of each code."""
    pair = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, N)
    some = tl.load(counts + pair * count + x, mask=x < count, other=0)
    rank = tl.load(first + pair * count + x, mask=x < count, other=0).to(tl.int32)
    room -= tl.minimum(tl.load(lengths + pair), sink + window)
    low, high = 0 * room, most + 1 + 0 * room
    while high - low > 1:
        middle = (low + high) // 2
        fits = tl.sum(tl.minimum(tl.maximum(middle - rank, 0), some), 0) <= room
        low, high = tl.where(fits, middle, low), tl.where(fits, high, middle)
    tl.store(wanted + pair, low)


@jit(do_not_specialize=["sink", "window", "most"])
def reach(
    table, counts, wanted, near, which, lengths, codes, marks, cuts, nexts, most, sink, window, count, tiles, stride_c,
    stride_ct, STORES: tl.constexpr, R: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """Mark the codes whose tokens a query head chooses, all of them (1) or those in front of its cut (2). NEXT: one
    token more, if it wants fewer than `most`, and which that is."""
    head = tl.program_id(0).to(tl.int64)
    pair = head // R
    x = tl.arange(0, N)
    some = tl.load(counts + pair * count + x, mask=x < count, other=0)
    key = ordered(tl.load(table + head * count + x, mask=x < count, other=float("-inf")))
    key = tl.where(some > 0, key, -0x7F800001)
    if NEXT:
        asked = tl.load(wanted + pair) + 1
        need = tl.minimum(tl.minimum(asked, most), tl.sum(some, 0))
        more = need == asked
    else:
        need = tl.minimum(tl.load(wanted + pair // STORES), tl.sum(some, 0))
    # As in `topk`: low is reached by so many tokens as are needed, high by fewer.
    low = tl.min(tl.where(some > 0, key, 0x7F800000), 0)
    high = tl.max(key, 0) + 1
    reached = tl.sum(some, 0)
    gap = high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)
    while (reached > need) & (gap > 1):
        third = tl.maximum(gap // 3, 1)
        one = (low.to(tl.uint32, bitcast=True) + third).to(tl.int32, bitcast=True)
        two = (low.to(tl.uint32, bitcast=True) + third + third).to(tl.int32, bitcast=True)
        wide = some.to(tl.int64)
        both = tl.sum(tl.where(key >= two, (wide << 32) + wide, tl.where(key >= one, wide, 0)), 0)
        reach_one, reach_two = (both & 0xFFFFFFFF).to(tl.int32), (both >> 32).to(tl.int32)
        gap = tl.where(reach_two >= need, gap - third - third, third)
        low = tl.where(reach_two >= need, two, tl.where(reach_one >= need, one, low))
        reached = tl.where(reach_two >= need, reach_two, tl.where(reach_one >= need, reach_one, reached))
    if NEXT:  # the last one is looked for even where all of its code are chosen
        low = tl.min(tl.where((key >= low) & (some > 0), key, 0x7F800000), 0)
        reached = tl.where(more, need + 1, reached)
    tie = (key == low) & (reached > need) & (some > 0)
    sure = (key >= low) & (tie == 0) & (some > 0) & (need > 0)
    tl.store(marks + head * count + x, tl.where(sure, 1, tl.where(tie, 2, 0)).to(tl.int8), mask=x < count)
    left = need - tl.sum(tl.where(key > low, some, 0), 0)
    length = tl.load(lengths + pair)
    mine = codes + pair * stride_c
    cut, first, end = sink, sink, length - window
    if (reached > need) & (left > 0):
        tl.debug_barrier()  # the marks are looked up by other threads than those that wrote them
        going = left
        while (going > 0) & (first < end):
            slot = first + tl.arange(0, BLOCK)
            code = tl.load(mine + slot.to(tl.int64) * stride_ct, mask=slot < end, other=-1).to(tl.int32)
            here = tl.load(marks + head * count + code, mask=code >= 0, other=0) == 2
            found = tl.sum(here.to(tl.int32), 0)
            if found >= going:
                number = tl.cumsum(here.to(tl.int32), 0)
                cut = tl.min(tl.where(here & (number == going), slot, end), 0) + 1
            going -= found
            first += BLOCK
    tl.store(cuts + head, cut)
    if NEXT:
        tl.store(nexts + head, tl.where(more, cut - 1, -1))
    if head % R == 0:
        tile = tl.arange(0, WIDE)
        away = tl.load(near + pair * tiles + tile, mask=tile < tiles, other=float("inf"))
        number = tl.load(which + pair * tiles + tile, mask=tile < tiles, other=count)
        best = tl.min(tl.where(away == tl.min(away, 0), number, count), 0)
        tl.store(mine + (length - 1).to(tl.int64) * stride_ct, best.to(codes.dtype.element_ty))
