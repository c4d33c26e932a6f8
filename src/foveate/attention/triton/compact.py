"""What is kept of long rows, in its order, in one pass over them."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit(do_not_specialize=["width"])
def _compact(numbers, kept, lists, n, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    found = 0
    for first in range(0, n, BLOCK):
        there = first + i < n
        at = row * n + first + i
        number = first + i
        if numbers is not None:
            number = tl.load(numbers + at, mask=there, other=-1).to(tl.int32)
        some = there & (number >= 0)
        if kept is not None:
            some = there & (tl.load(kept + at, mask=there, other=0) != 0)
        place = found + tl.cumsum(some.to(tl.int32), 0) - 1
        tl.store(lists + row * width + place, number, mask=some & (place < width))
        found += tl.sum(some.to(tl.int32), 0)
    for first in range(found, width, BLOCK):
        tl.store(lists + row * width + first + i, tl.full([BLOCK], -1, tl.int32), mask=first + i < width)


def compact(numbers: Tensor | None, kept: Tensor | None, width: int) -> Tensor:
    """Those of numbers [..., n] that are kept, in their order: int32 [..., width], -1 behind the end.

    Args:
        numbers: whole numbers; None: 0 to n - 1.
        kept: bool [..., n]; None: all that are not negative. No row keeps more than width.
    """
    given = numbers if kept is None else kept
    if given is None or (numbers is not None and numbers.shape != given.shape):
        raise BadArgument("kept", None if kept is None else tuple(kept.shape), "give numbers, what is kept, or both")
    *shape, n = given.shape
    lists = torch.empty(*shape, width, dtype=torch.int32, device=given.device)
    if width and lists.numel():
        bits = None if kept is None else kept.contiguous().view(torch.uint8)
        _compact[(lists.numel() // width,)](
            None if numbers is None else numbers.contiguous(), bits, lists, n, width,
            BLOCK=min(1024, max(16, power_of_two(n))), num_warps=4,
        )  # fmt: skip
    return lists
