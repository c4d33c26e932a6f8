"""Decode over the newest tokens, where they stand, and over the first ones and recalled blocks, all of these at one
place: both in one launch, and what the newest tokens weighed among themselves is added up by another.

Far keys lie in runs of neighbours. A run's first key is met by a query that is turned for it, and the keys behind it
are turned by their place in the run: a program works out these angles once, whatever runs it reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.recalled import Borders
from foveate.attention.triton.splits import merge_splits
from foveate.attention.triton.turning import channels, halves, others, product, tokens_at_once, turned
from foveate.attention.triton.workers import (
    absorb,
    capped,
    check_heads,
    in_base_2,
    jit,
    leave,
    outputs,
    partials,
    power_of_two,
    precision_of,
)
from foveate.errors import BadArgument

TILES = 2
"""Runs that one program reads, unless there are too many."""
FAR = 256
"""Most programs that read the far tokens of a pair."""
SLOTS = 32
"""Slots whose weights one program adds up."""


class Newest(NamedTuple):
    """What a read found of the newest tokens: their logits, float32 [B * H, n], and the log-masses of all that its
    programs read, float32 [P, R], both in base 2; so many programs of each pair read the newest, the first ones."""

    scores: Tensor
    weight: Tensor
    programs: int


class Layout(NamedTuple):
    """Runs of `tile` slots, `tiles` of them to a program, and the programs of the newest and of the far tokens."""

    tile: int
    tiles: int
    near: int
    far: int


def layout(at: Borders, width: int, dim: int, size: int) -> Layout:
    """For lists of `width` blocks, tokens of `dim` channels of `size` bytes each."""
    tile = min(tokens_at_once(dim, size), max(16, power_of_two(at.block)))
    far = -(-at.init // tile) + width * -(-at.block // tile)
    tiles = max(TILES, -(-far // FAR))
    return Layout(tile, tiles, -(-(at.local + at.block - 1) // (tile * tiles)), -(-far // tiles))


@jit
def _edge(length, INIT: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr):
    """The first of the newest tokens."""
    ready = tl.maximum(length - LOCAL - INIT, 0) // BLOCK
    return tl.minimum(tl.maximum(length - LOCAL, 0), INIT + ready * BLOCK)


@jit(do_not_specialize=["width", "splits", "near_splits"])
def _read(
    q, k, v, lengths, chosen, frequencies, part, weight, scores, factor, softcap, width, splits, near_splits, stride_k,
    stride_kt, stride_v, stride_vt, STORES: tl.constexpr, R: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    TILES: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr,
    VP: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    RP: tl.constexpr, OTHERS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, i, d, c = tl.arange(0, M), tl.arange(0, T), tl.arange(0, FP), tl.arange(0, VP)
    valid = row < R
    kind = k.dtype.element_ty
    length = tl.load(lengths + pair)
    near = split < near_splits
    edge = _edge(length, INIT, LOCAL, BLOCK)
    first = tl.where(near, split, split - near_splits) * TILES
    speed = tl.load(frequencies + d, mask=d < F, other=0.0)
    angle = tl.where(near, 0, i).to(tl.float32)[:, None] * speed[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    at = (pair * R + row) * DK
    held1, held2 = halves(q, at, valid, FIRST, F, FP)
    acc = tl.zeros([M, VP], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    for t in range(TILES):
        number = first + t
        # A run of the newest, of the first, or of a recalled block.
        part_of = number - (INIT + T - 1) // T
        among = (part_of >= 0) & (near == 0)
        entry = part_of // ((BLOCK + T - 1) // T)
        block = tl.load(chosen + pair // STORES * width + entry, mask=among & (entry < width), other=-1)
        base = tl.where(among, INIT + block * BLOCK + part_of % ((BLOCK + T - 1) // T) * T, number * T)
        base = tl.where(near, edge + base, base)
        end = tl.where(among, INIT + (block + 1) * BLOCK, tl.minimum(INIT, length - LOCAL))
        end = tl.minimum(tl.where(near, length, end), length)
        if (base < end) & (near | (among == 0) | (block >= 0)):
            slot = base + i
            keep = slot < end
            far = tl.where(keep, slot, 0).to(tl.int64)
            delta = tl.where(near, 0, LOCAL - (length - 1) + base).to(tl.float32) * speed
            q1, q2 = turned(held1, held2, tl.cos(delta)[None, :], tl.sin(delta)[None, :])
            k1, k2 = halves(k, pair * stride_k + far * stride_kt, keep, FIRST, F, FP)
            k1, k2 = turned(k1, k2, cos, -sin)
            s = product(q1, k1.to(kind), tl.zeros([M, T], tl.float32), False, PRECISION)
            s = product(q2, k2.to(kind), s, False, PRECISION)
            if REST:
                q3 = others(q, at, valid, OTHERS, REST, RP)
                k3 = others(k, pair * stride_k + far * stride_kt, keep, OTHERS, REST, RP)
                s = product(q3, k3, s, False, PRECISION)
            s *= factor
            if CAPPED:
                s = capped(s, softcap)
            s = tl.where(keep[None, :], s, float("-inf"))
            place = (pair * R + row)[:, None] * (near_splits * TILES * T) + (number * T + i)[None, :]
            tl.store(scores + place, s, mask=valid[:, None] & near)
            x = v + pair * stride_v + far[:, None] * stride_vt + c[None, :]
            values = tl.load(x, mask=keep[:, None] & (c < DV)[None, :], other=0.0)
            acc, _, top, mass = absorb(s, values, values, acc, acc, top, mass, 0, PRECISION)
    leave(part, weight, pair * splits + split, row, valid, acc, acc, top, mass, R, DV, VP, 0)


def decode_recalled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    angles: Angles,
    at: Borders,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Newest]:
    """Softmax attention of one query per row over its newest tokens, and over the first ones and blocks that are
    recalled, as if all of these stood `local` tokens back. Slots that are not read may hold anything.

    Args:
        q: [B, H, 1, Dk], standing at lengths - 1.
        k, v: [B * Hs, C, Dk] and [B * Hs, C, Dv], adjacent channels; the key in slot p was turned by p.
        lengths: int32 [B * Hs], the same for all heads of a row.
        chosen: int32 [B, K], blocks in front of the newest tokens; -1 is none.
        angles: by how much queries and keys are turned at each position.

    Returns:
        out [B, H, 1, Dv] in the dtype of q, lse [B, H, 1] float32; and what `settle` takes.
    """
    stores = len(k) // max(1, q.shape[0])
    _, _, queries, _ = check_heads(q, k.shape[2], stores)
    if queries != 1 or k.stride(2) != 1 or v.stride(2) != 1 or k.dtype != v.dtype or q.dtype != k.dtype:
        given = f"{tuple(q.shape)} {q.dtype}, keys {tuple(k.shape)} {k.dtype}, values {v.dtype}"
        raise BadArgument(
            "q", given, "give one query per row, all of one dtype, keys and values with adjacent channels"
        )
    if chosen.dim() != 2 or len(chosen) != len(q) or chosen.dtype != torch.int32 or not angles.fit(k.shape[2]):
        given = f"{tuple(chosen.shape)} {chosen.dtype}, {angles.frequencies.numel()} frequencies"
        raise BadArgument("chosen", given, "give int32 [B, K], and a frequency for each pair of channels")
    if lengths.shape != (len(k),) or lengths.dtype != torch.int32:
        raise BadArgument("lengths", f"{tuple(lengths.shape)} {lengths.dtype}", f"give int32 [{len(k)}]")
    speed = angles.frequencies.to(q.device).float().contiguous()
    given = (lengths.contiguous(), chosen.contiguous(), speed, angles.last)
    out, lse, scores, weight = _read_op(q.contiguous(), k, v, *given, *at, scale, softcap)
    near = layout(at, chosen.shape[1], max(k.shape[2], v.shape[2]), k.element_size()).near
    return out, lse, Newest(scores, weight, near)


@torch.library.custom_op(
    "foveate::decode_recalled",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor chosen, Tensor frequencies, bool last, SymInt init, "
    "SymInt local, SymInt block, float scale, float? softcap) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _read_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    frequencies: Tensor,
    last: bool,
    init: int,
    local: int,
    block: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, _, dim), (pairs, _, v_dim), width = q.shape, v.shape, chosen.shape[1]
    way, rows = layout(Borders(init, local, block), width, max(dim, v_dim), k.element_size()), batch * heads // pairs
    splits = way.near + way.far
    part, weight = partials(pairs * splits, rows, v_dim, q.device)
    scores = torch.empty(batch * heads, way.near * way.tiles * way.tile, dtype=torch.float32, device=q.device)
    _read[(pairs, splits)](
        q, k, v, lengths, chosen, frequencies, part, weight, scores, *in_base_2(scale, softcap), width, splits,
        way.near, k.stride(0), k.stride(1), v.stride(0), v.stride(1), STORES=pairs // batch, R=rows,
        M=max(16, power_of_two(rows)), T=way.tile, TILES=way.tiles, INIT=init, LOCAL=local, BLOCK=block, DV=v_dim,
        VP=max(16, power_of_two(v_dim)), **channels(dim, frequencies.numel(), last), CAPPED=softcap is not None,
        PRECISION=precision_of(k.dtype), num_warps=4,
    )  # fmt: skip
    return (*merge_splits(q, part, weight), scores, weight)


@_read_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, chosen: Tensor, frequencies: Tensor, last: bool, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    way = layout(Borders(*others[:3]), chosen.shape[1], max(q.shape[3], v.shape[2]), k.element_size())
    heads = q.shape[0] * q.shape[1]
    scores = q.new_empty(heads, way.near * way.tiles * way.tile, dtype=torch.float32)
    weight = q.new_empty(len(k) * (way.near + way.far), heads // len(k), dtype=torch.float32)
    return (*outputs(q, v.shape[2]), scores, weight)


@jit(do_not_specialize=["splits", "near_splits", "wide", "slots", "history", "number", "layers"])
def _settle(
    scores, weight, lengths, entropy, mass, past, means, splits, near_splits, wide, slots, history, number, layers,
    STORES: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr, NEAR: tl.constexpr, SLOTS: tl.constexpr,
    HISTORY: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part > 0:
        n, h, j = tl.arange(0, NEAR), tl.arange(0, HP), (part - 1) * SLOTS + tl.arange(0, SLOTS)
        length = tl.load(lengths + b * STORES)
        slot = _edge(length, INIT, LOCAL, BLOCK) + j
        there = (h < HEADS)[:, None]
        # What the programs found of the newest tokens stands in front.
        rows = HEADS // STORES
        at = ((b * STORES + h // rows)[:, None] * splits + n[None, :]) * rows + (h % rows)[:, None]
        e = tl.load(weight + at, mask=there & (n < near_splits)[None, :], other=float("-inf"))
        top = tl.max(e, 1)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(e - anchor[:, None]), 1)
        whole = anchor + tl.log2(tl.where(total > 0, total, 1.0))
        keep = (slot < length) & (slot < slots)
        place = scores + (b * HEADS + h)[:, None] * wide + j[None, :]
        s = tl.load(place, mask=there & keep[None, :], other=float("-inf"))
        gained = tl.sum(tl.exp2(s - whole[:, None]), 0)
        before = tl.load(mass + b * slots + slot, mask=keep, other=0.0)
        tl.store(mass + b * slots + slot, before + gained, mask=keep)
    else:
        i = tl.arange(0, HISTORY)
        new, old = tl.load(entropy + b), tl.load(past + b * history + i, mask=i < history, other=0.0)
        moved = tl.load(past + b * history + i + 1, mask=i + 1 < history, other=0.0)
        moved = tl.where(i == history - 1, new, moved)
        now = tl.where(new < 0, old, moved)
        tl.debug_barrier()  # all is read before any is written
        tl.store(past + b * history + i, now, mask=i < history)
        tl.store(means + b * layers + number, tl.where(tl.min(now, 0) < 0, -1.0, tl.sum(now, 0) / history))


def settle(
    read: Newest,
    lengths: Tensor,
    entropy: Tensor,
    mass: Tensor,
    past: Tensor,
    means: Tensor,
    at: Borders,
    *,
    number: int,
) -> None:
    """Note what a step saw, in place: each of the newest slots gains what it weighed among the newest, summed over the
    heads, and an entropy takes the place of the oldest one, unless it is negative.

    Args:
        read: of `decode_recalled`.
        lengths: int32 [B * Hs].
        entropy: float32 [B].
        mass: float32 [B, C]; past: float32 [B, n], oldest first; means: float32 [B, layers], of which `number` becomes
            the mean of the past, or -1 while any of it is negative.
    """
    batch = len(mass)
    whole = all(x.is_contiguous() and x.dtype == torch.float32 and len(x) == batch for x in (mass, past, means))
    if not whole or entropy.shape != (batch,) or lengths.numel() % batch or not 0 <= number < means.shape[1]:
        given = f"{tuple(mass.shape)}, {tuple(past.shape)}, {tuple(means.shape)}, entropy {tuple(entropy.shape)}"
        raise BadArgument("mass", given, "give contiguous float32 states of the rows, an entropy for each")
    _settle_op(*read, lengths.contiguous(), entropy.contiguous(), mass, past, means, number, *at)


@torch.library.custom_op(
    "foveate::settle_recall",
    mutates_args=("mass", "past", "means"),
    schema="(Tensor scores, Tensor weight, SymInt near, Tensor lengths, Tensor entropy, Tensor(a!) mass, "
    "Tensor(b!) past, Tensor(c!) means, SymInt number, SymInt init, SymInt local, SymInt block) -> ()",
)
def _settle_op(
    scores: Tensor,
    weight: Tensor,
    near: int,
    lengths: Tensor,
    entropy: Tensor,
    mass: Tensor,
    past: Tensor,
    means: Tensor,
    number: int,
    init: int,
    local: int,
    block: int,
) -> None:
    (rows, wide), (batch, slots), pairs = scores.shape, mass.shape, lengths.numel()
    heads = rows // batch
    _settle[(batch, 1 + -(-(local + block - 1) // SLOTS))](
        scores, weight, lengths, entropy, mass, past, means, len(weight) // pairs, near, wide, slots, past.shape[1],
        number, means.shape[1], STORES=pairs // batch, HEADS=heads, HP=power_of_two(heads), NEAR=power_of_two(near),
        SLOTS=SLOTS, HISTORY=power_of_two(past.shape[1]), INIT=init, LOCAL=local, BLOCK=block, num_warps=4,
    )  # fmt: skip
