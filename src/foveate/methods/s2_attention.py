"""S2-Attention: a local window and, per head, one shard of the rest of the context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, register, tries


@register
@dataclass(frozen=True, kw_only=True)
class S2Attention(Method):
    """In blocks of the context, each query reads its own and the ones before it, and behind these every `stride`-th
    block. Which, differs between kv heads, so that together they read everything. Prompt and decode alike.

    Shards are counted from the beginning of the text, so a block that a head left behind is never read again. The
    whole cache is held here; it is a pattern that models are trained with, and on others it costs quality.

    Args:
        block: tokens per block.
        local: newest blocks that are read, the query's own included (code's example: 32 of 64 tokens for 8K).
        stride: one block in so many is read behind them.
        dense_heads: last kv heads that read everything.

    Source: 2407.17678; released code for the pattern. The phase of a kv head is its number times max(1, stride // kv
    heads), so that phases are spread evenly; the released code divides by the number of query heads, which under
    grouped heads leaves them side by side. How many blocks are read by some head is the same.
    """

    id = "s2-attention"
    name = "S2-Attention"
    paper = "2407.17678"
    slots = frozenset({"prefill", "decode"})
    budgeted = False
    graph = True
    search = tries(local=(4, 8, 16, 32), stride=(2, 4, 8, 16), dense_heads=(0, 1))

    block: int = 64
    local: int = 32
    stride: int = 8
    dense_heads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block", "local", "stride"):
            if getattr(self, name) < 1:
                raise BadArgument(name, getattr(self, name), "give at least 1")
        if self.dense_heads < 0:
            raise BadArgument("dense_heads", self.dense_heads, "give 0 or more kv heads")

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        near = self.local * self.block
        if self.stride == 1 or not view.exceeds(near) or view.capacity <= near:
            return ALL
        # Queries share a list as long as no border of a block comes between them.
        step = self.block
        if q.shape[2] > 1:
            step = math.gcd(step, *(view.host_lengths - view.host_fresh[:, None]).flatten().tolist())
        key = f"{view.capacity} {ctx.shape.num_kv_heads}"
        found = ctx.forward.get(key) if view.aligned else None
        if found is None:
            number = torch.arange(0, q.shape[2], step, device=q.device)
            found = self._lists(number, view, ctx.shape.num_kv_heads)
            if view.aligned:  # all layers hold the same tokens in the same slots
                ctx.forward[key] = found
        lists, counts = found
        return Selection(lists=lists, q_block=step if q.shape[2] > 1 else 1, k_block=self.block, counts=counts)

    def _lists(self, number: Tensor, view: View, heads: int) -> tuple[Tensor, Tensor]:
        """Blocks that the queries `number` (int64 [n], counted from a row's first) of each kv head read, and how many:
        int32 [B, heads, n, K] and [B, heads, n]. How wide lists are does not depend on values of the device."""
        blocks = -(-view.capacity // self.block)
        own = view.lengths.long() - view.fresh[:, None]
        newest = ((own.unsqueeze(-1) + number) // self.block).clamp_max(blocks - 1)
        # Latent attention decodes from one held head, whose query heads keep the shards that they had in the prompt.
        newest = newest.expand(-1, heads, -1).unsqueeze(-1)
        edge = (newest - self.local + 1).clamp_min(0)
        head = torch.arange(heads, device=number.device).view(-1, 1, 1)
        first, every = (-head * max(1, self.stride // heads)) % self.stride, self.stride
        behind = (edge - first + self.stride - 1).clamp_min(0) // self.stride
        if self.dense_heads:
            dense = head >= heads - self.dense_heads
            first, every = first.masked_fill(dense, 0), torch.where(dense, 1, self.stride)
            behind = torch.where(dense, edge, behind)
        width = blocks if self.dense_heads else self.local - (self.local - blocks) // self.stride
        place = torch.arange(width, device=number.device)
        block = torch.where(place < behind, first + every * place, edge + place - behind)
        lists = torch.where(block <= newest, block, -1)
        return lists.to(torch.int32), (behind + newest - edge + 1).squeeze(-1).to(torch.int32)
