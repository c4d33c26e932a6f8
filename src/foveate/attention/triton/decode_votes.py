"""Votes of all heads for the tokens of a store, whose keys are taken back to position 0 as they are read.

The key in slot p was turned by p. In a tile of slots p0, p0 + 1, ... the scores are those of queries that are turned by
p0 and of keys that are turned back by 0, 1, ...: these angles are the same in all tiles and stay in registers.

Source: TokenSelect (2411.02886), section 4.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.turning import channels, circle, halves, others, product, tokens_at_once, turned
from foveate.attention.triton.workers import LOG2E, jit, multiprocessors, power_of_two, precision_of
from foveate.errors import BadArgument


@jit
def _product(
    a, b, s, N: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`product`; where rows N to M repeat the others, these are the second of the two numbers that a is split in."""
    if N < M:
        high = a.to(b.dtype)
        low = (a - high.to(tl.float32)).to(b.dtype)
        both = tl.where((tl.arange(0, M) < N)[:, None], high, low)
        return tl.dot(both, tl.trans(b), s, input_precision=PRECISION)
    else:
        return product(a, b, s, SPLIT, PRECISION)


@jit(do_not_specialize=["voters", "splits", "capacity", "begin"])
def _logits(
    q, k, edges, stands, frequencies, scores, masses, factor, voters, splits, capacity, begin, stride, stride_token,
    G: tl.constexpr, STORES: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, STANDS: tl.constexpr,
    DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, RP: tl.constexpr,
    OTHERS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = pair // STORES
    row = tl.arange(0, N)
    valid = row < voters * G
    voter = batch * voters + row // G
    place = voter * (STORES * G) + pair % STORES * G + row % G
    # Rows of the products: those of the queries, or twice as many, which are both halves of a split.
    twice = tl.arange(0, M) % N
    asks = twice < voters * G
    asked = (batch * voters + twice // G) * (STORES * G) + pair % STORES * G + twice % G
    edge = tl.load(edges + voter, mask=valid, other=0)
    last = tl.max(edge, 0)
    from_tile = begin // TILE
    tiles = tl.maximum((last + TILE - 1) // TILE - from_tile, 0)
    if STANDS:
        tiles = tl.where(tl.load(stands + batch) != 0, 0, tiles)
    n, d = tl.arange(0, TILE), tl.arange(0, FP)
    speed = tl.load(frequencies + d, mask=d < F, other=0.0)
    angle = n[:, None].to(tl.float32) * speed[None, :]
    cos, sin = circle(-angle)
    q1, q2 = halves(q, asked * DK, asks, FIRST, F, FP)
    if REST:
        q3 = others(q, asked * DK, asks, OTHERS, REST, RP)
    to = scores + place[:, None] * capacity + n[None, :]
    # Of every column of the tiles: threads have to agree on no maximum before the end.
    top = tl.full([N, TILE], float("-inf"), tl.float32)
    mass = tl.zeros([N, TILE], tl.float32)
    first = from_tile + (tiles.to(tl.int64) * split // splits).to(tl.int32)
    end = from_tile + (tiles.to(tl.int64) * (split + 1) // splits).to(tl.int32)
    # Angles of far tiles are whole turns and a part, of which float32 would keep too little.
    far = speed.to(tl.float64) * 0.15915494309189535 * (first * TILE)
    part = ((far - tl.floor(far)) * 6.283185307179586).to(tl.float32)
    near_cos, near_sin = circle(part)
    a, b = turned(q1, q2, near_cos[None, :], near_sin[None, :])
    onward_cos, onward_sin = circle(speed * TILE)
    for tile in tl.range(first, end, num_stages=STAGES):
        slot = tile * TILE + n
        keep = slot < last
        offsets = pair * stride + slot.to(tl.int64) * stride_token
        k1, k2 = halves(k, offsets, keep, FIRST, F, FP)
        x1, x2 = turned(k1, k2, cos, sin)
        s = tl.zeros([M, TILE], tl.float32)
        s = _product(a, x1.to(k.dtype.element_ty), s, N, M, SPLIT, PRECISION)
        s = _product(b, x2.to(k.dtype.element_ty), s, N, M, SPLIT, PRECISION)
        if REST:
            s = _product(q3, others(k, offsets, keep, OTHERS, REST, RP), s, N, M, SPLIT, PRECISION)
        if N < M:
            s = tl.sum(tl.reshape(s, [2, N, TILE]), 0)
        seen = (slot >= begin)[None, :] & (slot[None, :] < edge[:, None])  # rows that are none have no edge
        s = tl.where(seen, s * factor, float("-inf"))
        tl.store(to + tile * TILE, s, mask=seen)
        new = tl.maximum(top, s)
        anchor = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp2(top - anchor) + tl.exp2(s - anchor)
        top = new
        a, b = turned(a, b, onward_cos[None, :], onward_sin[None, :])
    most = tl.max(top, 1)
    anchor = tl.where(most == float("-inf"), 0.0, most)
    mass = tl.sum(mass * tl.exp2(top - anchor[:, None]), 1)
    total = tl.where(mass > 0, anchor + tl.log2(tl.where(mass > 0, mass, 1.0)), float("-inf"))
    tl.store(masses + place * splits + split, total, mask=valid)


@jit(do_not_specialize=["voters", "splits", "capacity", "begin"])
def _sum_votes(
    scores, masses, edges, stands, out, voters, splits, capacity, begin, HEADS: tl.constexpr, HP: tl.constexpr,
    SP: tl.constexpr, BLOCK: tl.constexpr, STANDS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    voter = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    edge = tl.load(edges + voter)
    if STANDS:
        edge = tl.where(tl.load(stands + voter // voters) != 0, 0, edge)
    inside = (slot >= begin) & (slot < edge)
    head = tl.arange(0, HP)
    place = voter * HEADS + head
    n = tl.arange(0, SP)
    parts = masses + place[:, None] * splits + n[None, :]
    part = tl.load(parts, mask=(head < HEADS)[:, None] & (n < splits)[None, :], other=float("-inf"))
    top = tl.max(part, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.sum(tl.exp2(part - top[:, None]), 1)
    total = top + tl.log2(tl.where(mass > 0, mass, 1.0))
    here = scores + place[:, None] * capacity + slot[None, :]
    s = tl.load(here, mask=(head < HEADS)[:, None] & inside[None, :], other=float("-inf"))
    votes = tl.sum(tl.exp2(s - total[:, None]), 0)
    if ROUND:
        votes = votes.to(tl.bfloat16).to(tl.float32)
    tl.store(out + voter * capacity + slot, tl.where(inside, votes, float("-inf")), mask=slot < capacity)


def turned_votes(
    voters: Tensor,
    k: Tensor,
    begin: int,
    edges: Tensor,
    frequencies: Tensor,
    scale: float,
    *,
    last: bool = False,
    stands: Tensor | None = None,
    rounded: bool = True,
) -> Tensor:
    """Votes of all heads for the tokens from `begin` on and in front of an edge: each query head gives them the softmax
    of its logits over these alone, with keys at position 0, and the votes are added up.

    Args:
        voters: float32 [B, T, H, D], T queries of each row.
        k: [B * Hs, C, D], keys of which slot p was turned by p.
        edges: int32 [B, T] on the device.
        frequencies: float32 [F], angle per position of each pair of channels, which lie F apart.
        scale: factor of the logits.
        last: the 2 F rotated channels are the last ones, not the first.
        stands: int32 [B], rows in which nothing is read and nobody gets votes.
        rounded: to the nearest bfloat16.

    Returns:
        float32 [B, T, C]; -inf for tokens that stand for no election.
    """
    batch, _, heads, dim = voters.shape
    stores = k.shape[0] // max(1, batch)
    if voters.dtype != torch.float32 or k.shape[2] != dim or k.stride(2) != 1 or not stores or heads % stores:
        given = f"{tuple(voters.shape)} {voters.dtype}, keys {tuple(k.shape)}"
        raise BadArgument("voters", given, "give float32 [B, T, H, D], H a multiple of the store heads, and keys of D")
    if not Angles(frequencies, last).fit(dim) or frequencies.dtype != torch.float32:
        raise BadArgument("frequencies", f"{frequencies.numel()} of {dim} channels", "give float32, one for each pair")
    if edges.dtype != torch.int32 or edges.shape != voters.shape[:2]:
        raise BadArgument("edges", f"{tuple(edges.shape)} {edges.dtype}", "give int32 [B, T]")
    edges, voters = edges.contiguous(), voters.contiguous()
    return _votes_op(voters, k, begin, edges, frequencies.contiguous(), float(scale), last, stands, rounded)


@torch.library.custom_op(
    "foveate::turned_votes",
    mutates_args=(),
    schema="(Tensor voters, Tensor k, SymInt begin, Tensor edges, Tensor frequencies, float scale, bool last, "
    "Tensor? stands, bool rounded) -> Tensor",
)
def _votes_op(
    voters: Tensor,
    k: Tensor,
    begin: int,
    edges: Tensor,
    frequencies: Tensor,
    scale: float,
    last: bool,
    stands: Tensor | None,
    rounded: bool,
) -> Tensor:
    (batch, count, heads, dim), (pairs, capacity, _), device = voters.shape, k.shape, voters.device
    group = heads * batch // pairs
    rows = max(16, power_of_two(count * group))
    halved = k.dtype != torch.float32 and 2 * count * group <= rows  # there is room for both halves in one product
    tile = tokens_at_once(dim, k.element_size())
    splits = max(1, min(2 * multiprocessors(device) // pairs, -(-capacity // (4 * tile))))  # what runs side by side
    scores = torch.empty(batch, count, heads, capacity, dtype=torch.float32, device=device)
    masses = torch.empty(batch, count, heads, splits, dtype=torch.float32, device=device)
    out = torch.empty(batch, count, capacity, dtype=torch.float32, device=device)
    wait = edges if stands is None else stands
    _logits[(pairs, splits)](
        voters, k, edges, wait, frequencies, scores, masses, scale * LOG2E.value, count, splits, capacity, begin,
        k.stride(0), k.stride(1), G=group, STORES=pairs // batch, N=rows // 2 if halved else rows, M=rows, TILE=tile,
        STANDS=stands is not None, SPLIT=k.dtype != torch.float32, PRECISION=precision_of(k.dtype),
        STAGES={16: 3, 32: 2}.get(rows, 1), **channels(dim, frequencies.numel(), last),
        num_warps=4 if rows <= 32 else 8,
    )  # fmt: skip
    wide = power_of_two(heads)
    block = max(32, 8192 // wide)  # each program adds up all masses first
    _sum_votes[(batch * count, -(-capacity // block))](
        scores, masses, edges, wait, out, count, splits, capacity, begin, HEADS=heads, HP=wide, SP=power_of_two(splits),
        BLOCK=block, STANDS=stands is not None, ROUND=rounded, num_warps=8,
    )  # fmt: skip
    return out


@_votes_op.register_fake
def _(voters: Tensor, k: Tensor, *others: Any) -> Tensor:
    return voters.new_empty(*voters.shape[:2], k.shape[1])
