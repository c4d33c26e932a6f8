"""One new token of every pair, in one launch: where it goes, the counts that change, keys, values and positions, and
what its block of keys is summarised by. Its key and the queries of its group are turned first, if they have to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode import Stores, places
from foveate.attention.triton.workers import jit, power_of_two

_WORDS = {4: torch.int32, 2: torch.int16}
"""What tags of so many bytes are moved as."""


NOWHERE = tl.constexpr(-(2**62))
"""Where something begins that is not there."""


@dataclass(frozen=True)
class Tags:
    """Values per slot besides keys, values and positions, as words of 4 bytes or all of 2: W of them for each of P
    pairs.

    Args:
        base: int32 or int16, any of them.
        start: int64 [W, P], where a word of slot 0 lies, in words from the first of `base`.
        step: int64 [W, P], words from one slot to the next.
        fill: [W], of a token that just arrived, like `base`.
    """

    base: Tensor
    start: Tensor
    step: Tensor
    fill: Tensor

    @property
    def words(self) -> int:
        """W."""
        return len(self.fill)


@dataclass(frozen=True)
class Extremes:
    """Channel-wise minima and maxima of the keys of each block of `size` slots, by pair and block 2 Dk numbers.

    Args:
        base: any of them, in the dtype of the keys; the blocks of a pair lie one behind the other.
        start: int64 [P], where those of a pair begin, in elements from the first of `base`.
    """

    base: Tensor
    start: Tensor
    size: int


@dataclass(frozen=True)
class Turn:
    """Rotary embeddings that the token does not have yet: of all channels, those of the first half with those of the
    second.

    Args:
        q: [B, H, 1, Dk], contiguous, turned in place.
        cos, sin: [B, 1, Dk] or [1, 1, Dk].
    """

    q: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Counters:
    """What a step counts for each of P pairs, all on the device.

    Args:
        lengths: int32 [P], slots in use.
        seen: int64 [P], position of the new token.
        turn: int64 [P], tokens that a full window took.
        slots: int32 [P], where the newest token went (written).
        ring: int64 [R], slots of all full windows in the order in which they are overwritten, pair behind pair.
        ring_start, ring_size: int64 [P], the part of `ring` that is a pair's; size 0: it has no full window.
        positions: int32, any tensor of positions of the store, or None where nobody has any.
        position_start: int64 [P], where a pair's positions begin, in elements from the first of `positions` (negative
            where they lie in front of it); `NOWHERE`: none.
        tags: what else is held of each token, or None.
        extremes: what is held of each block of keys, or None; none of the pairs has a full window then.
    """

    lengths: Tensor
    seen: Tensor
    turn: Tensor
    slots: Tensor
    ring: Tensor
    ring_start: Tensor
    ring_size: Tensor
    positions: Tensor | None
    position_start: Tensor
    tags: Tags | None = None
    extremes: Extremes | None = None


@jit
def _number(x, d, keep):
    return tl.load(x + d, mask=keep, other=0.0).to(tl.float32)


@jit
def _turned(number, aside, cos, sin, kind: tl.constexpr):
    """number * cos + aside * sin. Each product and the sum is rounded, as PyTorch does it, where the kernel is launched
    without fusing them."""
    return ((number * cos).to(kind).to(tl.float32) + (aside * sin).to(kind).to(tl.float32)).to(kind)


@jit
def turn_rows(x, rows, keep, cos, sin, HALF: tl.constexpr, WIDE: tl.constexpr):
    """Turn the rows [M] behind x in place: channel d of the first half with channel d of the second."""
    kind: tl.constexpr = x.dtype.element_ty
    d = tl.arange(0, WIDE)
    inside = d < HALF
    place, keep = rows[:, None] + d[None, :], keep[:, None] & inside[None, :]
    a, b = _number(x, place, keep), _number(x, place + HALF, keep)
    c1, c2 = _number(cos, d, inside)[None, :], _number(cos, HALF + d, inside)[None, :]
    s1, s2 = _number(sin, d, inside)[None, :], _number(sin, HALF + d, inside)[None, :]
    tl.store(x + place, _turned(a, -b, c1, s1, kind), mask=keep)
    tl.store(x + place + HALF, _turned(b, a, c2, s2, kind), mask=keep)


@jit(do_not_specialize=["units"])
def _arrive(
    k_new, v_new, q, cos, sin, k, v, starts, pairs, lengths, seen, turn, slots, ring, ring_start, ring_size, positions,
    position_start, tags, tag_start, tag_step, tag_fill, extremes, extreme_start, units, stride_k, stride_kt, stride_v,
    stride_vt, stride_cos, stride_sin, DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    WORDS: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, STARTS: tl.constexpr,
    PAIRS: tl.constexpr, VALUES: tl.constexpr, PLACED: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr,
    R: tl.constexpr, WIDE_R: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    length = tl.load(lengths + unit)
    size = tl.load(ring_size + unit)
    at = tl.load(turn + unit)
    now = tl.load(seen + unit)
    cyclic = size > 0
    place = tl.load(ring + tl.load(ring_start + unit) + at % tl.maximum(size, 1), mask=cyclic, other=0).to(tl.int32)
    slot = tl.where(cyclic, place, length)
    pair = unit
    if PAIRS:
        pair = tl.load(pairs + unit)
    k_at, v_at = places(starts, unit, units, stride_k, stride_v, STARTS)
    d = tl.arange(0, WIDE_K)
    x = tl.load(k_new + pair.to(tl.int64) * DK + d, mask=d < DK, other=0.0)
    if TURNED:
        HALF: tl.constexpr = DK // 2
        c, s = cos + (pair // HEADS).to(tl.int64) * stride_cos, sin + (pair // HEADS).to(tl.int64) * stride_sin
        other = tl.where(d < HALF, d + HALF, d - HALF)
        y = _number(k_new + pair.to(tl.int64) * DK, other, d < DK)
        by, aside = _number(c, d, d < DK), tl.where(d < HALF, -y, y)
        x = _turned(x.to(tl.float32), aside, by, _number(s, d, d < DK), k_new.dtype.element_ty)
        r = tl.arange(0, WIDE_R)
        turn_rows(q, (pair.to(tl.int64) * R + r) * DK, r < R, c, s, HALF, WIDE_K // 2)
    tl.store(k + k_at + slot.to(tl.int64) * stride_kt + d, x, mask=d < DK)
    if SIZE:
        # All keys of the block are read again: a step that is made twice must leave what it leaves when made once.
        low = x.to(tl.float32)
        high = low
        for first in range(slot // SIZE * SIZE, slot, ROWS):
            old = first + tl.arange(0, ROWS)
            there = (old < slot)[:, None] & (d < DK)[None, :]
            far = k + k_at + old.to(tl.int64)[:, None] * stride_kt + d[None, :]
            keys = tl.load(far, mask=there, other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.min(tl.where(there, keys, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(there, keys, float("-inf")), 0))
        begin = extremes + tl.load(extreme_start + unit) + (slot // SIZE).to(tl.int64) * (2 * DK)
        tl.store(begin + d, low.to(x.dtype), mask=d < DK)
        tl.store(begin + DK + d, high.to(x.dtype), mask=d < DK)
    if VALUES:
        d = tl.arange(0, WIDE_V)
        x = tl.load(v_new + pair.to(tl.int64) * DV + d, mask=d < DV, other=0.0)
        tl.store(v + v_at + slot.to(tl.int64) * stride_vt + d, x, mask=d < DV)
    if PLACED:
        begin = tl.load(position_start + unit)
        tl.store(positions + begin + slot, now.to(tl.int32), mask=begin != NOWHERE)
    if WORDS:
        word = tl.arange(0, WIDE)
        some = word < WORDS
        first = tl.load(tag_start + word * units + unit, mask=some, other=0)
        step = tl.load(tag_step + word * units + unit, mask=some, other=0)
        fill = tl.load(tag_fill + word, mask=some, other=0)
        tl.store(tags + first + slot.to(tl.int64) * step, fill, mask=some)
    # The first token of a full window takes the one free slot, the others the oldest token's.
    tl.store(lengths + unit, tl.where(cyclic & (at > 0), length, length + 1))
    tl.store(seen + unit, now + 1)
    tl.store(turn + unit, tl.where(cyclic, at + 1, at))
    tl.store(slots + unit, slot)


def arrive(k_new: Tensor, v_new: Tensor | None, stores: Stores, counters: Counters, turn: Turn | None = None) -> None:
    """Take in one token of every pair, in place. There must be room for it. Never waits for the device.

    Args:
        k_new: [B, Hs, 1, Dk], in the order of the pairs' numbers.
        v_new: [B, Hs, 1, Dv]; None where values are a view of the keys.
        stores: where to.
        turn: what keys and queries are still to be turned by.
    """
    k, v, c, tags, extremes = stores.k, stores.v, counters, counters.tags, counters.extremes
    words = 0 if tags is None else tags.words
    k_flat = k_new.reshape(-1, k.shape[-1]).contiguous()
    v_flat = k_flat if v_new is None else v_new.reshape(-1, v.shape[-1]).contiguous()
    units = c.lengths.shape[0]
    some = c.lengths  # stands where a pointer is not read
    wide = power_of_two(k.shape[-1])
    q, cos, sin = (k_flat, k_flat, k_flat) if turn is None else (turn.q, turn.cos, turn.sin)
    group = 1 if turn is None else q.shape[1] // k_new.shape[1]
    _arrive[(units,)](
        k_flat, v_flat, q, cos, sin, k, v, some if stores.starts is None else stores.starts,
        some if stores.pairs is None else stores.pairs, c.lengths, c.seen, c.turn, c.slots, c.ring, c.ring_start,
        c.ring_size, some if c.positions is None else c.positions, c.position_start,
        some if tags is None else tags.base, some if tags is None else tags.start, some if tags is None else tags.step,
        some if tags is None else tags.fill, some if extremes is None else extremes.base,
        some if extremes is None else extremes.start, units, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        *(0 if len(x) == 1 else x.stride(0) for x in (cos, sin)), DK=k.shape[-1], DV=v.shape[-1], WIDE_K=wide,
        WIDE_V=power_of_two(v.shape[-1]), WORDS=words, WIDE=power_of_two(words),
        SIZE=0 if extremes is None else extremes.size, ROWS=max(1, min(16, 2048 // wide)),
        STARTS=stores.starts is not None, PAIRS=stores.pairs is not None, VALUES=v_new is not None,
        PLACED=c.positions is not None, TURNED=turn is not None, HEADS=k_new.shape[1],
        R=group, WIDE_R=power_of_two(group), num_warps=1 if group <= 8 else 4, enable_fp_fusion=False,
    )  # fmt: skip


def counters(
    lengths: Tensor,
    seen: Tensor,
    turn: Tensor,
    rings: Sequence[Tensor | None],
    positions: Sequence[Tensor | None],
    sizes: Sequence[int],
    tags: Tags | None = None,
    extremes: Extremes | None = None,
) -> Counters:
    """Counters of several bands, whose lengths, seen and turn stand one behind the other.

    Args:
        rings: by band int64 [P, W], or None.
        positions: by band int32 [P, C], or None.
        sizes: pairs of each band.
    """
    device = lengths.device
    starts, widths, parts, behind = [], [], [], 0
    for ring, count in zip(rings, sizes, strict=True):
        width = 0 if ring is None else ring.shape[1]
        starts.append(behind + width * torch.arange(count, device=device))
        widths.append(torch.full((count,), width, device=device))
        if ring is not None:
            parts.append(ring.reshape(-1))
            behind += ring.numel()
    flat = torch.cat(parts) if parts else torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.zeros_like(lengths)
    base, places_of = reached(positions, sizes, device)
    ring_start, ring_size = torch.cat(starts), torch.cat(widths)
    return Counters(lengths, seen, turn, slots, flat, ring_start, ring_size, base, places_of, tags, extremes)


def reached(parts: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Where each pair's part of several tensors [P, ...] of one dtype begins, in elements from the first of any one of
    them, which is returned, too: int64 [sum of sizes], `NOWHERE` where a band has none. It notes addresses."""
    base = next((x for x in parts if x is not None), None)
    starts = []
    for x, count in zip(parts, sizes, strict=True):
        if x is None or base is None:
            starts.append(torch.full((count,), NOWHERE.value, device=device))
        else:
            away = (x.data_ptr() - base.data_ptr()) // x.element_size()
            starts.append(away + x.stride(0) * torch.arange(count, device=device))
    return base, torch.cat(starts)


def tags_of(bands: Sequence[Sequence[tuple[Tensor, float]]]) -> Tags | None:
    """What the bands hold of each token besides, by band and name the values [P, C, width] and what fills them; None
    if there is nothing, or it does not come in words of 4 or of 2 bytes."""
    flat = [x for band in bands for x, _ in band]
    sizes = {x.element_size() for x in flat}
    if len(sizes) != 1 or not sizes <= _WORDS.keys() or any(x.is_complex() for x in flat):
        return None
    (size,) = sizes
    base, starts, steps, fills = flat[0].view(_WORDS[size]), [], [], []
    for band in bands:
        begin, step = [], []
        for x, _ in band:
            away = (x.data_ptr() - base.data_ptr()) // size
            pair = x.stride(0) * torch.arange(x.shape[0], device=x.device)
            begin += [away + pair + word * x.stride(2) for word in range(x.shape[2])]
            step += [torch.full_like(pair, x.stride(1))] * x.shape[2]
        starts.append(torch.stack(begin))
        steps.append(torch.stack(step))
    for x, fill in bands[0]:
        fills.append(x.new_full((x.shape[2],), fill).view(base.dtype))
    return Tags(base, torch.cat(starts, 1), torch.cat(steps, 1), torch.cat(fills))
