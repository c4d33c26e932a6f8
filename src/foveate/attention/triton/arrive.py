"""One new token of every pair, in one launch: where it goes, the counts that change, keys, values and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode import Stores, places
from foveate.attention.triton.workers import jit, power_of_two


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
        position_start: int64 [P], where a pair's positions begin, in elements from the first of `positions`; -1: none.
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


@jit(do_not_specialize=["units"])
def _arrive(
    k_new, v_new, k, v, starts, pairs, lengths, seen, turn, slots, ring, ring_start, ring_size, positions,
    position_start, units, stride_k, stride_kt, stride_v, stride_vt,
    DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr, STARTS: tl.constexpr,
    PAIRS: tl.constexpr, VALUES: tl.constexpr, PLACED: tl.constexpr,
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
    tl.store(k + k_at + slot.to(tl.int64) * stride_kt + d, x, mask=d < DK)
    if VALUES:
        d = tl.arange(0, WIDE_V)
        x = tl.load(v_new + pair.to(tl.int64) * DV + d, mask=d < DV, other=0.0)
        tl.store(v + v_at + slot.to(tl.int64) * stride_vt + d, x, mask=d < DV)
    if PLACED:
        begin = tl.load(position_start + unit)
        tl.store(positions + begin + slot, now.to(tl.int32), mask=begin >= 0)
    # The first token of a full window takes the one free slot, the others the oldest token's.
    tl.store(lengths + unit, tl.where(cyclic & (at > 0), length, length + 1))
    tl.store(seen + unit, now + 1)
    tl.store(turn + unit, tl.where(cyclic, at + 1, at))
    tl.store(slots + unit, slot)


def arrive(k_new: Tensor, v_new: Tensor | None, stores: Stores, counters: Counters) -> None:
    """Take in one token of every pair, in place. There must be room for it. Never waits for the device.

    Args:
        k_new: [B, Hs, 1, Dk], in the order of the pairs' numbers.
        v_new: [B, Hs, 1, Dv]; None where values are a view of the keys.
        stores: where to.
    """
    k, v, c = stores.k, stores.v, counters
    k_flat = k_new.reshape(-1, k.shape[-1]).contiguous()
    v_flat = k_flat if v_new is None else v_new.reshape(-1, v.shape[-1]).contiguous()
    units = c.lengths.shape[0]
    some = c.lengths  # stands where a pointer is not read
    _arrive[(units,)](
        k_flat, v_flat, k, v, some if stores.starts is None else stores.starts,
        some if stores.pairs is None else stores.pairs, c.lengths, c.seen, c.turn, c.slots, c.ring, c.ring_start,
        c.ring_size, some if c.positions is None else c.positions, c.position_start, units,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        DK=k.shape[-1], DV=v.shape[-1], WIDE_K=power_of_two(k.shape[-1]), WIDE_V=power_of_two(v.shape[-1]),
        STARTS=stores.starts is not None, PAIRS=stores.pairs is not None, VALUES=v_new is not None,
        PLACED=c.positions is not None, num_warps=1,
    )  # fmt: skip


def counters(
    lengths: Tensor,
    seen: Tensor,
    turn: Tensor,
    rings: list[Tensor | None],
    positions: list[Tensor | None],
    sizes: list[int],
) -> Counters:
    """Counters of several bands, whose lengths, seen and turn stand one behind the other.

    Args:
        rings: by band int64 [P, W], or None.
        positions: by band int32 [P, C], or None.
        sizes: pairs of each band.
    """
    device = lengths.device
    starts, widths, parts, places_of, behind = [], [], [], [], 0
    base = next((p for p in positions if p is not None), None)
    for ring, placed, count in zip(rings, positions, sizes, strict=True):
        width = 0 if ring is None else ring.shape[1]
        starts.append(behind + width * torch.arange(count, device=device))
        widths.append(torch.full((count,), width, device=device))
        if ring is not None:
            parts.append(ring.reshape(-1))
            behind += ring.numel()
        if placed is None or base is None:
            places_of.append(torch.full((count,), -1, device=device))
        else:
            away = (placed.data_ptr() - base.data_ptr()) // placed.element_size()
            places_of.append(away + placed.stride(0) * torch.arange(count, device=device))
    flat = torch.cat(parts) if parts else torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.zeros_like(lengths)
    return Counters(lengths, seen, turn, slots, flat, torch.cat(starts), torch.cat(widths), base, torch.cat(places_of))
