"""Radial Attention: a fixed pattern whose windows shrink with distance, as attention's energy does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Role, register, tries
from foveate.methods.policies.decay import causal_blocks
from foveate.methods.policies.lists import mask_lists
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class Radial(Method):
    """A pattern for video, read in one dimension as a prompt's. The text is cut into frames. A token sees its own frame
    and the one before; in older ones it sees the tokens around its own place in the frame, half as many whenever the
    distance doubles, and at a width of less than a block only every second, fourth, ... frame. The first frame is seen
    by all. That makes O(n log n) pairs, which no token has a say in. Decode is dense.

    In video a place in a frame is a place in the picture, which is why it pays to look there again. A text has no such
    places: what is left is near tokens, a few far ones at even steps, and the first. The video form (both directions in
    time, text tokens that see everything, first denoising steps dense) needs a video transformer and is not this.

    Args:
        frame: tokens that count as a frame, a multiple of `block`.
        block: tokens per block.
        decay: factor of the widths (paper: rho, 1; released scripts 0.2 to 0.95).
        sink: everybody sees the first frame.
        dense_layers: first layers that read everything (released scripts: 0 to 2).

    Source: 2506.19852, section 4; released code for the widths. It takes a block where a third of most of its columns
    is kept; here a block with any kept pair is read.
    """

    id = "radial"
    name = "Radial Attention"
    paper = "2506.19852"
    slots = frozenset({"prefill"})
    budgeted = False
    search = tries(frame=(128, 256, 512), decay=(0.25, 0.5, 1.0), dense_layers=(0, 1, 2))

    frame: int = 512
    block: int = 128
    decay: float = 1.0
    sink: bool = True
    dense_layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise BadArgument("block", self.block, "give at least 1 token")
        if self.frame < self.block or self.frame % self.block:
            raise BadArgument("frame", self.frame, f"give a multiple of block={self.block}")
        if not self.decay > 0:
            raise BadArgument("decay", self.decay, "give a factor above 0")
        if self.dense_layers < 0:
            raise BadArgument("dense_layers", self.dense_layers, "give 0 or more layers")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        full = [layer.index for layer in shape.layers if layer.kind == "full"]
        sparse = set(full[self.dense_layers :])
        return [Role("radial" if layer.index in sparse else "dense") for layer in shape.layers]

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        # Where tokens were evicted slots are not positions: a second prompt reads all that is held.
        if ctx.role.name != "radial" or not view.aligned or bool((view.seen != view.lengths[:, 0]).any()):
            return ALL
        blocks = -(-view.longest // self.block)
        pattern = causal_blocks(blocks, self.frame, self.block, self.decay, self.sink).to(q.device)
        if bool(pattern.eq(torch.ones_like(pattern).tril()).all()):
            return ALL
        first = view.seen - view.fresh
        if bool((first % self.block == 0).all()):
            rows, q_block = -(-q.shape[2] // self.block), self.block
        else:  # a piece of a prompt that begins inside a block: each query looks up its own
            rows, q_block = q.shape[2], 1
        at = first[:, None] + torch.arange(rows, device=q.device) * q_block
        lists = mask_lists(pattern[(at // self.block).clamp_max(blocks - 1)])
        return Selection(lists=lists.unsqueeze(1), q_block=q_block, k_block=self.block)
