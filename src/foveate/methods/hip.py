"""HiP: find the best key blocks by a tree search, a logarithm of the context at a time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection, decoding
from foveate.attention.at_once import at_once
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Result, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.tree import descend, descend_keys, descend_lists, with_ends
from foveate.models.shape import ModelShape

LEAST_BLOCKS = 2


@register
@dataclass(frozen=True, kw_only=True)
class HiP(Method):
    """Per query head and block of queries, the range between sinks and window is cut into as many groups of key blocks
    as may be read; groups are halved, a half is as good as the best logit of its first block, and the best halves go
    on, until each is one block. These blocks, the sinks and the window are read; all is held.

    In decode a search serves the following steps too, `refresh` in all; meanwhile the window only grows, so that no
    token falls between it and the list. First layers are dense. Softcaps are monotone and need no part in the search.

    Args:
        tokens: tokens read per query besides sinks and window when no budget is given (paper: 512). A budget counts
            everything: dense layers, sinks, the window at its longest.
        q_block, k_block: queries that share a list; keys that are listed together.
        q_stride: every such query of a block is asked (released code: the odd ones, 2).
        sink, window: first and newest held tokens that are always read (ours; the paper states none).
        refresh: decode steps that one search serves; 1 searches at each step.
        dense_layers: first layers that read everything.

    Source: 2406.09827, section 3 and algorithm 1; released code (v1) for the defaults. The stages of InfiniteHiP
    (2502.08910) are not part of it. A prompt given in pieces has query blocks of its own per piece.
    """

    id = "hip"
    name = "HiP Attention"
    paper = "2406.09827"
    slots = frozenset({"prefill", "decode"})
    causality = "prompt"
    chunked = "approximate"
    nested = False
    croppable = False
    graph = True
    search = tries(q_stride=(1, 2), window=(64, 128, 256), refresh=(1, 4, 8), dense_layers=(0, 1, 3))

    tokens: int = 512
    q_block: int = 32
    k_block: int = 2
    q_stride: int = 2
    sink: int = 16
    window: int = 128
    refresh: int = 8
    dense_layers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("q_block", "k_block", "q_stride", "window", "refresh"):
            if getattr(self, name) < 1:
                raise BadArgument(name, getattr(self, name), "give at least 1")
        for name in ("sink", "dense_layers"):
            if getattr(self, name) < 0:
                raise BadArgument(name, getattr(self, name), "give 0 or more")
        if self.tokens < LEAST_BLOCKS * self.k_block:
            raise BadArgument("tokens", self.tokens, f"give at least {LEAST_BLOCKS} blocks of {self.k_block}")

    @property
    def _always(self) -> int:
        """Tokens of sinks and window, whole blocks, just before a refresh."""
        return self._sinks * self.k_block + self.window + self.k_block - 1 + self.refresh - 1

    @property
    def _sinks(self) -> int:
        return -(-self.sink // self.k_block)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        full = [layer.index for layer in shape.layers if layer.kind == "full"]
        dense = set(full[: self.dense_layers])
        budget = Budget.of(self.budget) or Budget.tokens(self.tokens + self._always)
        floor = self._always + LEAST_BLOCKS * self.k_block
        read = budget.read_tokens(shape, length, len(dense), name=self.id, floor=floor)
        slots = None if budget.whole else max(LEAST_BLOCKS, (read - self._always) // self.k_block)
        search = Role("search", extra={"blocks": slots})
        return [search if layer.index in full and layer.index not in dense else Role() for layer in shape.layers]

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if ctx.role.name != "search":
            return ALL
        slots = ctx.role.extra["blocks"]
        if slots is None:
            return ALL
        keys = view.k().detach()
        if ctx.phase == "decode":
            return self._steps(q.detach(), keys, view, ctx, slots)
        slots = min(slots, -(-keys.shape[2] // self.k_block))
        if view.host_lengths.max() <= self._sinks * self.k_block + self.window + slots * self.k_block:
            return ALL
        number = torch.arange(-(-q.shape[2] // self.q_block), device=q.device) * self.q_block
        own = view.lengths.long() - view.fresh[:, None]
        first = own.unsqueeze(-1) + number
        last = torch.minimum(first + self.q_block, view.lengths.unsqueeze(-1)) - 1
        asked = torch.arange(min(self.q_stride, self.q_block) - 1, self.q_block, self.q_stride, device=q.device)
        # Where the last block is not full its last query stands in for those that are missing.
        rows = (number[:, None] + asked).expand(q.shape[0], -1, -1)
        rows = torch.minimum(rows, view.fresh[:, None, None].long() - 1).clamp_min(0)
        index = rows.flatten(1)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        asking = q.detach().gather(2, index).unflatten(2, rows.shape[1:])
        begin = torch.minimum(self._begin(first), last.clamp_min(0) // self.k_block)
        found = self._search(asking, keys, begin, slots)
        lists = with_ends(found, begin, last, self._sinks, self.window + self.q_block, self.k_block)
        return Selection(lists=lists, q_block=self.q_block, k_block=self.k_block)

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        # Written down here, so that asking `select` twice is asking once.
        ctx.mine.update(ctx.forward.pop(str(ctx.layer), {}))

    def kind(self, clock: np.ndarray) -> Hashable:
        """Steps that search, and those that a search serves."""
        return bool((clock % self.refresh == 0).any())

    def _begin(self, first: Tensor) -> Tensor:
        """The window's first block, for query blocks whose first query stands in slot `first`."""
        return (first - self.window + 1).clamp_min(0) // self.k_block

    def _steps(self, q: Tensor, keys: Tensor, view: View, ctx: Context, slots: int) -> Selection:
        """What single queries read in their order, each by the latest search that still serves. What it found is
        remembered as a list that ends with the window as long as it becomes."""
        state, read = dict(ctx.mine), []
        for i in range(q.shape[2]):
            if self.kind(ctx.clock + i) or not state or not self._serves(state, i, view, ctx):
                ago = i - view.fresh
                state = {"own": view.lengths + ago[:, None], "at": view.seen + ago}
                state["lists"], state["counts"] = self._found(q[:, :, i : i + 1], keys, state["own"], slots)
            if view.still and decoding.serves(q)[0] and decoding.pages(self.k_block):
                ctx.forward[str(ctx.layer)] = state  # of a block that is not held yet kernels read nothing
                return Selection(state["lists"], q_block=1, k_block=self.k_block, counts=state["counts"])
            own = view.lengths - view.fresh[:, None] + i
            blocks = state["lists"].unflatten(1, (own.shape[1], -1))
            ends = (own // self.k_block)[..., None, None, None]  # [B, Hs, 1, 1, 1]
            read.append(torch.where(blocks <= ends, blocks, -1).flatten(1, 2))
        ctx.forward[str(ctx.layer)] = state
        return Selection(torch.cat(read, dim=2), q_block=1, k_block=self.k_block)

    def _serves(self, state: dict[str, Tensor], i: int, view: View, ctx: Context) -> bool:
        """Whether no slots have been moved since the last search."""
        if view.still:
            return True
        own, age = view.lengths - view.fresh[:, None] + i, view.seen - view.fresh + i - state["at"]
        return ctx.sure((age > 0) & (age < self.refresh) & (own - state["own"] == age[:, None]).all(1))

    def _found(self, q: Tensor, keys: Tensor, own: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """A search for single queries q [B, H, 1, D] in slots `own` [B, Hs]: lists [B, H, 1, K] and their counts."""
        reach = self.window + self.refresh
        made = descend_lists(q, keys, own, self._sinks, self.window, slots, reach, self.k_block)
        if made is not None:
            return made
        begin = self._begin(own.long().unsqueeze(-1))
        found, last = self._search(q.unsqueeze(3), keys, begin, slots), torch.full_like(begin, (1 << 31) - 1)
        lists = with_ends(found, begin, last, self._sinks, reach, self.k_block)
        return lists, (lists >= 0).sum(-1, dtype=torch.int32)

    @torch.no_grad()
    def _search(self, asking: Tensor, keys: Tensor, begin: Tensor, slots: int) -> Tensor:
        """Blocks between sinks and window for the queries [B, H, nq, r, D]: [B, H, nq, slots]."""
        (batch, heads, count, _, dim), (stores, held) = asking.shape, keys.shape[1:3]
        group = heads // stores
        offset = torch.arange(self.k_block, device=keys.device)
        most = max(0, -(-held // self.k_block) - self._sinks)
        made = 4 if decoding.serves(asking)[0] else self.k_block * dim  # of each half: numbers by kernels, else keys
        step = max(1, at_once(keys.device) // (batch * heads * 2 * slots * made))
        found = []
        for at in range(0, count, step):
            some = slice(at, at + step)
            high = begin[:, :, some]  # the heads of a group search in the same range
            best = descend_keys(asking[:, :, some], keys, self._sinks, high, slots, most, self.k_block)
            if best is not None:
                found.append(best)
                continue
            ask = asking[:, :, some].unflatten(1, (stores, group)).float()

            def score(blocks: Tensor, ask: Tensor = ask) -> Tensor:
                token = (blocks.unsqueeze(-1) * self.k_block + offset).clamp_max(held - 1).flatten(2)
                fetched = keys.gather(2, token.unsqueeze(-1).expand(-1, -1, -1, dim))
                fetched = fetched.float().view(*blocks.shape[:-1], -1, dim)
                return (ask @ fetched.mT).amax(-2).unflatten(-1, (-1, self.k_block)).amax(-1)

            high = high.unsqueeze(2).expand(-1, -1, group, -1)
            found.append(descend(torch.full_like(high, self._sinks), high, slots, score, most).flatten(1, 2))
        return torch.cat(found, dim=2)
