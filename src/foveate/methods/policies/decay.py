"""Masks whose windows shrink as the distance grows: O(n log n) pairs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def band_width(apart: int, frame: int, decay: float, block: int) -> int:
    """How far two tokens of frames that are `apart` may stand from each other inside their frames: the whole frame for
    0 and 1, then a width that halves whenever the distance doubles, at least a block.

    Source: Radial Attention (2506.19852), section 4.
    """
    if apart <= 1:
        return frame
    return max(int(_undecayed(apart, frame) * decay), block)


def is_kept(apart: int, frame: int, block: int) -> bool:
    """Whether pairs of frames that are `apart` are looked at at all: where the width would be less than a block, only
    every so many."""
    narrow = _undecayed(apart, frame)
    return apart <= 1 or narrow >= block or apart % int(block / narrow) == 0


def _undecayed(apart: int, frame: int) -> float:
    return 2.0 ** (frame.bit_length() - apart.bit_length())


def radial_mask(frames: int, frame: int, block: int, decay: float, sink: bool = True) -> Tensor:
    """The pairs of tokens, both ways in time: bool [frames * frame, frames * frame].

    Args:
        frames, frame: how many frames, and tokens in each.
        block: width below which frames are skipped instead.
        decay: factor of the widths.
        sink: everybody sees the first frame.

    Source: Radial Attention (2506.19852), section 4; released code for the rounding.
    """
    place = torch.arange(frames * frame) % frame
    row = place[:frame, None] - place[None, :frame]
    tiles = []
    for apart in range(frames):
        kept = is_kept(apart, frame, block)
        tiles.append(row.abs() <= band_width(apart, frame, decay, block) if kept else torch.zeros_like(row).bool())
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    mask = torch.stack(tiles)[distance].transpose(1, 2).reshape(frames * frame, frames * frame)
    if sink:
        mask[:, :frame] = True
    return mask


@lru_cache(maxsize=64)
def causal_blocks(blocks: int, frame: int, block: int, decay: float, sink: bool) -> Tensor:
    """The mask in blocks of a text that is read as frames: bool [blocks, blocks], lower triangle.

    A block of queries and one of keys are a pair if some of their tokens are; unlike by the paper's shares of a block,
    no kept token is lost, and what is read of n tokens stays O(n log n). Frames are made of whole blocks.
    """
    per = frame // block
    number = torch.arange(blocks)
    time, place = number // per, number % per
    apart = (time[:, None] - time).clamp_min(0)
    least = (place[:, None] - place).abs() * block - (block - 1)  # the nearest two tokens of two blocks
    width = torch.tensor([band_width(d, frame, decay, block) for d in range(-(-blocks // per) + 1)])
    kept = torch.tensor([is_kept(d, frame, block) for d in range(-(-blocks // per) + 1)])
    mask = kept[apart] & (least <= width[apart])
    if sink:
        mask |= time == 0
    return mask.tril()
