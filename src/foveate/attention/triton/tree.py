"""A tree search over blocks of keys: two launches a round, one that scores and one that chooses.

Source: HiP Attention (2406.09827), section 3; `foveate.methods.policies.tree.descend` in words of tensors.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.topk import select_best
from foveate.attention.triton.workers import jit, power_of_two, precision_of
from foveate.errors import BadArgument

TILE = 64
"""Halves that one program scores."""


@jit(do_not_specialize=["sets"])
def _halves(
    q, k, old, chosen, new, scores, slots, before, last, sets, stride_b, stride_h, stride_t, HEADS: tl.constexpr,
    GROUP: tl.constexpr, R: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Halves of the groups that stay, and the best logit that any query of a set has for the first block of each."""
    unit = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = number < 2 * slots
    group = number // 2
    if CHOSEN:
        group = tl.load(chosen + unit * slots + group, mask=inside, other=-1)
    there = inside & (group >= 0)
    start = tl.load(old + unit * 2 * before + group, mask=there, other=0)
    size = tl.load(old + (unit * 2 + 1) * before + group, mask=there, other=0)
    left = size // 2
    start = tl.where(number % 2 == 0, start, start + left)
    size = tl.where(number % 2 == 0, left, size - left)
    tl.store(new + unit * 4 * slots + number, start, mask=inside)
    tl.store(new + unit * 4 * slots + 2 * slots + number, size, mask=inside)
    d = tl.arange(0, D)
    head = unit // sets
    keys = k + head // HEADS * stride_b + head % HEADS // GROUP * stride_h
    row = tl.arange(0, M)
    x = tl.load(
        q + (unit * R + row)[:, None] * DIM + d[None, :], mask=(row < R)[:, None] & (d < DIM)[None, :], other=0.0
    )
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for t in range(PAGE):
        slot = tl.minimum(start * PAGE + t, last).to(tl.int64)
        tile = tl.load(keys + slot[:, None] * stride_t + d[None, :], mask=(size > 0)[:, None] & (d < DIM)[None, :],
                       other=0.0)  # fmt: skip
        if R == 1:
            s = tl.sum(tile.to(tl.float32) * x.to(tl.float32), 1)
        else:
            s = tl.dot(x, tl.trans(tile), input_precision=PRECISION)
            s = tl.max(tl.where((row < R)[:, None], s, float("-inf")), 0)
        best = tl.maximum(best, s)
    tl.store(scores + unit * 2 * slots + number, tl.where(size > 0, best, float("-inf")), mask=inside)


def best_blocks(q: Tensor, k: Tensor, low: Tensor, high: Tensor, slots: int, most: int, page: int) -> Tensor:
    """About the best `slots` blocks of each range [low, high) for a set of queries, by `descend`, a block's score being
    the largest logit of any of them. Nothing waits for the device.

    Args:
        q: [B, H, T, R, D], T sets of R queries; k: [B, Hs, C, D] with adjacent channels.
        low, high: int64 [B, H, T], blocks that are held whole.
        most: no range is longer.
        page: slots per block.

    Returns:
        int64 [B, H, T, slots], ascending, with -1 between them. Ties go to earlier halves.
    """
    fits = q.dim() == 5 and k.dim() == 4 and k.shape[0] == q.shape[0] and q.shape[1] % max(1, k.shape[1]) == 0
    if not fits or q.shape[4] != k.shape[3] or k.dtype != q.dtype or k.stride(3) != 1 or slots < 1 or 0 in q.shape:
        given = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, slots {slots}"
        mend = "give sets of queries, keys of the same dtype with adjacent channels, a slot or more"
        raise BadArgument("q", given, mend)
    if low.shape != q.shape[:3] or high.shape != low.shape:
        raise BadArgument(
            "low", f"{tuple(low.shape)} and {tuple(high.shape)}", f"one range a set: {tuple(q.shape[:3])}"
        )
    return _op(q.contiguous(), k, low, high, slots, most, page)


@torch.library.custom_op(
    "foveate::best_blocks",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor low, Tensor high, SymInt slots, SymInt most, SymInt page) -> Tensor",
)
def _op(q: Tensor, k: Tensor, low: Tensor, high: Tensor, slots: int, most: int, page: int) -> Tensor:
    count = (high - low).clamp_min(0).unsqueeze(-1)
    edge = low.unsqueeze(-1) + count * torch.arange(slots + 1, device=q.device) // slots
    groups = torch.stack([edge[..., :-1], edge.diff(dim=-1)], dim=-2).to(torch.int32)  # starts and sizes
    groups, chosen = halved(q, k, groups, slots, most, page)
    start, size = groups.long().unbind(-2)
    if chosen is not None:
        there = chosen.long().clamp_min(0)
        start, size = start.gather(-1, there), size.gather(-1, there).masked_fill(chosen < 0, 0)
    return torch.where(size > 0, start, -1)


@_op.register_fake
def _(q: Tensor, k: Tensor, low: Tensor, high: Tensor, slots: int, most: int, page: int) -> Tensor:
    return low.new_empty(*low.shape, slots)


def halved(q: Tensor, k: Tensor, groups: Tensor, slots: int, most: int, page: int) -> tuple[Tensor, Tensor | None]:
    """Groups of blocks, halved until each is one block.

    Args:
        q: contiguous [B, H, T, R, D]; k: [B, Hs, C, D] with adjacent channels.
        groups: int32 [B, H, T, 2, slots], starts and sizes; no range that was cut into groups exceeds `most`.

    Returns:
        Halves of the last round, int32 [B, H, T, 2, n], and which of them stay, [B, H, T, slots], ascending, -1 behind
        the end; None: all of n.
    """
    (batch, heads, sets, rows, dim), group = q.shape, q.shape[1] // k.shape[1]
    chosen, largest = None, -(-most // slots)
    while largest > 1:
        halves = torch.empty(batch, heads, sets, 2, 2 * slots, dtype=torch.int32, device=q.device)
        scores = torch.empty(batch, heads, sets, 2 * slots, dtype=torch.float32, device=q.device)
        _halves[(batch * heads * sets, -(-2 * slots // TILE))](
            q, k, groups, groups if chosen is None else chosen, halves, scores, slots, groups.shape[-1],
            k.shape[2] - 1, sets, k.stride(0), k.stride(1), k.stride(2), HEADS=heads, GROUP=group, R=rows,
            M=1 if rows == 1 else max(16, power_of_two(rows)), PAGE=page, DIM=dim, D=max(16, power_of_two(dim)),
            BLOCK=TILE, CHOSEN=chosen is not None, PRECISION=precision_of(k.dtype), num_warps=4,
        )  # fmt: skip
        groups, chosen, largest = halves, select_best(scores, slots)[0], -(-largest // 2)
    return groups, chosen
