"""Scores of pages and tokens at a decode step, and exact lists of the best of them. Nothing here waits for the device.

Source: page bounds, Quest (2406.10774), section 3.3.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.topk_rounds import LONGEST, best_of_long
from foveate.attention.triton.workers import (
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
"""Most scores that one program orders in its registers; longer rows are ordered piece by piece."""

PIECE = 2048
"""Least size of a piece: more than two of them are ordered side by side, where lists take an eighth of each or less."""

FEW = 64
"""Most long rows whose pieces look for the edge together, each of them in every launch: others are ordered in turn."""

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


@jit
def ordered(x):
    """Numbers as int32 of the same order; NaN is -inf."""
    # Adding 0 makes -0 and 0 the same bits. What is no number must not lead to a list with holes.
    x = x + 0.0
    bits = tl.where(x > float("-inf"), x, float("-inf")).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def best_of(key, need):
    """Which of the keys of `ordered` [n], fewer than 2^16, are the `need` best; the first of equal ones, -inf never.

    Returns:
        bool [n], and how many they are.
    """
    endless = key == 0x7F800000
    has = tl.sum((key > -0x7F800001).to(tl.int32) + (endless.to(tl.int32) << 16), 0)
    need = tl.minimum(need, has & 0xFFFF)
    # The edge, a key that `need` keys reach, lies from low to below high, which fewer reach. As soon as just so many
    # reach low, any key up to the next real one could be the edge; among equals it never is so, and the gap closes.
    full = (has >> 16) >= need  # of the endless ones
    low = tl.where(full, 0x7F800000, tl.min(tl.where(key > -0x7F800001, key, 0x7F800000), 0))
    high = tl.where(full, 0x7F800001, tl.max(tl.where(endless, -0x7F800001, key), 0) + 1)
    reached = tl.where(full, has >> 16, has & 0xFFFF)
    gap = high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)
    while (reached > need) & (gap > 1):
        third = tl.maximum(gap // 3, 1)
        one = (low.to(tl.uint32, bitcast=True) + third).to(tl.int32, bitcast=True)
        two = (low.to(tl.uint32, bitcast=True) + third + third).to(tl.int32, bitcast=True)
        both = tl.sum(tl.where(key >= two, 0x10001, tl.where(key >= one, 1, 0)), 0)
        reach_one, reach_two = both & 0xFFFF, both >> 16
        gap = tl.where(reach_two >= need, gap - third - third, third)
        low = tl.where(reach_two >= need, two, tl.where(reach_one >= need, one, low))
        reached = tl.where(reach_two >= need, reach_two, tl.where(reach_one >= need, reach_one, reached))
    chosen = key >= low
    if reached > need:
        left = need - tl.sum((key > low).to(tl.int32), 0)
        chosen = (key > low) | ((key == low) & (tl.cumsum((key == low).to(tl.int32), 0) <= left))
    return chosen, need


@jit(do_not_specialize=["wanted", "pieces"])
def _select(
    scores, numbers, limits, lists, kept, counts, n, wanted, pieces, N: tl.constexpr, WIDE: tl.constexpr,
    NUMBERED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The best of N scores of a row from piece * N on, `wanted` of them and no more than the limit of the part,
    ascending. NUMBERED: by the numbers given for them; KEPT: their scores are written, too, and no count."""
    part = tl.program_id(0)
    number = part % pieces * N + tl.arange(0, N)
    there = number < n
    before = (part // pieces).to(tl.int64) * n
    key = ordered(tl.load(scores + before + number, mask=there, other=float("-inf")))
    need = wanted
    if limits is not None:
        need = tl.minimum(need, tl.maximum(tl.load(limits + part).to(tl.int32), 0))
    chosen, need = best_of(key, need)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    if NUMBERED:
        number = tl.load(numbers + before + number, mask=chosen, other=-1)
    begin = part.to(tl.int64) * wanted
    tl.store(lists + begin + place, number, mask=chosen)
    slot = tl.arange(0, WIDE)
    behind = (slot >= need) & (slot < wanted)
    tl.store(lists + begin + slot, tl.zeros_like(slot) - 1, mask=behind)
    if KEPT:
        bits = key ^ ((key >> 31) & 0x7FFFFFFF)
        tl.store(kept + begin + place, bits.to(tl.float32, bitcast=True), mask=chosen)
        tl.store(kept + begin + slot, tl.full([WIDE], float("-inf"), tl.float32), mask=behind)
    else:
        tl.store(counts + part, need)


def select_best(scores: Tensor, k: int, limits: Tensor | None = None, *, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """The k best of each row, exactly; of equal ones the first.

    Args:
        scores: float32 [..., n]; -inf is never chosen, +inf always is (as far as k reaches), NaN must not occur.
        k: width of the lists.
        limits: int [...], so many of each row at most; None: all k.
        coarse: bfloat16 can hold the scores, which takes fewer rounds where rows are few and long.

    Returns:
        lists int32 [..., min(k, n)], ascending, -1 behind the end; counts int32 [...].
    """
    if limits is not None and limits.shape != scores.shape[:-1]:
        raise BadArgument("limits", tuple(limits.shape), f"give one number for each row: {tuple(scores.shape[:-1])}")
    if scores.dtype != torch.float32 or scores.dim() == 0 or scores.shape[-1] == 0 or k < 1:
        raise BadArgument("scores", f"{tuple(scores.shape)} {scores.dtype}, k {k}", "give float32 [..., n], k from 1")
    return _select_op(scores, min(k, scores.shape[-1]), limits, coarse)


@torch.library.custom_op(
    "foveate::select_best",
    mutates_args=(),
    schema="(Tensor scores, SymInt k, Tensor? limits, bool coarse) -> (Tensor, Tensor)",
)
def _select_op(scores: Tensor, k: int, limits: Tensor | None, coarse: bool) -> tuple[Tensor, Tensor]:
    flat = scores.reshape(-1, scores.shape[-1])
    most = None if limits is None else limits.flatten().contiguous()
    few = flat.shape[0] <= FEW and flat.shape[1] > AT_ONCE and k <= LONGEST
    if few and (coarse or k > PIECE // 2):
        lists, counts = best_of_long(flat.contiguous(), k, most, coarse=coarse)
    else:
        lists, counts = _ordered(flat, k, most)
    return lists.view(*scores.shape[:-1], k), counts.view(scores.shape[:-1])


@_select_op.register_fake
def _(scores: Tensor, k: int, limits: Tensor | None, coarse: bool) -> tuple[Tensor, Tensor]:
    lists = scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32)
    return lists, scores.new_empty(scores.shape[:-1], dtype=torch.int32)


def _ordered(scores: Tensor, k: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lists [rows, k] and counts [rows] of scores [rows, n], no more of a row than `limits` [rows]."""
    rows, n = scores.shape
    scores, numbers = scores.contiguous(), None
    piece = min(AT_ONCE, max(PIECE, 8 * power_of_two(k)))
    while n > min(AT_ONCE, 2 * piece):
        # What is best of all is among the best of its piece, and the candidates still ascend.
        pieces, width = -(-n // piece), min(k, piece)
        if pieces * width >= n:
            return _sorted(scores, numbers, k, limits)
        some, kept = _launch(scores, numbers, width, None, pieces, piece)
        numbers, scores, n = some.view(rows, -1), kept.view(rows, -1), pieces * width
    return _launch(scores, numbers, k, limits)


def _sorted(scores: Tensor, numbers: Tensor | None, k: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by ordering all, where the best of the pieces would be no fewer."""
    n = scores.shape[1]
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
    none = scores.gather(-1, order) == -torch.inf
    if limits is not None:
        none = none | (torch.arange(k, device=scores.device) >= limits.unsqueeze(1))
    order = order.masked_fill(none, n).sort(dim=-1).values
    found = order if numbers is None else numbers.gather(1, order.clamp_max(n - 1))
    return torch.where(order == n, -1, found).to(torch.int32), (order < n).sum(-1, dtype=torch.int32)


def _launch(
    scores: Tensor, numbers: Tensor | None, k: int, limits: Tensor | None, pieces: int = 0, piece: int = 0
) -> tuple[Tensor, Tensor]:
    """Lists [rows, k] and counts [rows] of whole rows; of each piece of so many lists [rows * pieces, k] and scores.

    Args:
        scores: [rows, n], one behind the other.
        numbers: int32 [rows, n], ascending, which the lists then hold; None: 0, 1, ...
        limits: int [rows], of whole rows.
    """
    (rows, n), device = scores.shape, scores.device
    parts, wide = rows * max(1, pieces), piece if pieces else power_of_two(n)
    lists = torch.empty(parts, k, dtype=torch.int32, device=device)
    if pieces:
        found = torch.empty(parts, k, dtype=torch.float32, device=device)
    else:
        found = torch.empty(parts, dtype=torch.int32, device=device)
    _select[(parts,)](
        scores, lists if numbers is None else numbers, limits, lists, found, found, n, k, max(1, pieces), N=wide,
        WIDE=power_of_two(k), NUMBERED=numbers is not None, KEPT=pieces > 0,
        num_warps=4 if wide <= 1024 else 8 if wide <= 2048 else 16,
    )  # fmt: skip
    return lists, found
