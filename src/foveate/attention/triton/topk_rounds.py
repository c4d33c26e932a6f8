"""The exact best of few long rows: all pieces of a row look for the edge together, digit by digit.

Scores are ordered like whole numbers of 32 bits. Each round counts, piece by piece, which digits of 8 bits come next
among the scores that still may be the edge, of which every piece then knows the next digit; in the last round each
piece writes its share. What bfloat16 can hold has two digits, which takes three launches; any float32 has four.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two

PIECE = 4096
"""Scores of a program."""
LONGEST = 16384
"""Most entries of a list."""
_BINS = 256
_CHUNK = 64
"""Pieces whose counts are added up at once."""


@jit(do_not_specialize=["n", "wanted", "rows", "pieces"])
def _round(
    scores, limits, hist, above, state, lists, counts, n, wanted, rows, pieces, ROUND: tl.constexpr,
    ROUNDS: tl.constexpr, PIECE: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One round over piece `program_id` of all rows' pieces.

    Counts of digits stand in hist [ROUNDS, rows, pieces, BINS]; what of each piece is above the edge for sure in above
    [ROUNDS, rows, pieces]; of each row the digits so far, how many are above them and how many are needed in state
    [ROUNDS, rows, 3].
    """
    part, bins = tl.program_id(0), tl.arange(0, BINS)
    row, piece = part // pieces, part % pieces
    number = piece * PIECE + tl.arange(0, PIECE)
    # Adding 0 makes -0 and 0 the same bits. What is no number is not chosen.
    x = tl.load(scores + row.to(tl.int64) * n + number, mask=number < n, other=float("-inf")) + 0.0
    valid = x > float("-inf")
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)  # ordered like the numbers
    first = row * pieces
    digits, sure, need, up, greater, digit = bins * 0, 0, 0, 0, 0, 0
    same, last = valid, hist
    if ROUND > 0:
        last += ((ROUND - 1) * rows * pieces + first) * BINS
        total = tl.zeros([BINS], tl.int32)
        for at in range(0, pieces, CHUNK):
            q = at + tl.arange(0, CHUNK)
            tile = last + q[:, None] * BINS + bins[None, :]
            total += tl.sum(tl.load(tile, mask=(q < pieces)[:, None], other=0), 0)
        mine = tl.load(last + piece * BINS + bins)
        if ROUND == 1:
            need = tl.minimum(wanted, tl.sum(total, 0))
            if limits is not None:
                need = tl.minimum(need, tl.maximum(tl.load(limits + row).to(tl.int32), 0))
            digits = 0
        else:
            known = state + ((ROUND - 1) * rows + row) * 3
            digits, sure, need = tl.load(known), tl.load(known + 1), tl.load(known + 2)
            up = tl.load(above + (ROUND - 1) * rows * pieces + part)
        reached = tl.sum(total, 0) - tl.cumsum(total, 0) + total  # this digit or a larger one
        digit = tl.sum((sure + reached >= need).to(tl.int32), 0) - 1
        digits = digits * BINS + digit
        up += tl.sum(tl.where(bins > digit, mine, 0), 0)
        same = valid & ((key >> (32 - 8 * ROUND)) == digits.to(tl.uint32, bitcast=True))
        greater = sure + tl.sum(tl.where(bins > digit, total, 0), 0)
    if ROUND < ROUNDS:
        found = ((key >> (24 - 8 * ROUND)) & 255).to(tl.int32)
        tl.store(hist + (ROUND * rows * pieces + part) * BINS + bins, tl.histogram(found, BINS, mask=same))
        if ROUND > 0:
            tl.store(above + ROUND * rows * pieces + part, up)
            to = state + (ROUND * rows + row) * 3
            tl.store(to, digits, mask=piece == 0)
            tl.store(to + 1, greater, mask=piece == 0)
            tl.store(to + 2, need, mask=piece == 0)
    else:
        over, equal = 0, 0  # of the pieces in front
        for at in range(0, piece, CHUNK):
            q = at + tl.arange(0, CHUNK)
            front = q < piece
            tile = tl.load(last + q[:, None] * BINS + bins[None, :], mask=front[:, None], other=0)
            over += tl.sum(tl.sum(tl.where((bins > digit)[None, :], tile, 0), 1), 0)
            equal += tl.sum(tl.sum(tl.where((bins == digit)[None, :], tile, 0), 1), 0)
            if ROUND > 1:
                over += tl.sum(tl.load(above + (ROUND - 1) * rows * pieces + first + q, mask=front, other=0), 0)
        left = need - greater  # of those on the edge
        larger = valid & ((key >> (32 - 8 * ROUND)) > digits.to(tl.uint32, bitcast=True))
        chosen = larger | (same & (equal + tl.cumsum(same.to(tl.int32), 0) <= left))
        place = over + tl.minimum(equal, left) + tl.cumsum(chosen.to(tl.int32), 0) - 1
        begin = lists + row.to(tl.int64) * wanted
        tl.store(begin + place, number, mask=chosen)
        if piece == 0:
            slot = tl.arange(0, WIDE)
            tl.store(begin + slot, tl.zeros_like(slot) - 1, mask=(slot >= need) & (slot < wanted))
            tl.store(counts + row, need)


def best_of_long(scores: Tensor, k: int, limits: Tensor | None, *, coarse: bool) -> tuple[Tensor, Tensor]:
    """`topk.select_best` of scores [rows, n], contiguous: lists int32 [rows, k], counts int32 [rows].

    Args:
        k: up to LONGEST.
        limits: int [rows], so many of each row at most; None: all k.
        coarse: bfloat16 can hold the scores.
    """
    (rows, n), device = scores.shape, scores.device
    pieces, rounds = -(-n // PIECE), 2 if coarse else 4
    hist = torch.empty(rounds, rows, pieces, _BINS, dtype=torch.int32, device=device)
    above = torch.empty(rounds, rows, pieces, dtype=torch.int32, device=device)
    state = torch.empty(rounds, rows, 3, dtype=torch.int32, device=device)
    lists = torch.empty(rows, k, dtype=torch.int32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    for number in range(rounds + 1):
        _round[(rows * pieces,)](
            scores, limits, hist, above, state, lists, counts, n, k, rows, pieces, ROUND=number, ROUNDS=rounds,
            PIECE=PIECE, CHUNK=min(_CHUNK, power_of_two(pieces)), BINS=_BINS, WIDE=power_of_two(k), num_warps=8,
        )  # fmt: skip
    return lists, counts
