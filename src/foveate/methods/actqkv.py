"""ActQKV: blocks of the past are recalled by a query that speaks for the tokens that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from foveate.attention import ALL, Frame, Partial, Parts, Selection
from foveate.attention.recalled import Borders, Share
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Result, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies import recalled
from foveate.methods.policies.complete import completes, room
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.mass import listed_mass
from foveate.methods.policies.outliers import piece_probes
from foveate.methods.policies.positions import at_position, refuse_fixed_positions
from foveate.methods.policies.recall import (
    cosines,
    first_tokens,
    known_blocks,
    newest_tokens,
    normalised_entropy,
    taken,
)
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class ActQKV(Method):
    """All heads of a layer read the first `init` tokens, the newest ones, and those blocks of `block` tokens between
    them that a probe recalls: the weighted mean of the queries of a piece of the prompt, or the one query of a decode
    step. A token weighs as much as its activation, its query with all heads side by side, deviates from the mean of its
    piece, channel by channel, in units of the variance. What is far is read as if all of it stood `local` tokens back.

    A block is known by the mean of `representatives` of its keys, without their positions: those that got most
    attention from the newest tokens' softmax while the block was among them. It scores the cosine of that mean and the
    probe, heads side by side. Newest are the last `local` tokens, counted from a piece's first query, and the at most
    `block - 1` before them that fill no block yet; in a prompt they are seen by the whole piece at their true places.

    At a decode step the layers share topk blocks times their number: each takes of what is left in proportion to the
    mean entropy of its last `history` probes' softmax over blocks, once all layers have that many; equal shares before.

    The released code keeps one mean and variance for all layers and texts; here each row of each layer has its own, and
    with "window", as in the paper, each piece. Its additional term for the tokens of a question is left out: nobody
    says where a question stands. Takes the attention of past queries, so tokens cannot be taken back.

    Args:
        block: tokens per block. init, local: tokens always read.
        topk: blocks recalled per layer on average when no budget is given.
        representatives: keys that stand for a block.
        chunk: queries of the prompt that share a probe.
        probe: "window" weighs tokens by moments of their own piece, "running" by those of all pieces before (equally
            until `cap` tokens were seen; no more than `cap` count against the newest piece), "mean" equally.
        least: blocks that every layer takes at least, if topk allows; at most are 2 topk.

    Source: 2502.13542, section 3; defaults of the released code for 8B models.
    """

    id = "actqkv"
    name = "ActQKV"
    paper = "2502.13542"
    slots = frozenset({"prefill", "decode"})
    causality = "prompt"
    chunked = "approximate"
    aligned = True
    graph = True
    croppable = False
    search = tries(block=(16, 32, 64), local=(128, 256, 512))

    block: int = 32
    init: int = 64
    local: int = 512
    topk: int = 46
    representatives: int = 4
    chunk: int = 256
    probe: Literal["window", "running", "mean"] = "window"
    least: int = 32
    history: int = 100
    cap: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init", "block", "local", "topk", "chunk", "least", "history", "cap"):
            if getattr(self, name) < (name != "init"):
                raise BadArgument(name, getattr(self, name), f"give at least {int(name != 'init')}")
        if not 1 <= self.representatives <= self.block:
            raise BadArgument("representatives", self.representatives, f"give 1 to block={self.block} tokens")
        if self.probe not in ("window", "running", "mean"):
            raise BadArgument("probe", self.probe, 'give "window", "running" or "mean"')

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        refuse_fixed_positions(shape, self.id)
        budget, topk = Budget.of(self.budget), self.topk
        if budget is not None:
            fixed = self.init + self.local + self.block - 1
            read = budget.read_tokens(shape, length, 0, name=self.id, floor=fixed + self.block)
            topk = UNBOUNDED if budget.whole else max(1, (read - fixed) // self.block)
        full = [layer.index for layer in shape.layers if layer.kind == "full"]
        place = {index: (number, len(full)) for number, index in enumerate(full)}
        return [Role("recall", extra={"topk": topk, "place": place.get(i)}) for i in range(len(shape.layers))]

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if (topk := ctx.role.extra["topk"]) == UNBOUNDED:
            return ALL
        # Without first tokens there is nothing to read behind the newest until a block is ready.
        far = view.exceeds(self.local + (0 if self.init else max(0, self.block - 2)))
        if far and recalled.serves(q, view, ctx):
            number, layers = ctx.role.extra["place"]
            share = Share(number, topk * layers, min(self.least, topk), 2 * topk)
            return recalled.step(q, view, ctx, self._borders, share)
        per = self.chunk if ctx.phase == "prompt" else 1
        single = q.shape[2] == per == 1
        key = f"places {q.device}"
        places = ctx.forward.get(key) if single else None
        if places is None:
            first = view.lengths[:, :1].long() - view.fresh[:, None]
            starts = first + torch.arange(0, q.shape[2], per, device=q.device)  # [B, pieces]
            sinks = first_tokens(starts, self.init, self.local)
            ready = self._borders.ready(starts)
            near = newest_tokens(starts, ready, per, view, self._borders)
            places = first, starts, near, sinks, ready
            if single:  # all layers hold the same tokens
                ctx.forward[key] = places
        first, starts, near, sinks, ready = places
        held = ctx.attend(q, view, near)
        assert held.lse is not None
        local = Partial(held.out, held.lse, near)
        before = ctx.mine.get("mass")
        if before is not None and not view.exceeds(before.shape[1]):
            mass = before + listed_mass(q, view, near, held.lse, ctx, before.shape[1])
        else:
            mass = listed_mass(q, view, near, held.lse, ctx, room(view.capacity, 1))
            if before is not None:
                mass[:, : before.shape[1]] += before
        known, count = ctx.mine.get("blocks"), self.representatives
        state = {"mass": mass, "blocks": known_blocks(known, view, mass, count, self._borders, ctx, single=single)}
        if not far:
            ctx.forward[f"step {ctx.layer}"] = state, None, None
            return local
        raw = at_position(q, first + torch.arange(q.shape[2], device=q.device), self.local, ctx.rope)
        probes, seen = piece_probes(raw, per, view, ctx, self.probe, self.cap)
        chosen, entropy, left = self._recall(probes, state["blocks"], starts, ready, view, ctx)
        ctx.forward[f"step {ctx.layer}"] = state | seen, entropy, left
        tokens = self.init + chosen.unsqueeze(-1) * self.block + torch.arange(self.block, device=q.device)
        tokens = torch.where(chosen.unsqueeze(-1) >= 0, tokens, -1).flatten(2).to(torch.int32)
        lists = torch.cat([sinks, tokens], dim=-1).unsqueeze(1)
        frame = Frame(torch.full_like(first, self.local).expand(-1, q.shape[2]), torch.zeros_like(lists))
        return [Selection(lists=lists, q_block=per, frame=frame), local]

    def completes(self, seen: np.ndarray) -> bool:
        """The next block stands behind the newest tokens."""
        return completes(seen, self.block, self._borders.ahead)

    @property
    def _borders(self) -> Borders:
        return Borders(self.init, self.local, self.block)

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        if recalled.settled(view, ctx, self._borders, self.representatives):
            return
        nothing: Any = ({}, None, None)
        state, entropy, left = ctx.forward.pop(f"step {ctx.layer}", nothing)
        ctx.mine.update(state)
        if entropy is None:
            return
        ctx.forward["left"] = left
        number, layers = ctx.role.extra["place"]
        past = ctx.mine.get("entropy", torch.full((len(q), self.history), -1.0, device=q.device))
        for new in entropy.split(1, dim=1):
            past = torch.where(new < 0, past, torch.cat([past[:, 1:], new], dim=1))
        means = ctx.shared.get("entropy", past.new_full((len(q), layers), -1.0)).clone()
        means[:, number] = torch.where((past < 0).any(1), -1.0, past.mean(1))  # -1 until the history is full
        ctx.mine["entropy"], ctx.shared["entropy"] = past, means

    def _recall(
        self, probes: Tensor, blocks: Tensor, starts: Tensor, ready: Tensor, view: View, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks recalled for each piece, int32 [B, pieces, K]; the entropy of its scores; how many blocks are left
        to the layers behind."""
        topk, (number, layers) = ctx.role.extra["topk"], ctx.role.extra["place"]
        scores = cosines(probes, blocks)
        scores = scores.masked_fill(torch.arange(blocks.shape[2], device=blocks.device) >= ready[..., None], -torch.inf)
        entropy = torch.where((starts < view.lengths[:, :1]) & (ready > 1), normalised_entropy(scores), -1.0)
        left = ctx.forward.get("left", torch.full_like(ready, topk * layers))
        means = ctx.shared.get("entropy") if ctx.phase == "decode" else None
        take = taken(left, means, number, layers, min(self.least, topk), 2 * topk)
        most = min(2 * topk, scores.shape[-1])
        return top_lists(scores, most, torch.minimum(take, ready)), entropy, left - take
