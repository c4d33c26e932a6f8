"""A decode step frees a token of every pair: the one with the least score goes, and the newest takes its slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.arrive import Counters
from foveate.attention.triton.decode import Stores, places
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument

_BLOCK = 1024
"""Slots that one program looks through."""
_NOWHERE = tl.constexpr(2**31 - 1)


class Guard(NamedTuple):
    """Tokens that are never freed.

    Args:
        sink: those at the first so many positions.
        recent: int64 [B] on the device, so many of the newest of each row.
    """

    sink: int
    recent: Tensor


@jit(do_not_specialize=["pieces", "sink"])
def _least(
    scores, positions, position_start, lengths, seen, recent, pairs, value, where, pieces, sink, stride_row,
    stride_head, HEADS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    unit, piece = tl.program_id(0), tl.program_id(1)
    pair = unit
    if PAIRS:
        pair = tl.load(pairs + unit)
    row = (pair // HEADS).to(tl.int64)
    slot = piece * BLOCK + tl.arange(0, BLOCK)
    there = slot < tl.load(lengths + unit)
    s = tl.load(scores + row * stride_row + (pair % HEADS).to(tl.int64) * stride_head + slot, mask=there, other=0.0)
    position = tl.load(positions + tl.load(position_start + unit) + slot, mask=there, other=0)
    newest = tl.load(seen + unit) - tl.load(recent + row)
    free = there & (position >= sink) & (position < newest)
    s = tl.where(free, s.to(tl.float32), float("inf"))
    least = tl.min(s, 0)
    tl.store(value + unit * pieces + piece, least)
    tl.store(where + unit * pieces + piece, tl.min(tl.where(s == least, slot, _NOWHERE), 0))


@jit(do_not_specialize=["pieces", "units"])
def _drop(
    value, where, k, v, starts, pairs, lengths, positions, position_start, tags, tag_start, tag_step, slots, pieces,
    units, stride_k, stride_kt, stride_v, stride_vt, PIECES: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    WIDE_K: tl.constexpr, WIDE_V: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr, STARTS: tl.constexpr,
    VALUES: tl.constexpr, NEWEST: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    last = tl.load(lengths + unit) - 1
    piece = tl.arange(0, PIECES)
    least = tl.load(value + unit * pieces + piece, mask=piece < pieces, other=float("inf"))
    at = tl.load(where + unit * pieces + piece, mask=piece < pieces, other=_NOWHERE)
    slot = tl.min(tl.where(least == tl.min(least, 0), at, _NOWHERE), 0)
    if NEWEST:
        slot = last
    here, there = slot.to(tl.int64), last.to(tl.int64)
    k_at, v_at = places(starts, unit, units, stride_k, stride_v, STARTS)
    d = tl.arange(0, WIDE_K)
    tl.store(k + k_at + here * stride_kt + d, tl.load(k + k_at + there * stride_kt + d, mask=d < DK), mask=d < DK)
    if VALUES:
        d = tl.arange(0, WIDE_V)
        tl.store(v + v_at + here * stride_vt + d, tl.load(v + v_at + there * stride_vt + d, mask=d < DV), mask=d < DV)
    begin = tl.load(position_start + unit)
    tl.store(positions + begin + here, tl.load(positions + begin + there))
    if WORDS:
        word = tl.arange(0, WIDE)
        some = word < WORDS
        first = tags + tl.load(tag_start + word * units + unit, mask=some, other=0)
        step = tl.load(tag_step + word * units + unit, mask=some, other=0)
        tl.store(first + here * step, tl.load(first + there * step, mask=some), mask=some)
    tl.store(lengths + unit, last)
    tl.store(slots + unit, slot)


def evict(scores: Tensor, guard: Guard, stores: Stores, counters: Counters, *, newest: bool = False) -> Tensor:
    """Free the token with the least score of each pair, the first of equal ones; its newest token moves there, with its
    position and its tags. Never waits for the device.

    Args:
        scores: [B, Hs, C], neighbouring slots side by side; anything behind the lengths.
        newest: free the newest token instead, so that nothing that is held is lost.

    Returns:
        int32 [P], the slot of each pair.
    """
    c, tags = counters, counters.tags
    if c.positions is None or scores.dim() != 3 or scores.stride(2) != 1:
        given = f"{tuple(scores.shape)} by {scores.stride()}, positions {c.positions is not None}"
        raise BadArgument("scores", given, "give [rows, store heads, slots] of a store that notes positions")
    k, v, units = stores.k, stores.v, stores.lengths.shape[0]
    pieces = max(1, -(-scores.shape[2] // _BLOCK))
    value = torch.empty(units, pieces, dtype=torch.float32, device=k.device)
    where = torch.empty(units, pieces, dtype=torch.int32, device=k.device)
    some = stores.lengths  # stands where a pointer is not read
    pairs = some if stores.pairs is None else stores.pairs
    if not newest:
        _least[(units, pieces)](
            scores, c.positions, c.position_start, c.lengths, c.seen, guard.recent, pairs, value, where, pieces,
            guard.sink, scores.stride(0), scores.stride(1), HEADS=scores.shape[1], BLOCK=_BLOCK,
            PAIRS=stores.pairs is not None, num_warps=4,
        )  # fmt: skip
    slots = torch.empty_like(c.slots)
    words = 0 if tags is None else tags.words
    # One warp: of several a fast one could count before a slow one has read.
    _drop[(units,)](
        value, where, k, v, some if stores.starts is None else stores.starts, pairs, c.lengths, c.positions,
        c.position_start, some if tags is None else tags.base, some if tags is None else tags.start,
        some if tags is None else tags.step, slots, pieces, units, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        PIECES=power_of_two(pieces), DK=k.shape[-1], DV=v.shape[-1], WIDE_K=power_of_two(k.shape[-1]),
        WIDE_V=power_of_two(v.shape[-1]), WORDS=words, WIDE=power_of_two(words), STARTS=stores.starts is not None,
        VALUES=v.data_ptr() != k.data_ptr(), NEWEST=newest, num_warps=1,
    )  # fmt: skip
    return slots
