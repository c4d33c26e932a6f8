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
from foveate.methods.policies.lists import mask_lists


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

    Source: 2407.17678; released code for the phase of a head: head times max(1, stride // number of kv heads).
    """

    id = "s2-attention"
    name = "S2-Attention"
    paper = "2407.17678"
    slots = frozenset({"prefill", "decode"})
    budgeted = False
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
        if view.host_lengths.max() <= self.local * self.block or self.stride == 1:
            return ALL
        kv_heads = ctx.shape.num_kv_heads
        own = view.host_lengths - view.host_fresh[:, None]
        # Queries share a list as long as no border of a block comes between them.
        step = math.gcd(self.block, *own.flatten().tolist()) if q.shape[2] > 1 else 1
        number = torch.arange(0, q.shape[2], step, device=q.device)
        newest = (torch.from_numpy(own).to(q.device).unsqueeze(-1) + number) // self.block
        # Latent attention decodes from one held head, whose query heads keep the shards that they had in the prompt.
        newest = newest.expand(-1, kv_heads, -1).unsqueeze(-1)
        head = torch.arange(kv_heads, device=q.device).view(1, -1, 1, 1)
        block = torch.arange(-(-view.capacity // self.block), device=q.device)
        shard = (block + head * max(1, self.stride // kv_heads)) % self.stride == 0
        near = newest - block < self.local
        read = (block <= newest) & (near | shard | (head >= kv_heads - self.dense_heads))
        return Selection(lists=mask_lists(read), q_block=step, k_block=self.block)
