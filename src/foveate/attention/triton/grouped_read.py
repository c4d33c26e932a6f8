"""Queries brought together by the blocks of keys that they list: one program per tile of (query, block) entries.

Each query is fetched from where it lies, turned to where its block is held, and read against the block's keys with the
others of its tile. No copy of a query is ever written, and nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.splits import merge_rows
from foveate.attention.triton.turning import channels, halves, held_halves, others, product, turned
from foveate.attention.triton.workers import absorb, capped, in_base_2, jit, power_of_two, precision_of
from foveate.errors import BadArgument

_LONGEST = (1 << 31) - 1


class Tiles(NamedTuple):
    """Entries in the order of their blocks, cut into tiles of one block each.

    Args:
        which: numbers of the entries in [B, H, n, K], int [B * H * n * K], those that read nothing last.
        begin, count: of each tile, int [T], in `which`; empty tiles have a count of 0.
        group: of each tile, batch row * blocks + block, int [T].
    """

    which: Tensor
    begin: Tensor
    count: Tensor
    group: Tensor


def tiles(lists: Tensor, size: int, ends: Tensor, blocks: int, tile: int) -> Tiles:
    """Bring the entries of each block together.

    Args:
        lists: int32 [B, H, n, K], blocks of `size` slots, below `blocks`; -1 is none.
        ends: int32 [B, n], one past the last slot that each query may read.
        tile: entries of a tile.
    """
    device, batch = lists.device, lists.shape[0]
    groups = batch * blocks
    # Numbers of two bytes are ordered in half the passes.
    kind = torch.int16 if groups < torch.iinfo(torch.int16).max else torch.int32
    base = torch.arange(batch, device=device, dtype=torch.int32).view(-1, 1, 1, 1) * blocks
    taken = (lists >= 0) & (lists * size < ends[:, None, :, None])
    group, which = torch.where(taken, lists + base, groups).to(kind).flatten().sort()
    bounds = torch.searchsorted(group, torch.arange(groups + 1, device=device, dtype=kind))
    there = (bounds.diff() + tile - 1).div(tile, rounding_mode="floor")
    last = there.cumsum(0)
    most = min(lists.numel(), lists.numel() // tile + groups)
    number = torch.arange(most, device=device)
    owner = torch.searchsorted(last, number, right=True).clamp_max_(groups - 1)
    begin = bounds[owner] + (number - (last - there)[owner]) * tile
    count = (bounds[owner + 1] - begin).clamp_(0, tile)
    return Tiles(which, begin, torch.where(number < last[-1], count, 0), owner)


def grouped_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    places: Tensor,
    ends: Tensor,
    angles: Angles,
    *,
    size: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of queries over blocks of their own, the first key of each block at the place given for it.

    Slots that are not read are never touched and may hold anything.

    Args:
        q: [B, H, n, Dk], adjacent channels.
        k, v: [B, M, Dk] and [B, M, Dv], adjacent channels; the key in slot p was turned by p.
        lists, places: int32 [B, H, n, K]; a block of -1 is none.
        ends: int32 [B, n], one past the last slot that each query may read, at most M.
        angles: by how much queries and keys are turned at each position.
        size: slots of a block.

    Returns:
        out [B, H, n, Dv] in the dtype of q, lse [B, H, n] float32; 0 and -inf where nothing is read.

    Raises:
        BadArgument: what does not fit each other.
    """
    (batch, heads, queries, dim), (_, keys, v_dim), width = q.shape, v.shape, lists.shape[-1]
    if q.stride(3) != 1 or k.stride(2) != 1 or v.stride(2) != 1 or k.dtype != q.dtype or v.dtype != q.dtype:
        given = f"q {q.dtype}, k {k.dtype}, v {v.dtype}, strides {q.stride()}, {k.stride()}, {v.stride()}"
        raise BadArgument("q", given, "give queries, keys and values of one dtype with adjacent channels")
    if lists.shape != (batch, heads, queries, width) or places.shape != lists.shape or lists.numel() > _LONGEST:
        given = f"lists {tuple(lists.shape)}, places {tuple(places.shape)} for q {tuple(q.shape)}"
        raise BadArgument("lists", given, "give both for each query and head, fewer than 2^31 entries in all")
    if ends.shape != (batch, queries) or size < 1 or not angles.fit(dim):
        given = f"ends {tuple(ends.shape)}, size {size}, {angles.frequencies.numel()} frequencies"
        raise BadArgument("ends", given, "give one end per query, blocks of 1 or more slots, a frequency for each pair")
    blocks = -(-keys // size)
    wide = q.dtype == torch.float32 or max(dim, v_dim) > 128
    # A tile of many queries fetches its keys for more of them, where so many list a block.
    tile = 32 if wide else 128 if lists.numel() >= 128 * batch * blocks else 64
    lists, places, ends = (x.to(torch.int32).contiguous() for x in (lists, places, ends))
    some = tiles(lists, size, ends, blocks, tile)
    part = torch.empty(batch * heads * queries * width, v_dim, dtype=q.dtype, device=q.device)
    weight = torch.full((len(part),), -torch.inf, dtype=torch.float32, device=q.device)
    frequencies = angles.frequencies.to(q.device).float().contiguous()
    turns = torch.outer(torch.arange(keys, device=q.device, dtype=torch.float32), frequencies)
    options = {"num_warps": 8, "num_stages": 2, "maxnreg": 128} if tile == 128 else {"num_warps": 4}
    _entries[(len(some.begin),)](
        q, k, v, some.which, some.begin, some.count, some.group, places, ends, frequencies, turns.cos(), turns.sin(),
        part, weight, *in_base_2(scale, softcap), blocks, heads, queries, width, keys, *q.stride()[:3], *k.stride()[:2],
        *v.stride()[:2], T=tile, BN=min(tile, 64, max(16, power_of_two(size))), SIZE=size, DV=v_dim,
        VP=max(16, power_of_two(v_dim)), **channels(dim, frequencies.numel(), angles.last),
        CAPPED=softcap is not None, PRECISION=precision_of(k.dtype), **options,
    )  # fmt: skip
    return merge_rows(part.view(batch, heads, queries, width, v_dim), weight)


@jit
def _circle(x):
    """Cosine and sine in few registers, off by some 1e-7 and what the float32 angle is: those of the compiler hold a
    table for any number there is, which would leave the loop over keys too few."""
    n = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - n * 1.5703125 - n * 4.837512969970703e-4 - n * 7.549789954891882e-8
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = n.to(tl.int32) & 3
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    return cos, tl.where(quarter >= 2, -sin, sin)


_RUNTIME: Any = ["blocks", "heads", "queries", "width", "keys"]


@jit(do_not_specialize=_RUNTIME)
def _entries(
    q, k, v, which, begin, count, group, places, ends, frequencies, cosines, sines, part, weight, factor, softcap,
    blocks, heads, queries, width, keys, qsb, qsh, qsn, ksb, ksm, vsb, vsm, T: tl.constexpr, BN: tl.constexpr,
    SIZE: tl.constexpr, DV: tl.constexpr, VP: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, RP: tl.constexpr, OTHERS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    there = tl.load(count + tile)
    if there > 0:
        owner = tl.load(group + tile).to(tl.int32)
        b, block = (owner // blocks).to(tl.int64), owner % blocks
        e, d, c, n = tl.arange(0, T), tl.arange(0, FP), tl.arange(0, VP), tl.arange(0, BN)
        real = e < there
        entry = tl.load(which + tl.load(begin + tile) + e, mask=real, other=0)
        query = (entry // width).to(tl.int32)
        i, h = query % queries, query // queries % heads
        end = tl.minimum(tl.load(ends + b * queries + i, mask=real, other=0), keys)
        by = tl.where(real, block * SIZE - tl.load(places + entry, mask=real, other=0), 0)
        distance = tl.abs(by)
        if tl.max(distance, 0) < keys:
            # Looked up: to compute them takes longer than the products of a small block.
            turn = distance.to(tl.int64)[:, None] * F + d[None, :]
            cos = tl.load(cosines + turn, mask=(d < F)[None, :], other=1.0)
            sin = tl.load(sines + turn, mask=(d < F)[None, :], other=0.0)
            sin = tl.where((by < 0)[:, None], -sin, sin)
        else:
            speed = tl.load(frequencies + d, mask=d < F, other=0.0)
            angle = by.to(tl.float32)[:, None] * speed[None, :]
            cos, sin = _circle(angle)
        at = b * qsb + h.to(tl.int64) * qsh + i.to(tl.int64) * qsn
        q1, q2 = halves(q, at, real, FIRST, F, FP)
        q1, q2 = turned(q1, q2, cos, sin)
        kind = k.dtype.element_ty
        q1, q2 = q1.to(kind), q2.to(kind)
        if REST:
            q3 = others(q, at, real, OTHERS, REST, RP)
        acc = tl.zeros([T, VP], tl.float32)
        top = tl.full([T], float("-inf"), tl.float32)
        mass = tl.zeros([T], tl.float32)
        last = tl.max(end, 0)
        k_base, v_base = k + b * ksb, v + b * vsb
        for first in range(0, SIZE, BN):
            inside = first + n
            slot = block * SIZE + inside
            keep = (inside < SIZE) & (slot < last)
            far = slot.to(tl.int64)
            k1, k2 = held_halves(k_base, far * ksm, keep, FIRST, F, FP)
            s = product(q1, k1, tl.zeros([T, BN], tl.float32), False, PRECISION)
            s = product(q2, k2, s, False, PRECISION)
            if REST:
                s = product(q3, others(k_base, far * ksm, keep, OTHERS, REST, RP), s, False, PRECISION)
            s *= factor
            if CAPPED:
                s = capped(s, softcap)
            s = tl.where((inside < SIZE)[None, :] & (slot[None, :] < end[:, None]), s, float("-inf"))
            held = keep[:, None] & (c < DV)[None, :]
            values = tl.load(v_base + far[:, None] * vsm + c[None, :], mask=held, other=0.0)
            acc, _, top, mass = absorb(s, values, values, acc, acc, top, mass, 0, PRECISION)
        seen = mass > 0
        mass = tl.where(seen, mass, 1.0)
        tl.store(weight + entry, tl.where(seen, top + tl.log2(mass), float("-inf")), mask=real)
        to = part + entry.to(tl.int64)[:, None] * DV + c[None, :]
        tl.store(to, (acc / mass[:, None]).to(part.dtype.element_ty), mask=real[:, None] & (c < DV)[None, :])
