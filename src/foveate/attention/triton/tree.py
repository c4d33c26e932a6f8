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
"""Groups that one program halves."""
_ROWS = 128
"""Most queries, of all heads of a group, that meet a key together."""


@jit
def _best(
    x, asked, keys, start, some, last, stride_t, HEADS: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best logit that any of a head's queries, `asked` of x [HEADS * M, D], has for each block `start`; -inf where
    it is not wanted: [HEADS, BLOCK]."""
    d = tl.arange(0, D)
    best = tl.full([HEADS, BLOCK], float("-inf"), tl.float32)
    for t in tl.range(0, PAGE, loop_unroll_factor=min(PAGE, 4)):  # type: ignore[general]
        slot = tl.minimum(start * PAGE + t, last).to(tl.int64)
        tile = tl.load(keys + slot[:, None] * stride_t + d[None, :], mask=some[:, None] & (d < DIM)[None, :], other=0.0)
        if M == 1:
            s = tl.sum(tile.to(tl.float32) * x.to(tl.float32), 1)[None, :]
        else:
            s = tl.dot(x, tl.trans(tile), input_precision=PRECISION)
            s = tl.max(tl.reshape(tl.where(asked[:, None], s, float("-inf")), (HEADS, M, BLOCK)), 1)
        best = tl.maximum(best, s)
    return tl.where(some[None, :], best, float("-inf"))


@jit(do_not_specialize=["sets"])
def _halves(
    q, k, old, chosen, known, new, scores, slots, before, last, sets, stride_b, stride_h, stride_t,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Halves of the groups that stay, and the best logit that any query of a set has for the first block of each. That
    of a group is that of its first half, or of its second where the first is empty: of the others alone keys are
    fetched, but for the first groups, which nobody has scored. SHARED heads have these in common."""
    here = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = number < slots
    group = number
    if CHOSEN:
        group = tl.load(chosen + here * slots + number, mask=inside, other=-1)
    there = inside & (group >= 0)
    start = tl.load(old + here * 2 * before + group, mask=there, other=0)
    size = tl.load(old + (here * 2 + 1) * before + group, mask=there, other=0)
    left = size // 2
    head = here // sets
    HELD: tl.constexpr = HEADS // GROUP
    store = head if SHARED > 1 else head // GROUP
    keys = k + store // HELD * stride_b + store % HELD * stride_h
    g = tl.arange(0, WIDE)
    unit = here + 0 * g
    if SHARED > 1:
        unit = (head * GROUP + g) * sets + here % sets
    row, d = tl.arange(0, WIDE * M), tl.arange(0, D)
    asked = (row % M < R) & (row // M < SHARED)
    of = here
    if SHARED > 1:
        of = (head * GROUP + row // M) * sets + here % sets
    x = tl.load(q + (of * R + row % M)[:, None] * DIM + d[None, :], mask=asked[:, None] & (d < DIM)[None, :], other=0.0)
    if CHOSEN:
        first = tl.load(known + here * before + group, mask=there, other=float("-inf"))[None, :]
    else:
        first = _best(x, asked, keys, start, size > 0, last, stride_t, WIDE, M, PAGE, DIM, D, BLOCK, PRECISION)
    second = _best(x, asked, keys, start + left, left > 0, last, stride_t, WIDE, M, PAGE, DIM, D, BLOCK, PRECISION)
    second = tl.where((left > 0)[None, :], second, first)
    first = tl.where((left > 0)[None, :], first, float("-inf"))
    mine = (g < SHARED)[:, None, None] & inside[None, :, None]
    place = 2 * number[None, :, None] + tl.arange(0, 2)[None, None, :]
    to = new + unit[:, None, None] * 4 * slots + place
    tl.store(to, tl.broadcast_to(tl.join(start, start + left)[None, :, :], (WIDE, BLOCK, 2)), mask=mine)
    tl.store(to + 2 * slots, tl.broadcast_to(tl.join(left, size - left)[None, :, :], (WIDE, BLOCK, 2)), mask=mine)
    tl.store(scores + unit[:, None, None] * 2 * slots + place, tl.join(first, second), mask=mine)


def best_blocks(q: Tensor, k: Tensor, low: Tensor, high: Tensor, slots: int, most: int, page: int) -> Tensor:
    """About the best `slots` blocks of each range [low, high) for a set of queries, by `descend`, a block's score being
    the largest logit of any of them. Nothing waits for the device.

    Args:
        q: [B, H, T, R, D], T sets of R queries; k: [B, Hs, C, D] with adjacent channels.
        low, high: int64 [B, H or Hs, T], blocks that are held whole. Where the heads of a group have them in common,
            the first keys are fetched for all of them together.
        most: no range is longer.
        page: slots per block.

    Returns:
        int32 [B, H, T, slots], ascending, with -1 between them. Ties go to earlier halves.
    """
    fits = q.dim() == 5 and k.dim() == 4 and k.shape[0] == q.shape[0] and q.shape[1] % max(1, k.shape[1]) == 0
    if not fits or q.shape[4] != k.shape[3] or k.dtype != q.dtype or k.stride(3) != 1 or slots < 1 or 0 in q.shape:
        given = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, slots {slots}"
        mend = "give sets of queries, keys of the same dtype with adjacent channels, a slot or more"
        raise BadArgument("q", given, mend)
    of_heads = [(q.shape[0], heads, q.shape[2]) for heads in (q.shape[1], k.shape[1])]
    if low.shape not in of_heads or high.shape != low.shape:
        raise BadArgument("low", f"{tuple(low.shape)} and {tuple(high.shape)}", f"one range a set: {of_heads[0]}")
    return _op(q.contiguous(), k, low, high, slots, most, page)


@torch.library.custom_op(
    "foveate::best_blocks",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor low, Tensor high, SymInt slots, SymInt most, SymInt page) -> Tensor",
)
def _op(q: Tensor, k: Tensor, low: Tensor, high: Tensor, slots: int, most: int, page: int) -> Tensor:
    heads, rows, group = q.shape[1], q.shape[3], q.shape[1] // k.shape[1]
    if low.shape[1] != heads and (rows == 1 or _width(rows) * power_of_two(group) > _ROWS or most <= slots):
        low, high = low.repeat_interleave(group, dim=1), high.repeat_interleave(group, dim=1)
    count = (high - low).clamp_min(0).unsqueeze(-1)
    edge = low.unsqueeze(-1) + count * torch.arange(slots + 1, device=q.device) // slots
    groups = torch.stack([edge[..., :-1], edge.diff(dim=-1)], dim=-2).to(torch.int32)  # starts and sizes
    groups, chosen = halved(q, k, groups, slots, most, page)
    start, size = groups.unbind(-2)
    if chosen is not None:
        there = chosen.clamp_min(0).long()
        start, size = start.gather(-1, there), size.gather(-1, there).masked_fill(chosen < 0, 0)
    return torch.where(size > 0, start, -1)


@_op.register_fake
def _(q: Tensor, k: Tensor, low: Tensor, high: Tensor, slots: int, most: int, page: int) -> Tensor:
    return low.new_empty(*q.shape[:3], slots, dtype=torch.int32)


def _width(rows: int) -> int:
    """Queries of a set as a tile takes them."""
    return 1 if rows == 1 else max(16, power_of_two(rows))


def halved(q: Tensor, k: Tensor, groups: Tensor, slots: int, most: int, page: int) -> tuple[Tensor, Tensor | None]:
    """Groups of blocks, halved until each is one block.

    Args:
        q: contiguous [B, H, T, R, D]; k: [B, Hs, C, D] with adjacent channels.
        groups: int32 [B, H or Hs, T, 2, slots], starts and sizes, the heads of a group having them in common or not; no
            range that was cut into groups exceeds `most`.

    Returns:
        Halves of the last round, int32 [B, H, T, 2, n], and which of them stay, [B, H, T, slots], ascending, -1 behind
        the end; None: all of n.
    """
    (batch, heads, sets, rows, dim), group = q.shape, q.shape[1] // k.shape[1]
    shared = group if groups.shape[1] != heads else 1
    chosen, scores, largest = None, None, -(-most // slots)
    while largest > 1:
        halves = torch.empty(batch, heads, sets, 2, 2 * slots, dtype=torch.int32, device=q.device)
        found = torch.empty(batch, heads, sets, 2 * slots, dtype=torch.float32, device=q.device)
        _halves[(batch * heads // shared * sets, -(-slots // TILE))](
            q, k, groups, groups if chosen is None else chosen, found if scores is None else scores, halves, found,
            slots, groups.shape[-1], k.shape[2] - 1, sets, k.stride(0), k.stride(1), k.stride(2), HEADS=heads,
            GROUP=group, SHARED=shared, WIDE=power_of_two(shared), R=rows, M=_width(rows), PAGE=page, DIM=dim,
            D=max(16, power_of_two(dim)), BLOCK=TILE, CHOSEN=chosen is not None, PRECISION=precision_of(k.dtype),
            num_warps=4,
        )  # fmt: skip
        chosen = select_best(found, slots)[0]
        groups, scores, shared, largest = halves, found, 1, -(-largest // 2)
    return groups, chosen
