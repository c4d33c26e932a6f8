"""Append at lengths that only the device knows."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode import Stores, places
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit(do_not_specialize=["units", "capacity"])
def _append(
    k_new, v_new, k, v, lengths, starts, pairs, slots, units, capacity, stride_k, stride_kt, stride_v, stride_vt,
    N: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    STARTS: tl.constexpr, PAIRS: tl.constexpr, SLOTS: tl.constexpr, VALUES: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    length = tl.load(lengths + unit)
    slot = length
    if SLOTS:
        slot = tl.load(slots + unit)
    pair = unit
    if PAIRS:
        pair = tl.load(pairs + unit)
    k_at, v_at = places(starts, unit, units, stride_k, stride_v, STARTS)
    for i in range(N):
        # What does not fit is left out: the memory behind belongs to somebody else.
        fits = (slot + i >= 0) & (slot + i < capacity)
        source = pair.to(tl.int64) * N + i
        d = tl.arange(0, WIDE_K)
        x = tl.load(k_new + source * DK + d, mask=d < DK, other=0.0)
        tl.store(k + k_at + (slot + i).to(tl.int64) * stride_kt + d, x, mask=(d < DK) & fits)
        if VALUES:
            d = tl.arange(0, WIDE_V)
            x = tl.load(v_new + source * DV + d, mask=d < DV, other=0.0)
            tl.store(v + v_at + (slot + i).to(tl.int64) * stride_vt + d, x, mask=(d < DV) & fits)
    if ADVANCE:
        tl.store(lengths + unit, tl.minimum(length + N, tl.maximum(capacity, length)))


def append(
    k_new: Tensor,
    v_new: Tensor | None,
    stores: Stores,
    *,
    slots: Tensor | None = None,
    advance: bool = False,
    capacity: int | None = None,
) -> None:
    """Write N new tokens of every pair behind what it holds, in one launch and in place. Never waits for the device.

    Args:
        k_new: [B, Hs, N, Dk] or [pairs, N, Dk], in the order of the pairs' numbers (row * Hs + store head).
        v_new: the same with Dv; None where values are a view of the keys.
        stores: where to; `stores.lengths` says how many tokens each pair holds.
        slots: int32 [P], the slot of the first new token of each pair where it is not its length (a freed slot).
        advance: lengths grow by N.
        capacity: slots that every pair has; None: those of `stores.k`. Of bands of different capacity give the least
            room that is known to be there. Tokens beyond it are not written.
    """
    k, v, units = stores.k, stores.v, stores.lengths.shape[0]
    k_flat = k_new.reshape(-1, *k_new.shape[-2:]).contiguous()
    v_flat = None if v_new is None else v_new.reshape(-1, *v_new.shape[-2:]).contiguous()
    for name, x, dim in (("k_new", k_flat, k.shape[-1]), ("v_new", v_flat, v.shape[-1])):
        if x is not None and (x.shape[0] != units or x.shape[2] != dim or x.dtype != k.dtype):
            given = f"{tuple(x.shape)} {x.dtype}"
            raise BadArgument(name, given, f"give [{units}, N, {dim}] in the dtype of the store, {k.dtype}")
    if slots is not None and (slots.dtype != torch.int32 or slots.shape != (units,)):
        raise BadArgument("slots", f"{tuple(slots.shape)} {slots.dtype}", f"give int32 [{units}]")
    room = k.shape[1] if capacity is None else capacity
    values = None if v_new is None else v
    _op(k, values, stores.lengths, k_flat, v_flat, stores.starts, stores.pairs, slots, room, advance)


_SCHEMA = (
    "(Tensor(a!) k, Tensor(b!)? v, Tensor(c!) lengths, Tensor k_new, Tensor? v_new, Tensor? starts, Tensor? pairs, "
    "Tensor? slots, SymInt capacity, bool advance) -> ()"
)


@torch.library.custom_op("foveate::append", mutates_args=("k", "v", "lengths"), schema=_SCHEMA)
def _op(
    k: Tensor,
    v: Tensor | None,
    lengths: Tensor,
    k_new: Tensor,
    v_new: Tensor | None,
    starts: Tensor | None,
    pairs: Tensor | None,
    slots: Tensor | None,
    capacity: int,
    advance: bool,
) -> None:
    units, queries, k_dim = k_new.shape
    values, other = (v, v_new) if v is not None and v_new is not None else (k, k_new)
    v_dim = other.shape[2]
    _append[(units,)](
        k_new, other, k, values, lengths, lengths if starts is None else starts, lengths if pairs is None else pairs,
        lengths if slots is None else slots, units, capacity, k.stride(0), k.stride(1), values.stride(0),
        values.stride(1), N=queries, DK=k_dim, DV=v_dim, WIDE_K=power_of_two(k_dim), WIDE_V=power_of_two(v_dim),
        STARTS=starts is not None, PAIRS=pairs is not None, SLOTS=slots is not None, VALUES=v is not None,
        ADVANCE=advance, num_warps=2,
    )  # fmt: skip


@_op.register_fake
def _(*arguments: Any) -> None:
    return None
