"""The lists of a tree search at a decode step: one launch in front of its rounds, and one behind them.

In front, the blocks between the first and the newest ones are cut into groups; behind, what was found is listed between
the first blocks and the newest, without gaps.

Source: HiP Attention (2406.09827), section 3; see `foveate.attention.triton.tree`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.tree import halved
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit
def _window(own, row, heads, stores, window, PAGE: tl.constexpr):
    """The first block of the window of query head `row` of all rows' [B * H]."""
    pair = row // heads * stores + row % heads // (heads // stores)
    return tl.maximum(tl.load(own + pair).to(tl.int32) - window + 1, 0) // PAGE


@jit(do_not_specialize=["heads", "stores", "first", "window", "slots"])
def _groups(own, groups, heads, stores, first, window, slots, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.maximum(_window(own, row, heads, stores, window, PAGE) - first, 0).to(tl.int64)
    start, end = (count * i // slots).to(tl.int32), (count * (i + 1) // slots).to(tl.int32)
    to = groups + row.to(tl.int64) * 2 * slots + i
    tl.store(to, first + start, mask=i < slots)
    tl.store(to + slots, end - start, mask=i < slots)


@jit(do_not_specialize=["heads", "stores", "first", "window", "slots", "before", "width"])
def _lists(
    own, groups, chosen, lists, counts, heads, stores, first, window, slots, before, width, PAGE: tl.constexpr,
    WIDE: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = _window(own, row, heads, stores, window, PAGE)
    i, far = tl.arange(0, WIDE), row.to(tl.int64)
    j = i - first
    found = (j >= 0) & (j < slots)
    group = j
    if CHOSEN:
        group = tl.load(chosen + far * slots + j, mask=found, other=-1)
    found = found & (group >= 0)
    start = tl.load(groups + far * 2 * before + group, mask=found, other=0)
    found = found & (tl.load(groups + (far * 2 + 1) * before + group, mask=found, other=0) > 0)
    newest = (j >= slots) & (i < width)
    number = tl.where(found, start, tl.where(j < 0, i, begin + j - slots))
    real = found | newest | ((j < 0) & (i < begin))
    place = tl.cumsum(real.to(tl.int32), 0) - 1
    count = tl.sum(real.to(tl.int32), 0)
    tl.store(lists + far * width + place, number, mask=real)
    tl.store(lists + far * width + i, tl.zeros_like(i) - 1, mask=(i >= count) & (i < width))
    tl.store(counts + row, count)


def search_lists(
    q: Tensor, k: Tensor, own: Tensor, first: int, window: int, slots: int, longest: int, page: int
) -> tuple[Tensor, Tensor]:
    """Blocks that single queries read: the first ones, about the best `slots` of those between, and the newest.

    Args:
        q: [B, H, 1, D]; k: [B, Hs, C, D] with adjacent channels, in the dtype of q.
        own: int32 [B, Hs], slots of the queries among the keys.
        first: blocks that are always read, as far as they stand in front of the window.
        window: slots up to the query's own that are always read, from the beginning of their first block on.
        slots: blocks of those between; see `tree.best_blocks`.
        longest: slots from the first one of the window on for which there are blocks, whether they are held yet or not.
        page: slots per block.

    Returns:
        Lists int32 [B, H, 1, first + slots + W], W blocks of the window, ascending, -1 behind the end; counts of their
        entries, int32 [B, H, 1].
    """
    if q.dim() != 4 or q.shape[2] != 1 or k.dim() != 4 or own.shape != k.shape[:2] or q.shape[1] % k.shape[1]:
        given = f"q {tuple(q.shape)}, k {tuple(k.shape)}, own {tuple(own.shape)}"
        raise BadArgument("q", given, "give single queries, keys of shared heads, a slot for each of these")
    if q.dtype != k.dtype or q.shape[3] != k.shape[3] or k.stride(3) != 1 or slots < 1:
        given = f"q {q.dtype}, k {tuple(k.shape)} {k.dtype}, slots {slots}"
        raise BadArgument("k", given, "give keys of the same dtype and size with adjacent channels, a slot or more")
    return _op(q.contiguous(), k, own.contiguous(), first, window, slots, longest, page)


@torch.library.custom_op(
    "foveate::search_lists",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor own, SymInt first, SymInt window, SymInt slots, SymInt longest, SymInt page) "
    "-> (Tensor, Tensor)",
)
def _op(
    q: Tensor, k: Tensor, own: Tensor, first: int, window: int, slots: int, longest: int, page: int
) -> tuple[Tensor, Tensor]:
    (batch, heads), stores, block = q.shape[:2], k.shape[1], 256
    lists, counts = _empty(q, k, own, first, window, slots, longest, page)
    groups = torch.empty(batch, heads, 1, 2, slots, dtype=torch.int32, device=q.device)
    _groups[(batch * heads, -(-slots // block))](
        own, groups, heads, stores, first, window, slots, PAGE=page, BLOCK=block, num_warps=4
    )
    most = max(0, -(-k.shape[2] // page) - first)
    groups, chosen = halved(q.unsqueeze(2), k, groups, slots, most, page)
    wide = power_of_two(lists.shape[3])
    _lists[(batch * heads,)](
        own, groups, groups if chosen is None else chosen, lists, counts, heads, stores, first, window, slots,
        groups.shape[4], lists.shape[3], PAGE=page, WIDE=wide, CHOSEN=chosen is not None,
        num_warps=4 if wide <= 1024 else 8,
    )  # fmt: skip
    return lists, counts


@_op.register_fake
def _empty(
    q: Tensor, k: Tensor, own: Tensor, first: int, window: int, slots: int, longest: int, page: int
) -> tuple[Tensor, Tensor]:
    lists = own.new_empty(*q.shape[:3], first + slots - (-longest // page) + 1)
    return lists, own.new_empty(q.shape[:3])
