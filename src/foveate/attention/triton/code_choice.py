"""Which tokens the query heads of a step choose by the codes of their keys, without a score for each token.

Tokens of one code score alike, and there are few codes: it is counted once how many tokens have each code, and from
step to step who joins them. Then the scores of the codes, in their order, say how far down the tokens of a head reach.

Source: windowed lookup by codes, A2ATS (2502.12665), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.code_reach import reach, widen
from foveate.attention.triton.turning import channels, halves, others, turned
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument

MOST = 8192
"""Most codes: one program orders them in its registers."""
TILE = 32
"""Centroids, or channels, of a program."""
AT_ONCE = 16384
"""Codes of tokens that a program looks through at once."""
PIECE = 2048
"""Tokens of a program that lists them."""


class Coded(NamedTuple):
    """What is known of the tokens of P = B Hs pairs, brought up to date where it lies.

    Args:
        codes: int16 [P, C], neighbours `stride(1)` apart.
        counts: int32 [P, X], tokens of each code among the first `counted`, first ones left out.
        counted: int32 [P].
    """

    codes: Tensor
    counts: Tensor
    counted: Tensor


class Book(NamedTuple):
    """Codebooks of Hs store heads, float32: centroids [Hs, X, D], the metric of keys [Hs, D, D], and the lengths of the
    centroids in it [Hs, X]."""

    centroids: Tensor
    metric: Tensor
    sizes: Tensor


@jit
def _vector(x, at, FIRST: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, cos, sin):
    """Both halves [FP] of the rotated channels of one row, turned and rounded to their dtype."""
    d = tl.arange(0, FP)
    x1 = tl.load(x + at + FIRST + d, mask=d < F, other=0.0).to(tl.float32)
    x2 = tl.load(x + at + FIRST + F + d, mask=d < F, other=0.0).to(tl.float32)
    x1, x2 = turned(x1, x2, cos, sin)
    return x1.to(x.dtype.element_ty).to(tl.float32), x2.to(x.dtype.element_ty).to(tl.float32)


@jit(do_not_specialize=["distance", "sink", "window"])
def _prepare(
    q, k, lengths, frequencies, metric, codes, counts, counted, rows, seen, distance, sink, window, count, stride_k,
    stride_kt, stride_c, stride_ct, STORES: tl.constexpr, R: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    RP: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Turn the queries to `distance`, the newest key to where it was made, and that as its metric sees it; count who
    left the window."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, d, c = tl.load(lengths + pair), tl.arange(0, FP), part * TILE + tl.arange(0, TILE)
    own, speed = length - 1, tl.load(frequencies + d, mask=d < F, other=0.0)
    back = (-own).to(tl.float32) * speed
    at = pair * stride_k + own.to(tl.int64) * stride_kt
    x1, x2 = _vector(k, at, FIRST, F, FP, tl.cos(back), tl.sin(back))
    m = metric + pair % STORES * DK * DK + c[None, :]
    keep = (d < F)[:, None] & (c < DK)[None, :]
    y = tl.sum(tl.load(m + (FIRST + d)[:, None] * DK, mask=keep, other=0.0) * x1[:, None], 0)
    y += tl.sum(tl.load(m + (FIRST + F + d)[:, None] * DK, mask=keep, other=0.0) * x2[:, None], 0)
    if REST:
        r = tl.arange(0, RP)
        x3 = tl.load(k + at + OTHERS + r, mask=r < REST, other=0.0).to(tl.float32)
        keep = (r < REST)[:, None] & (c < DK)[None, :]
        y += tl.sum(tl.load(m + (OTHERS + r)[:, None] * DK, mask=keep, other=0.0) * x3[:, None], 0)
    tl.store(seen + pair * DK + c, y, mask=c < DK)
    if part == 0:
        g = tl.arange(0, M)
        place, valid = (pair * R + g) * DK, g < R
        angle = (distance - own).to(tl.float32) * speed
        q1, q2 = halves(q, place, valid, FIRST, F, FP)
        q1, q2 = turned(q1, q2, tl.cos(angle)[None, :], tl.sin(angle)[None, :])
        kind = q.dtype.element_ty  # queries that are turned elsewhere are rounded, too
        to, inside = rows + place[:, None] + FIRST + d[None, :], valid[:, None] & (d < F)[None, :]
        tl.store(to, q1.to(kind).to(tl.float32), mask=inside)
        tl.store(to + F, q2.to(kind).to(tl.float32), mask=inside)
        if REST:
            r = tl.arange(0, RP)
            q3 = others(q, place, valid, OTHERS, REST, RP).to(tl.float32)
            tl.store(rows + place[:, None] + OTHERS + r[None, :], q3, mask=valid[:, None] & (r < REST)[None, :])
        begin = tl.load(counted + pair)
        end = tl.maximum(length - window, begin)
        for first in range(tl.maximum(begin, sink), end, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            mine = codes + pair * stride_c + slot.to(tl.int64) * stride_ct
            code = tl.load(mine, mask=slot < end, other=-1).to(tl.int32)
            tl.atomic_add(counts + pair * count + code, 1, mask=code >= 0)
        tl.store(counted + pair, end)


@jit
def _look_up(
    rows, seen, centroids, sizes, table, near, which, count, tiles, STORES: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, DK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """What each centroid gives the queries, and which of these is nearest to the newest key."""
    pair, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, DP)
    there, head = x < count, pair % STORES
    place = centroids + (head * count + x)[:, None] * DK + d[None, :]
    c = tl.load(place, mask=there[:, None] & (d < DK)[None, :], other=0.0)
    for g in range(R):
        row = tl.load(rows + (pair * R + g) * DK + d, mask=d < DK, other=0.0)
        tl.store(table + (pair * R + g) * count + x, tl.sum(c * row[None, :], 1), mask=there)
    key = 2 * tl.load(seen + pair * DK + d, mask=d < DK, other=0.0)
    away = tl.load(sizes + head * count + x, mask=there, other=float("inf")) - tl.sum(c * key[None, :], 1)
    least = tl.min(away, 0)
    tl.store(near + pair * tiles + tile, least)
    tl.store(which + pair * tiles + tile, tl.min(tl.where(away == least, x, count), 0))


@jit(do_not_specialize=["sink", "window", "width", "pieces"])
def _list(
    marks, cuts, nexts, opens, lengths, codes, numbers, lists, totals, sink, window, count, width, pieces, stride_c,
    stride_ct, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, LAST: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """How many tokens of a piece are read; LAST: which, behind those of the pieces before. NEXT: the one token more of
    each head only if there is room, the first of these first."""
    pair, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = piece * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + pair)
    between = (slot >= sink) & (slot < length - window)
    place = codes + pair * stride_c + slot.to(tl.int64) * stride_ct
    code = tl.load(place, mask=between, other=-1).to(tl.int32)
    read = (slot < length) & (between == 0)
    for g in range(R):
        mark = tl.load(marks + (pair * R + g) * count + code, mask=code >= 0, other=0)
        mine = (mark == 1) | ((mark == 2) & (slot < tl.load(cuts + pair * R + g)))
        if NEXT:
            mine = mine & (slot != tl.load(nexts + pair * R + g))
        read = read | mine
    if LAST:
        n = tl.arange(0, PIECES)
        some = tl.load(numbers + pair * pieces + n, mask=n < pieces, other=0)
        total = tl.sum(some, 0)
        before = tl.sum(tl.where(n < piece, some, 0), 0)
        if NEXT:
            # Tokens that are next for some head and read for none, each once, in their order.
            g = tl.arange(0, M)
            slots = tl.load(nexts + pair * R + g, mask=g < R, other=-1)
            opened = (tl.load(opens + pair * R + g, mask=g < R, other=0) > 0) & (slots >= 0)
            same = (slots[:, None] == slots[None, :]) & (g[:, None] > g[None, :]) & opened[None, :]
            opened = opened & (tl.sum(same.to(tl.int32), 1) == 0)
            ahead = tl.sum(((slots[:, None] > slots[None, :]) & opened[None, :]).to(tl.int32), 1)
            taken = opened & (ahead < width - total)
            total += tl.sum(taken.to(tl.int32), 0)
            before += tl.sum((taken & (slots < piece * BLOCK)).to(tl.int32), 0)
            for i in range(R):
                read = read | (slot == tl.sum(tl.where((g == i) & taken, slots + 1, 0), 0) - 1)
        at = before + tl.cumsum(read.to(tl.int32), 0) - 1
        tl.store(lists + pair * width + at, slot, mask=read & (at < width))
        for first in range(total + piece * BLOCK, width, pieces * BLOCK):
            behind = first + tl.arange(0, BLOCK)
            tl.store(lists + pair * width + behind, tl.zeros_like(behind) - 1, mask=behind < width)
        tl.store(totals + pair + slot * 0, tl.minimum(total, width), mask=(slot == 0) & (piece == 0))
    else:
        tl.store(numbers + pair * pieces + piece, tl.sum(read.to(tl.int32), 0))
        if NEXT:
            for g in range(R):
                next_slot = tl.load(nexts + pair * R + g)
                free = tl.sum(((slot == next_slot) & (read == 0)).to(tl.int32), 0)
                inside = (next_slot // BLOCK == piece) & (next_slot >= 0)
                tl.store(opens + pair * R + g + slot * 0, free, mask=inside & (slot == piece * BLOCK))


def choose_by_codes(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    wanted: Tensor | int,
    book: Book,
    coded: Coded,
    angles: Angles,
    *,
    distance: int,
    sink: int,
    window: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The tokens of a step: the first and the newest ones, and between them those that are among the best of any query
    head of their store head. The newest gets its code.

    Args:
        q: [B, H, 1, D], standing at lengths - 1.
        k: [P, C, D], adjacent channels; the key in slot p was turned by p.
        lengths: int32 [P], the same for all heads of a row.
        wanted: int32 [B], the best of each head; of equal ones the first. An int: so many at most, alike for all heads
            of a store head, as fit into `width` together, and of one more for each the first ones that fit. How many
            fit is reckoned as if codes that score alike stood in some order.
        coded: changed in place; codes of all tokens but the newest.
        angles: by how much queries and keys are turned at each position.
        distance: where centroids stand when they are scored.
        sink, window: first and newest tokens, of which at least one.
        width: that no list exceeds.

    Returns:
        int32 [B, Hs, width], ascending, -1 behind the end; and how many they are, int32 [B, Hs].
    """
    (batch, heads, queries, dim), pairs = q.shape, len(k)
    count = book.centroids.shape[1]
    if queries != 1 or pairs % batch or heads % (pairs // batch) or k.shape[2] != dim or k.stride(2) != 1:
        raise BadArgument("q", tuple(q.shape), f"give one query per row, that fits keys {tuple(k.shape)}")
    if not 1 <= count <= MOST or not angles.fit(dim) or window < 1 or any(x.dtype != torch.float32 for x in book):
        given = f"{count} codes, window {window}, {angles.frequencies.numel()} frequencies"
        raise BadArgument("book", given, f"give float32, up to {MOST} codes, a frequency for each pair, a window")
    fits = coded.codes.shape[0] == pairs and coded.counts.shape == (pairs, count) and coded.counted.shape == (pairs,)
    kinds = (coded.codes.dtype, coded.counts.dtype, coded.counted.dtype) == (torch.int16, torch.int32, torch.int32)
    if not fits or not kinds or not coded.counts.is_contiguous() or not coded.counted.is_contiguous():
        given = f"{tuple(coded.codes.shape)}, counts {tuple(coded.counts.shape)}, counted {tuple(coded.counted.shape)}"
        raise BadArgument("coded", given, f"give int16 [{pairs}, C] and contiguous int32 [{pairs}, {count}], [{pairs}]")
    most, some = (wanted, None) if isinstance(wanted, int) else (0, wanted.contiguous())
    fits = some is None or (some.shape == (batch,) and some.dtype == torch.int32)
    if lengths.shape != (pairs,) or lengths.dtype != torch.int32 or not fits:
        given = f"lengths {tuple(lengths.shape)}, wanted {None if some is None else tuple(some.shape)}"
        raise BadArgument("lengths", given, f"give int32 [{pairs}] and [{batch}]")
    speed = angles.frequencies.to(q.device).float().contiguous()
    given = (*(x.contiguous() for x in book), *coded, speed, angles.last)
    return _op(q.contiguous(), k, lengths.contiguous(), some, *given, distance, sink, window, width, most)


@torch.library.custom_op(
    "foveate::choose_by_codes",
    mutates_args=("codes", "counts", "counted"),
    schema="(Tensor q, Tensor k, Tensor lengths, Tensor? wanted, Tensor centroids, Tensor metric, Tensor sizes, "
    "Tensor(a!) codes, Tensor(b!) counts, Tensor(c!) counted, Tensor frequencies, bool last, SymInt distance, "
    "SymInt sink, SymInt window, SymInt width, SymInt most) -> (Tensor, Tensor)",
)
def _op(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    wanted: Tensor | None,
    centroids: Tensor,
    metric: Tensor,
    sizes: Tensor,
    codes: Tensor,
    counts: Tensor,
    counted: Tensor,
    frequencies: Tensor,
    last: bool,
    distance: int,
    sink: int,
    window: int,
    width: int,
    most: int,
) -> tuple[Tensor, Tensor]:
    (batch, heads, _, dim), pairs, device = q.shape, len(k), q.device
    stores, count, capacity = pairs // batch, centroids.shape[1], codes.shape[1]
    group, tiles, pieces = heads // stores, -(-count // TILE), -(-capacity // PIECE)
    rows, seen, table, near = (
        torch.empty(shape, dtype=torch.float32, device=device)
        for shape in ((batch * heads, dim), (pairs, dim), (batch * heads, count), (pairs, tiles))
    )
    which, numbers, totals, lists = (
        torch.empty(shape, dtype=torch.int32, device=device)
        for shape in ((pairs, tiles), (pairs, pieces), (batch, stores), (batch, stores, width))
    )
    marks = torch.empty(batch * heads, count, dtype=torch.int8, device=device)
    cuts, nexts, opens = torch.empty(3, batch * heads, dtype=torch.int32, device=device).unbind(0)
    filled = wanted is None
    layout = channels(dim, frequencies.numel(), last)
    _prepare[(pairs, -(-dim // TILE))](
        q, k, lengths, frequencies, metric, codes, counts, counted, rows, seen, distance, sink, window, count,
        k.stride(0), k.stride(1), codes.stride(0), codes.stride(1), STORES=stores, R=group, M=power_of_two(group),
        TILE=TILE, BLOCK=1024, **layout, num_warps=4,
    )  # fmt: skip
    _look_up[(pairs, tiles)](
        rows, seen, centroids, sizes, table, near, which, count, tiles, STORES=stores, R=group, TILE=TILE, DK=dim,
        DP=power_of_two(dim), num_warps=4,
    )  # fmt: skip
    if wanted is None:
        order = table.view(pairs, group, count).sort(dim=-1, descending=True).indices
        there = counts.unsqueeze(1).expand(-1, group, -1).gather(-1, order)
        first = torch.empty_like(order).scatter_(-1, order, there.cumsum(-1) - there).amin(1)
        wanted = torch.empty(pairs, dtype=torch.int32, device=device)
        widen[(pairs,)](
            first, counts, lengths, wanted, sink, window, width, most, count, N=power_of_two(count), num_warps=8
        )
    reach[(batch * heads,)](
        table, counts, wanted, near, which, lengths, codes, marks, cuts, nexts, most, sink, window, count, tiles,
        codes.stride(0), codes.stride(1), STORES=stores, R=group, N=power_of_two(count), WIDE=power_of_two(tiles),
        BLOCK=min(AT_ONCE, max(1024, power_of_two(capacity))), NEXT=filled, num_warps=16,
    )  # fmt: skip
    for done in (False, True):
        _list[(pairs, pieces)](
            marks, cuts, nexts, opens, lengths, codes, numbers, lists, totals, sink, window, count, width, pieces,
            codes.stride(0), codes.stride(1), R=group, M=power_of_two(group), BLOCK=PIECE, PIECES=power_of_two(pieces),
            LAST=done, NEXT=filled, num_warps=4,
        )  # fmt: skip
    return lists, totals


@_op.register_fake
def _(q: Tensor, k: Tensor, lengths: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    stores = len(k) // len(q)
    lists = lengths.new_empty(len(q), stores, others[-2])  # type: ignore[call-overload]
    return lists, lengths.new_empty(len(q), stores)
