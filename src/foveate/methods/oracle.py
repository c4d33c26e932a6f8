"""Oracle: the list that holds most of the softmax, of all lists of its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.queries import seen_lists
from foveate.models.shape import ModelShape

PHASES = {"decode": ("decode",), "prefill": ("prompt",), "both": ("prompt", "decode")}
SLOTS_OF = {"decode": {"decode"}, "prefill": {"prefill"}, "both": {"prefill", "decode"}}


@register
@dataclass(frozen=True, kw_only=True)
class Oracle(Method):
    """Every query reads the keys that its own softmax would weigh most, of all it may see. No list of this size holds
    more of the softmax; that is what other lists are measured by, though one with less of it may by chance end nearer
    to the dense output. It is no way to save anything: to find the list all keys are read, in every layer and step,
    which the pairs read do not include.

    Args:
        part: where it selects: "decode", "prefill" or "both". Lists of a prompt take 4 bytes per query head, query and
            token read.
        share: "head": each query head has its list. For selections that a kv head makes once, its query heads agree by
            the "mean" or "max" of their probabilities, or on the "union" of their best, as deep as the budget reaches.
        tokens: tokens read per query and head when no budget is given.
    """

    id = "oracle"
    name = "Oracle top-k"
    paper = ""
    slots = frozenset({"prefill", "decode"})

    part: Literal["decode", "prefill", "both"] = "decode"
    share: Literal["head", "mean", "max", "union"] = "head"
    tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in PHASES:
            raise BadArgument("part", self.part, 'give "decode", "prefill" or "both"')
        if self.share not in ("head", "mean", "max", "union"):
            raise BadArgument("share", self.share, 'give "head", "mean", "max" or "union"')
        if self.tokens < 1:
            raise BadArgument("tokens", self.tokens, "give at least 1")

    @property
    def fills(self) -> frozenset[str]:
        return frozenset(SLOTS_OF[self.part])

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        budget = Budget.of(self.budget) or Budget.tokens(self.tokens)
        solve = {"prompt": budget.prompt_tokens, "decode": budget.read_tokens}
        read = {phase: solve[phase](shape, length, 0, name=self.id) for phase in PHASES[self.part]}
        return [Role("select", extra=dict.fromkeys(read, UNBOUNDED) if budget.whole else read)] * len(shape.layers)

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        tokens = ctx.role.extra[ctx.phase]
        if view.capacity <= tokens:
            return ALL
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = view.k().transpose(-1, -2).to(wide)
        group = q.shape[1] // keys.shape[1]

        def score(some: slice, seen: Tensor) -> Tensor:
            queries = q[:, :, some].to(wide).unflatten(1, (-1, group)).flatten(2, 3)
            logits = (queries @ keys * ctx.scale).unflatten(2, (group, -1))
            if ctx.softcap is not None:
                logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
            if self.share == "head":
                return logits.flatten(1, 2)
            return agreed(logits.masked_fill(~seen.unsqueeze(2), -torch.inf), self.share)

        return Selection(lists=seen_lists(view, q, tokens, score), q_block=1)


def agreed(logits: Tensor, share: str) -> Tensor:
    """One score per kv head [B, Hs, n, C] of its query heads' logits [B, Hs, G, n, C]."""
    if share == "union":
        rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return -rank.amin(2).to(logits.dtype)
    weights = logits.log_softmax(-1)  # logarithms tell small probabilities apart
    return weights.logsumexp(2) if share == "mean" else weights.amax(2)
