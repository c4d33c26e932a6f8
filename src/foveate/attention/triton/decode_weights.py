"""The attention weights of a decode step, from the scores that the kernel over ragged stores leaves while it attends.

The keys are read once, where they are attended; what is made here of their scores reads 4 bytes per pair of a query and
a key.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode import Stores, run
from foveate.attention.triton.workers import LOG2E, jit, power_of_two
from foveate.errors import BadArgument

ALIGNED = 128
"""Rows of scores begin at multiples of this many."""


@jit
def weights(scores, place, mass, keep):
    """Probabilities of the scores at these places; 0 where nothing is kept, or the query saw nothing."""
    s = tl.load(scores + place, mask=keep, other=float("-inf"))
    return tl.exp2(s - tl.where(mass == float("-inf"), 0.0, mass))


@jit(do_not_specialize=["width"])
def _probabilities(
    scores, lse, lengths, pairs, width, stride, R: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr
):
    unit, row = tl.program_id(0) // R, tl.program_id(0) % R
    pair = unit
    if PAIRS:
        pair = tl.load(pairs + unit)
    at = pair.to(tl.int64) * R + row
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mass = tl.load(lse + at) * LOG2E
    p = weights(scores, at * stride + slot, mass, slot < tl.load(lengths + unit))
    tl.store(scores + at * stride + slot, p, mask=slot < width)


@jit
def _add_mass(
    scores, lse, lengths, pairs, columns, column_start, stride, R: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    pair = unit
    if PAIRS:
        pair = tl.load(pairs + unit)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = slot < tl.load(lengths + unit)
    gained = tl.zeros([BLOCK], tl.float32)
    for first in range(0, R, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at = pair.to(tl.int64) * R + tl.minimum(first + i, R - 1)
            gained += weights(scores, at * stride + slot, tl.load(lse + at) * LOG2E, keep & (first + i < R))
    place = columns + tl.load(column_start + unit) + slot
    tl.store(place, tl.load(place, mask=keep, other=0.0) + gained, mask=keep)


@jit(do_not_specialize=["width", "pages", "recent"])
def _page_weights(
    probs, lengths, out, width, pages, recent, stride, stride_length, H: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = number[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    largest = tl.zeros([BLOCK, PAGE], tl.float32)
    for first in range(0, H, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at = batch * H + tl.minimum(first + i, H - 1)
            largest = tl.maximum(largest, tl.load(probs + at * stride + slot, mask=slot < width, other=0.0))
    mass = tl.sum(largest, 1)
    newest = (tl.load(lengths + batch * stride_length) - 1) // PAGE
    mass = tl.where(number > newest - recent, float("inf"), mass)
    mass = tl.where(number > newest, float("-inf"), mass)
    tl.store(out + batch * pages + number, mass, mask=number < pages)


def decode_scored(
    q: Tensor, stores: Stores, width: int, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_ragged` of one query per row, and the scores that entered its softmax.

    Args:
        q: [B, H, 1, Dk].
        width: slots of the widest band.

    Returns:
        out [B, H, 1, Dv]; lse [B, H, 1] float32; scores [B, H, 1, width] float32: logits in base 2. What lies behind
        the length of a pair was never written.
    """
    if q.dim() != 4 or q.shape[2] != 1:
        raise BadArgument("q", tuple(q.shape), "give one query per row: [B, H, 1, Dk]")
    room = -(-width // ALIGNED) * ALIGNED
    scores = torch.empty(*q.shape[:3], room, dtype=torch.float32, device=q.device)
    out, lse = run(q.contiguous(), stores, scale, softcap, sinks, scores=scores)
    return out, lse, scores[..., :width]


def probabilities(scores: Tensor, lse: Tensor, stores: Stores) -> Tensor:
    """Scores of `decode_scored` made into probabilities, in place; 0 behind the length of a pair."""
    rows, block = _rows(scores, stores), 1024
    _probabilities[(lse.numel(), -(-scores.shape[3] // block))](
        scores, lse, stores.lengths, stores.lengths if stores.pairs is None else stores.pairs, scores.shape[3],
        scores.stride(2), R=rows, BLOCK=block, PAIRS=stores.pairs is not None, num_warps=4,
    )  # fmt: skip
    return scores


def add_mass(scores: Tensor, lse: Tensor, stores: Stores, columns: Tensor, column_start: Tensor) -> None:
    """Add to the column of each pair what its slots gained of all query heads of its group, in place.

    Args:
        scores, lse: of `decode_scored`.
        columns: float32, any tensor of columns of the store.
        column_start: int64 [P], where a pair's column begins, in elements from the first of `columns`.
    """
    rows, block = _rows(scores, stores), 512
    _add_mass[(stores.lengths.shape[0], -(-scores.shape[3] // block))](
        scores, lse, stores.lengths, stores.lengths if stores.pairs is None else stores.pairs, columns, column_start,
        scores.stride(2), R=rows, AT_ONCE=min(4, power_of_two(rows)), BLOCK=block, PAIRS=stores.pairs is not None,
        num_warps=4,
    )  # fmt: skip


def page_weights(probs: Tensor, lengths: Tensor, page: int, recent: int) -> Tensor:
    """What the pages of each row weigh: the largest probability of any head, summed over a page's tokens.

    Args:
        probs: [B, H, 1, C] float32, neighbouring slots side by side; 0 behind the length.
        lengths: int32 [B], slots in use, the same of all heads.
        page: slots per page, a power of two.
        recent: so many of the newest pages weigh +inf.

    Returns:
        float32 [B, pages]; -inf behind the page of the newest token.
    """
    batch, heads, queries, width = probs.shape
    rows = queries == 1 and probs.stride(3) == 1 and probs.stride(0) == heads * probs.stride(1)
    if not rows or page < 1 or page & (page - 1):
        given = f"{tuple(probs.shape)} by {probs.stride()}, pages of {page}"
        raise BadArgument("probs", given, "give [B, H, 1, C] and a power of two")
    pages, block = -(-width // page), max(1, 512 // page)
    out = torch.empty(batch, pages, dtype=torch.float32, device=probs.device)
    _page_weights[(batch, -(-pages // block))](
        probs, lengths, out, width, pages, recent, probs.stride(1), lengths.stride(0), H=heads, PAGE=page, BLOCK=block,
        AT_ONCE=min(4, power_of_two(heads)), num_warps=4,
    )  # fmt: skip
    return out


def _rows(scores: Tensor, stores: Stores) -> int:
    """Query heads of a pair."""
    return scores.shape[0] * scores.shape[1] // stores.lengths.shape[0]
