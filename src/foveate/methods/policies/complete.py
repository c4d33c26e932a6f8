"""Blocks of tokens that a decode step completes, on the device alone: what is known of a block is made once, when its
last token comes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foveate.cache import View

SPARE = 1024
"""Fewest tokens that there is room for when what is known of blocks has to be brought elsewhere."""


class Newest(NamedTuple):
    """The last complete block of each row, of methods that hold the same tokens in all heads.

    Args:
        number: int64 [B], 0 where there is none.
        now: bool [B], whether this forward's one token completed it.
    """

    number: Tensor
    now: Tensor

    def slots(self, size: int, first: int = 0) -> Tensor:
        """Slots of its tokens, int64 [B, size], where the first block begins in slot `first`."""
        return first + self.number.unsqueeze(1) * size + torch.arange(size, device=self.number.device)

    def of(self, x: Tensor, size: int, first: int = 0) -> Tensor:
        """What its slots hold: x [B, h, C, D] -> [B, h, size, D]."""
        return x.gather(2, self.slots(size, first)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def put(self, known: Tensor, made: Tensor) -> Tensor:
        """What is known of all blocks [B, h, blocks, D] with what was made of these [B, h, D], if they are new."""
        place = self.number.view(-1, 1, 1, 1).expand(-1, known.shape[1], 1, known.shape[3])
        new = torch.where(self.now.view(-1, 1, 1, 1), made.unsqueeze(2), known.gather(2, place))
        return known.scatter(2, place, new)


def completes(seen: np.ndarray, size: int, before: int = 0) -> bool:
    """Whether one more token completes a block of any row that had `seen` tokens, of which `before` belong to none."""
    return bool(((seen >= before) & ((seen + 1 - before) % size == 0)).any())


def newest(view: View, size: int, before: int = 0) -> Newest:
    """The last complete blocks, where `before` tokens of each row belong to none."""
    length = view.lengths[:, 0].long() - before
    now = (length > 0) & (length % size == 0) & (view.fresh > 0)
    return Newest((length // size - 1).clamp_min(0), now)


def room(total: int, size: int) -> int:
    """How many blocks of `size` tokens to make room for when there are `total`."""
    return total + max(-(-SPARE // size), total // 4)
