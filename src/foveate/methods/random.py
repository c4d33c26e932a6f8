"""Random: what a selection of this size is worth when nothing is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Protect, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.chance import draw, starts
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.queries import seen_lists
from foveate.models.shape import ModelShape

PHASES = {"decode": ("decode",), "prefill": ("prompt",), "both": ("prompt", "decode"), "keep": ()}
SLOTS_OF = {"decode": {"decode"}, "prefill": {"prefill"}, "both": {"prefill", "decode"}, "keep": {"keep"}}


@register
@dataclass(frozen=True, kw_only=True)
class RandomChoice(Method):
    """Every query reads the tokens `sink` and `recent` say and others by chance; or (part="keep") such tokens are held
    once the prompt is over. A lower bound: what a method chooses has to beat it.

    A pair's chance follows from the seed, the layer, the kv head and the two positions alone, so batches, padding,
    chunks, beams and resumed texts change nothing. Rows of a batch draw alike.

    Args:
        part: where it selects: "decode", "prefill", "both" or "keep".
        seed: of the draws.
        sink, recent: first and newest tokens that are always read or held, the query's own included.
        tokens: tokens per head, read or held, when no budget is given.
    """

    id = "random"
    name = "Random selection"
    paper = ""
    slots = frozenset({"prefill", "keep", "decode"})

    part: Literal["decode", "prefill", "both", "keep"] = "decode"
    seed: int = 0
    sink: int = 0
    recent: int = 1
    tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in PHASES:
            raise BadArgument("part", self.part, 'give "decode", "prefill", "both" or "keep"')
        at_least(self, sink=0, recent=1)
        if self.tokens < self.sink + self.recent:
            raise BadArgument("tokens", self.tokens, f"sink and recent alone take {self.sink + self.recent}")

    @property
    def fills(self) -> frozenset[str]:
        return frozenset(SLOTS_OF[self.part])

    @property
    def protect(self) -> Protect:
        return Protect(self.sink, self.recent)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        budget = Budget.of(self.budget) or Budget.tokens(self.tokens)
        solve = {"prompt": budget.prompt_tokens, "decode": budget.read_tokens}
        least = self.sink + self.recent
        read = {phase: solve[phase](shape, length, 0, name=self.id, floor=least) for phase in PHASES[self.part]}
        return [Role("select", extra=dict.fromkeys(read, UNBOUNDED) if budget.whole else read)] * len(shape.layers)

    def total(self, shape: ModelShape, length: int) -> int | None:
        budget = Budget.of(self.budget) or Budget.tokens(self.tokens)
        if budget.whole:
            return None
        return budget.held_tokens(shape, length, name=self.id, floor=self.sink + self.recent)

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        tokens = ctx.role.extra[ctx.phase]
        if view.capacity <= tokens:
            return ALL
        key = view.positions.unsqueeze(2)
        own = ((view.seen - view.fresh)[:, None] + torch.arange(q.shape[2], device=q.device))[:, None, :, None]

        def score(some: slice, seen: Tensor) -> Tensor:
            at = own[:, :, some]
            chance = draw(starts(self.seed, ctx.layer, key.shape[1], q.device), at, key)
            return chance.masked_fill((key < self.sink) | (at - key < self.recent), torch.inf)

        return Selection(lists=seen_lists(view, q, tokens, score), q_block=1)

    def score(self, view: View, ctx: Context) -> Tensor:
        positions = view.positions.unsqueeze(2)
        start = starts(self.seed, ctx.layer, positions.shape[1], positions.device)
        return draw(start, positions).squeeze(2)
