"""Scores of pages and tokens at a decode step, and exact lists of the best of them. Nothing here waits for the device.

Sources: page bounds, Quest (2406.10774), section 3.3; votes of heads, TokenSelect (2411.02886), section 4.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import (
    LN2,
    LOG2E,
    check_heads,
    jit,
    power_of_two,
    precision_of,
    rows_of_q,
    shapes,
    tile_of,
)
from foveate.errors import BadArgument

AT_ONCE = 16384
"""Scores that one program orders in its registers; longer rows are ordered piece by piece."""

_LAYOUT = ("K0", "K1")


@jit
def _halves(x):
    """The positive and the negative part."""
    return tl.maximum(x.to(tl.float32), 0.0).to(x.dtype), tl.minimum(x.to(tl.float32), 0.0).to(x.dtype)


@jit(do_not_specialize=["pages"])
def _bounds(
    q, summary, lengths, out, pages, stride, stride_page, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, M)
    q0, q1 = rows_of_q(q, pair * R + row, row < R, DK, K0, K1)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = number < pages
    low = summary + pair * stride
    offsets = tl.where(there, number, 0).to(tl.int64) * stride_page
    # Positive channels of the query meet the maxima, negative ones the minima.
    up, down = _halves(q0)
    s = tl.dot(up, tl.trans(tile_of(low + DK, offsets, there, 0, K0, DK, True)), input_precision=PRECISION)
    s = tl.dot(down, tl.trans(tile_of(low, offsets, there, 0, K0, DK, True)), s, input_precision=PRECISION)
    if K1:
        up, down = _halves(q1)
        s = tl.dot(up, tl.trans(tile_of(low + DK, offsets, there, K0, K1, DK, True)), s, input_precision=PRECISION)
        s = tl.dot(down, tl.trans(tile_of(low, offsets, there, K0, K1, DK, True)), s, input_precision=PRECISION)
    newest = (tl.load(lengths + pair) - 1) // PAGE
    if GROUP:
        best = tl.max(tl.where((row < R)[:, None], s, float("-inf")), 0)
        best = tl.where(number == newest, float("inf"), tl.where(number > newest, float("-inf"), best))
        tl.store(out + pair * pages + number, best, mask=there)
    else:
        s = tl.where((number == newest)[None, :], float("inf"), s)
        s = tl.where((number > newest)[None, :], float("-inf"), s)
        place = (pair * R + row)[:, None] * pages + number[None, :]
        tl.store(out + place, s, mask=(row < R)[:, None] & there[None, :])


def page_bounds(q: Tensor, summary: Tensor, lengths: Tensor, page: int, *, group: bool = False) -> Tensor:
    """The largest q·k that any key of a page could give, from the channel-wise minima and maxima of its keys.

    Args:
        q: [B, H, 1, D].
        summary: [B * Hs, pages, 2 D], minima first, in the dtype of q.
        lengths: int32 [B, Hs] on the device, slots in use.
        page: slots per page.
        group: one score per store head, the largest of its query heads.

    Returns:
        float32 [B, H or Hs, pages]; +inf for the page of the newest token, -inf behind it.
    """
    dim = summary.shape[2] // 2
    _, heads, queries, rows = check_heads(q, dim, summary.shape[0] // max(1, q.shape[0]))
    if queries != 1 or summary.dtype != q.dtype or summary.stride(2) != 1:
        given = f"q {tuple(q.shape)} {q.dtype}, summary {summary.dtype}"
        raise BadArgument("q", given, "one query per row, summaries of the same dtype with adjacent channels")
    return _bounds_op(q.contiguous(), summary, lengths.contiguous(), page, heads // rows if group else heads)


@torch.library.custom_op(
    "foveate::page_bounds",
    mutates_args=(),
    schema="(Tensor q, Tensor summary, Tensor lengths, SymInt page, SymInt out_heads) -> Tensor",
)
def _bounds_op(q: Tensor, summary: Tensor, lengths: Tensor, page: int, out_heads: int) -> Tensor:
    (batch, heads, _, dim), (pairs, pages, _) = q.shape, summary.shape
    rows = batch * heads // pairs
    out = torch.empty(batch, out_heads, pages, dtype=torch.float32, device=q.device)
    block = 64 if dim * q.element_size() <= 256 else 32
    sizes = shapes(dim, dim)
    _bounds[(pairs, -(-pages // block))](
        q, summary, lengths, out, pages, summary.stride(0), summary.stride(1), R=rows,
        M=max(16, power_of_two(rows)), BLOCK=block, PAGE=page, DK=dim, GROUP=out_heads != heads,
        PRECISION=precision_of(q.dtype), **{name: sizes[name] for name in _LAYOUT}, num_warps=4,
    )  # fmt: skip
    return out


@_bounds_op.register_fake
def _(q: Tensor, summary: Tensor, lengths: Tensor, page: int, out_heads: int) -> Tensor:
    return q.new_empty(q.shape[0], out_heads, summary.shape[1], dtype=torch.float32)


@jit(do_not_specialize=["capacity", "pieces", "sink", "window"])
def _vote_logits(
    q, k, lengths, scores, masses, factor, capacity, pieces, sink, window, stride, stride_token, R: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, M)
    q0, q1 = rows_of_q(q, pair * R + row, row < R, DK, K0, K1)
    end = tl.load(lengths + pair) - window
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    for i in range(LOOPS):
        slot = (piece * LOOPS + i) * BLOCK + tl.arange(0, BLOCK)
        keep = (slot >= sink) & (slot < end)
        offsets = tl.where(keep, slot, 0).to(tl.int64) * stride_token
        s = tl.dot(q0, tl.trans(tile_of(k + pair * stride, offsets, keep, 0, K0, DK, True)), input_precision=PRECISION)
        if K1:
            k1 = tile_of(k + pair * stride, offsets, keep, K0, K1, DK, True)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        s = tl.where(keep[None, :], s * factor, float("-inf"))
        place = (pair * R + row)[:, None] * capacity + slot[None, :]
        tl.store(scores + place, s, mask=(row < R)[:, None] & (slot < capacity)[None, :])
        new = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp2(top - anchor) + tl.sum(tl.exp2(s - anchor[:, None]), 1)
        top = new
    total = tl.where(mass > 0, top + tl.log2(tl.where(mass > 0, mass, 1.0)), float("-inf"))
    tl.store(masses + (pair * R + row) * pieces + piece, total * LN2, mask=row < R)


@jit(do_not_specialize=["capacity", "sink", "window"])
def _votes(
    scores, total, lengths, out, capacity, sink, window, HEADS: tl.constexpr, STORES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = slot < capacity
    votes = tl.zeros([BLOCK], tl.float32)
    some = slot < 0
    for head in range(HEADS):
        place = batch * HEADS + head
        s = tl.load(scores + place * capacity + slot, mask=there, other=float("-inf"))
        mass = tl.load(total + place) * LOG2E
        # Of a head that sees nothing the mass is -inf, and so are its scores.
        votes += tl.where(s == float("-inf"), 0.0, tl.exp2(s - tl.where(mass == float("-inf"), 0.0, mass)))
        end = tl.load(lengths + batch * STORES + head // (HEADS // STORES)) - window
        some = some | ((slot >= sink) & (slot < end))
    tl.store(out + batch * capacity + slot, tl.where(some, votes, float("-inf")), mask=there)


def token_votes(q: Tensor, k: Tensor, lengths: Tensor, scale: float, *, near: tuple[int, int] = (0, 0)) -> Tensor:
    """Votes of all heads for the tokens between the first and the newest: each query head gives them the softmax of its
    logits over these alone, and the votes are added up.

    Args:
        q: [B, H, 1, D].
        k: [B * Hs, C, D].
        lengths: int32 [B, Hs] on the device.
        scale: factor of the logits.
        near: (sink, window): slots below sink and from length - window on stand for no election.

    Returns:
        float32 [B, C]; -inf for slots that stand for no election with any head.
    """
    check_heads(q, k.shape[2], k.shape[0] // max(1, q.shape[0]))
    if q.shape[2] != 1 or k.dtype != q.dtype or k.stride(2) != 1 or min(near) < 0:
        given = f"q {tuple(q.shape)} {q.dtype}, k {k.dtype}, near {near}"
        raise BadArgument("q", given, "one query per row, keys of the same dtype with adjacent channels")
    return _votes_op(q.contiguous(), k, lengths.contiguous(), float(scale), near[0], near[1])


@torch.library.custom_op(
    "foveate::token_votes",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor lengths, float scale, SymInt sink, SymInt window) -> Tensor",
)
def _votes_op(q: Tensor, k: Tensor, lengths: Tensor, scale: float, sink: int, window: int) -> Tensor:
    (batch, heads, _, dim), (pairs, capacity, _) = q.shape, k.shape
    rows, block, loops = batch * heads // pairs, 64, 8
    pieces = max(1, -(-capacity // (block * loops)))
    scores = torch.empty(batch, heads, capacity, dtype=torch.float32, device=q.device)
    masses = torch.empty(batch, heads, pieces, dtype=torch.float32, device=q.device)
    sizes = shapes(dim, dim)
    _vote_logits[(pairs, pieces)](
        q, k, lengths, scores, masses, scale * LOG2E.value, capacity, pieces, sink, window, k.stride(0), k.stride(1),
        R=rows, M=max(16, power_of_two(rows)), BLOCK=block, LOOPS=loops, DK=dim, PRECISION=precision_of(q.dtype),
        **{name: sizes[name] for name in _LAYOUT}, num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty(batch, capacity, dtype=torch.float32, device=q.device)
    _votes[(batch, -(-capacity // 256))](
        scores, masses.logsumexp(-1), lengths, out, capacity, sink, window, HEADS=heads, STORES=pairs // batch,
        BLOCK=256, num_warps=2,
    )  # fmt: skip
    return out


@_votes_op.register_fake
def _(q: Tensor, k: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[1], dtype=torch.float32)


@jit(do_not_specialize=["n", "wanted"])
def _select(scores, lists, counts, n, wanted, stride, N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, N)
    # Adding 0 makes -0 and 0 the same bits.
    x = tl.load(scores + row * stride + number, mask=number < n, other=float("-inf")) + 0.0
    real = x > float("-inf")
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered like the numbers
    need = tl.minimum(wanted, tl.sum(real.to(tl.int32), 0))
    # The largest key that at least `need` numbers reach, two bits at a time, from the lowest that there is.
    edge = tl.cast(-(2**31), tl.int64)
    for step in range(16):
        unit = tl.cast(1, tl.int64) << (30 - 2 * step)
        first = (key >= edge + unit).to(tl.int64)
        second = (key >= edge + 2 * unit).to(tl.int64)
        third = (key >= edge + 3 * unit).to(tl.int64)
        reached = tl.sum(first + (second << 20) + (third << 40), 0)
        edge += unit * (((reached & 0xFFFFF) >= need).to(tl.int64) + (((reached >> 20) & 0xFFFFF) >= need).to(tl.int64)
                        + ((reached >> 40) >= need).to(tl.int64))  # fmt: skip
    above = real & (key > edge)
    tie = real & (key == edge)
    left = need - tl.sum(above.to(tl.int32), 0)
    chosen = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= left))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(lists + row * WIDTH + place, number, mask=chosen)
    slot = tl.arange(0, WIDE)
    tl.store(lists + row * WIDTH + slot, tl.zeros_like(slot) - 1, mask=(slot >= need) & (slot < WIDTH))
    tl.store(counts + row, need)


def select_best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, exactly; of equal ones the first.

    Args:
        scores: float32 [..., n]; -inf is never chosen, +inf always is (as far as k reaches), NaN must not occur.
        k: width of the lists.

    Returns:
        lists int32 [..., min(k, n)], ascending, -1 behind the end; counts int32 [...].
    """
    if scores.dtype != torch.float32 or scores.dim() == 0 or scores.shape[-1] == 0 or k < 1:
        raise BadArgument("scores", f"{tuple(scores.shape)} {scores.dtype}, k {k}", "give float32 [..., n], k from 1")
    return _select_op(scores, min(k, scores.shape[-1]))


@torch.library.custom_op(
    "foveate::select_best", mutates_args=(), schema="(Tensor scores, SymInt k) -> (Tensor, Tensor)"
)
def _select_op(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = scores.reshape(-1, scores.shape[-1])
    lists, counts = _ordered(flat, k)
    return lists.view(*scores.shape[:-1], k), counts.view(scores.shape[:-1])


@_select_op.register_fake
def _(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    lists = scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32)
    return lists, scores.new_empty(scores.shape[:-1], dtype=torch.int32)


def _ordered(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Lists [rows, k] and counts [rows] of scores [rows, n]."""
    rows, n = scores.shape
    if n <= AT_ONCE:
        return _launch(scores, n, k)
    pieces = -(-n // AT_ONCE)
    padded = torch.nn.functional.pad(scores, (0, pieces * AT_ONCE - n), value=-torch.inf)
    if pieces * k >= n:
        # The best of the pieces would be no fewer: order all, once.
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
        order = order.masked_fill(scores.gather(-1, order) == -torch.inf, n).sort(dim=-1).values
        return torch.where(order == n, -1, order).to(torch.int32), (order < n).sum(-1, dtype=torch.int32)
    lists, _ = _launch(padded.view(rows * pieces, AT_ONCE), AT_ONCE, min(k, AT_ONCE))
    # What is best of all is among the best of its piece, and the candidates still ascend.
    offset = torch.arange(pieces, device=scores.device).mul(AT_ONCE).view(1, -1, 1)
    lists = lists.view(rows, pieces, -1).long()
    candidates = torch.where(lists < 0, n, lists + offset).flatten(1)
    kept = padded.gather(1, candidates.clamp_max(pieces * AT_ONCE - 1)).masked_fill(candidates == n, -torch.inf)
    chosen, counts = _ordered(kept, k)
    found = candidates.gather(1, chosen.clamp_min(0).long())
    return torch.where(chosen < 0, -1, found).to(torch.int32), counts


def _launch(scores: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    scores = scores.contiguous()
    lists = torch.empty(scores.shape[0], k, dtype=torch.int32, device=scores.device)
    counts = torch.empty(scores.shape[0], dtype=torch.int32, device=scores.device)
    wide = power_of_two(n)
    _select[(scores.shape[0],)](
        scores, lists, counts, n, k, scores.stride(0), N=wide, WIDTH=k, WIDE=power_of_two(k),
        num_warps=4 if wide <= 2048 else 8 if wide <= 8192 else 16,
    )  # fmt: skip
    return lists, counts
