"""Lists of tokens that follow from the weights of a decode step: what heads looked at, and lists kept up by that.

Sources: lists of the most attended tokens, Recycled Attention (2411.05787) and LycheeDecode (2602.04541).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode_lists import run
from foveate.attention.triton.decode_weights import ALIGNED, weights
from foveate.attention.triton.workers import LOG2E, jit, power_of_two
from foveate.errors import BadArgument

_BLOCK = 4096
"""Entries of a list that a program looks at at once."""


class Scored(NamedTuple):
    """A read of one query per row and the scores that entered its softmax.

    Args:
        out: [B, H, 1, Dv].
        lse: float32 [B, H, 1].
        scores: float32 [B, H, 1, S], logits in base 2, neighbours side by side. By slot, or where lists were read by
            place in the read; behind the last one nothing was written.
    """

    out: Tensor
    lse: Tensor
    scores: Tensor


@jit
def _agreed(scores, lse, pair, place, keep, stride, R: tl.constexpr, AT_ONCE: tl.constexpr, MEAN: tl.constexpr):
    """The largest probability of a group's query heads, or their sum, which orders as their mean does."""
    agreed = place * 0.0
    for first in range(0, R, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # type: ignore[general]
            at = pair * R + tl.minimum(first + i, R - 1)
            p = weights(scores + at * stride, place, tl.load(lse + at) * LOG2E, keep & (first + i < R))
            agreed = agreed + p if MEAN else tl.maximum(agreed, p)
    return agreed


@jit(do_not_specialize=["width", "recent"])
def _token_weights(
    scores, lse, lengths, heads, out, width, recent, stride, STORES: tl.constexpr, COUNT: tl.constexpr,
    R: tl.constexpr, AT_ONCE: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    pair = number // COUNT * STORES + tl.load(heads + number % COUNT)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + pair)
    p = _agreed(scores, lse, pair, slot, slot < length, stride, R, AT_ONCE, MEAN)
    p = tl.where(slot >= length - recent, float("inf"), p)
    tl.store(out + number * width + slot, tl.where(slot < length, p, float("-inf")), mask=slot < width)


@jit
def _replace_least(
    lists, scores, lse, lengths, width, stride, R: tl.constexpr, AT_ONCE: tl.constexpr, MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    newest = tl.load(lengths + pair) - 1
    entries = lists + pair * width
    n = tl.arange(0, BLOCK)
    least = float("inf")
    worst = -2
    at = -1
    for first in range(0, width, BLOCK):
        i = first + n
        there = i < width
        slot = tl.load(entries + i, mask=there, other=-1)
        # The newest token was read first. A free place comes before any token.
        p = _agreed(scores, lse, pair, 1 + i, there, stride, R, AT_ONCE, MEAN)
        p = tl.where(there, tl.where(slot < 0, -1.0, p), float("inf"))
        low = tl.min(p, 0)
        last = tl.max(tl.where(p == low, slot, -2), 0)
        place = tl.max(tl.where((p == low) & (slot == last), i, -1), 0)
        better = (low < least) | ((low == least) & (last > worst))
        worst, at = tl.where(better, last, worst), tl.where(better, place, at)
        least = tl.where(better, low, least)
    own = _agreed(scores, lse, pair, newest * 0, newest >= 0, stride, R, AT_ONCE, MEAN)
    if (least < own) & (newest >= 0):
        tl.store(entries + at, newest)


def decode_lists_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    counts: Tensor,
    lengths: Tensor,
    windows: Tensor,
    width: int,
    scale: float,
    softcap: float | None = None,
    *,
    scored: bool = True,
) -> Scored:
    """`decode_lists` of single slots with a window of each head's own, and the scores that entered its softmax.

    Args:
        q: [B, H, 1, Dk]; k, v: [B * Hs, C, D].
        lists: int32 [B, Hs, K], in any order; counts: int32 [B, Hs]; lengths: int32 [B * Hs].
        windows: int32 [Hs], so many of the newest slots are read as well, once; a head whose window reaches to its
            first slot reads everything, and no list.
        width: at least what any head reads.
        scored: False: no scores are kept.

    Returns:
        Of each head first the scores of its newest slots, ascending, then those of its list, -inf where an entry is not
        read: of a head that reads everything they are in the order of the slots.
    """
    batch, heads, queries, _ = q.shape
    stores = k.shape[0] // max(1, batch)
    good = queries == 1 and k.shape[0] == batch * stores and heads % max(1, stores) == 0
    if not good or lists.shape[:2] != (batch, stores) or counts.shape != (batch, stores) or len(windows) != stores:
        given = f"q {tuple(q.shape)}, lists {tuple(lists.shape)}, counts {tuple(counts.shape)}, windows {len(windows)}"
        raise BadArgument("lists", given, f"give one query per row, and lists, counts and windows of {stores} heads")
    whole = [lists, counts, lengths, windows]
    if any(x.dtype != torch.int32 for x in whole) or lists.stride(2) != 1 or windows.stride(0) != 1:
        raise BadArgument("lists", ", ".join(str(x.dtype) for x in whole), "give int32, entries side by side")
    room = -(-width // ALIGNED) * ALIGNED if scored else 0
    scores = torch.empty(batch, heads, 1, room, dtype=torch.float32, device=q.device)
    out, lse = run(
        q.contiguous(), k, v, lists, counts, lengths, 1, None, scale, softcap, None, windows, scores if scored else None
    )
    return Scored(out, lse, scores[..., :width])


def token_weights(read: Scored, lengths: Tensor, heads: Tensor, recent: int, *, mean: bool) -> Tensor:
    """What some store heads looked at: the probabilities of their slots, of which the query heads of a group agree on
    the largest, or on the mean (its order alone is right: it is their sum).

    Args:
        read: of all slots of these heads, by slot.
        lengths: int32 [B * Hs], slots in use.
        heads: int32 [n], which store heads.
        recent: so many of the newest slots are +inf.

    Returns:
        float32 [B, n, S]; -inf behind the lengths.
    """
    batch, width, rows = read.scores.shape[0], read.scores.shape[3], _rows(read, lengths)
    out = torch.empty(batch, len(heads), width, dtype=torch.float32, device=read.scores.device)
    block = 1024
    _token_weights[(batch * len(heads), -(-width // block))](
        read.scores, read.lse, lengths, heads, out, width, recent, read.scores.stride(1), STORES=len(lengths) // batch,
        COUNT=len(heads), R=rows, AT_ONCE=min(4, power_of_two(rows)), MEAN=mean, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def replace_least(lists: Tensor, read: Scored, lengths: Tensor, *, mean: bool) -> None:
    """Each store head's newest token takes the place of the entry of its list that was attended least, unless it is the
    least itself; of equal ones the last token leaves, and free places are taken first. In place; it must not be made
    twice of one read.

    Args:
        lists: int32 [B, Hs, K], one behind the other, in any order, -1 where a place is free.
        read: of these lists with windows of 1.
        lengths: int32 [B * Hs], slots in use.
        mean: how the query heads of a group agree on a probability: on the mean, not the largest.
    """
    if not lists.is_contiguous() or lists.dtype != torch.int32 or lists.shape[2] + 1 > read.scores.shape[3]:
        given = f"{tuple(lists.shape)} by {lists.stride()}, {lists.dtype}, scores {tuple(read.scores.shape)}"
        raise BadArgument("lists", given, "give int32 [B, Hs, K], contiguous, and scores of K + 1 places")
    width, rows = lists.shape[2], _rows(read, lengths)
    block = min(_BLOCK, power_of_two(width))
    _replace_least[(len(lengths),)](
        lists, read.scores, read.lse, lengths, width, read.scores.stride(1), R=rows,
        AT_ONCE=min(4, power_of_two(rows)), MEAN=mean, BLOCK=block, num_warps=8 if block > 512 else 4,
    )  # fmt: skip


def _rows(read: Scored, lengths: Tensor) -> int:
    """Query heads of a store head."""
    return read.scores.shape[0] * read.scores.shape[1] // len(lengths)
