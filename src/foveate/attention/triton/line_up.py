"""Blocks that single queries chose, with the newest ones behind them, and where each is met: in one launch."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit(do_not_specialize=["heads", "width", "most", "near"])
def _line_up(
    chosen, own, lists, places, heads, width, most, near, stride_o, SIZE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDE)
    listed = tl.load(chosen + row * width + i, mask=i < width, other=-1)
    count = tl.sum((listed >= 0).to(tl.int32), 0)
    at = tl.load(own + row // heads * stride_o).to(tl.int32)
    edge = at // SIZE - near + 1
    past = i < count
    local = tl.maximum(edge, 0) + i - count
    local = tl.where((i < count + near) & (local * SIZE <= at), local, -1)
    # Those that are not among the last ones stand one block further away.
    before = edge - count + i - (listed < edge - most).to(tl.int32)
    to, inside = row * (width + near) + i, i < width + near
    tl.store(lists + to, tl.where(past, listed, local), mask=inside)
    tl.store(places + to, tl.where(past, before, local) * SIZE, mask=inside)


def line_up(chosen: Tensor, own: Tensor, most: int, size: int, near: int) -> tuple[Tensor, Tensor]:
    """Lists of chosen blocks, and of the `near` newest ones up to the queries' own.

    Chosen blocks are met right in front of the newest, in their order; those that are not among the last `most` blocks
    in front of the newest, one block further away. The newest are met where they stand.

    Args:
        chosen: int32 [B, H, 1, K], ascending, -1 behind the end, all in front of the newest blocks.
        own: int [B], slots of the queries.
        size: slots of a block.

    Returns:
        Lists and places of the blocks' first slots, int32 [B, H, 1, K + near], ascending, -1 behind the end.
    """
    if chosen.dim() != 4 or chosen.shape[2] != 1 or own.shape != chosen.shape[:1] or chosen.dtype != torch.int32:
        given = f"{tuple(chosen.shape)} {chosen.dtype}, own {tuple(own.shape)}"
        raise BadArgument("chosen", given, "give int32 lists of single queries [B, H, 1, K], a slot per row")
    return _op(chosen.contiguous(), own, most, size, near)


@torch.library.custom_op(
    "foveate::line_up",
    mutates_args=(),
    schema="(Tensor chosen, Tensor own, SymInt most, SymInt size, SymInt near) -> (Tensor, Tensor)",
)
def _op(chosen: Tensor, own: Tensor, most: int, size: int, near: int) -> tuple[Tensor, Tensor]:
    lists, places = _empty(chosen, own, most, size, near)
    width = chosen.shape[3]
    _line_up[(chosen.shape[0] * chosen.shape[1],)](
        chosen, own, lists, places, chosen.shape[1], width, most, near, own.stride(0), SIZE=size,
        WIDE=power_of_two(width + near), num_warps=4,
    )  # fmt: skip
    return lists, places


@_op.register_fake
def _empty(chosen: Tensor, own: Tensor, most: int, size: int, near: int) -> tuple[Tensor, Tensor]:
    lists, places = (chosen.new_empty(*chosen.shape[:3], chosen.shape[3] + near) for _ in range(2))
    return lists, places
