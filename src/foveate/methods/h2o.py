"""H2O: hold the recent tokens and those that gathered most attention so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Needs, Protect, Role, register, tries
from foveate.methods.budget import Budget
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class H2O(Method):
    """Heavy hitters: a running sum of attention per key decides, at the end of the prompt and at every step after it,
    who is held besides the recent window. What is evicted never returns.

    The sum runs over all rows so far, causally (no later row is ever looked at, while the released evaluation script
    sums over those of the whole text), and over the query heads of a kv head.
    It is not divided by the number of rows that could see a key, as in the paper, so early keys are favoured.

    Args:
        heavy: share of the budget for heavy hitters; the rest is the recent window (paper: half and half).

    Source: 2306.14048, algorithm 1. Without a budget: 0.2 of the cache, as in its language-model evaluation.
    """

    id = "h2o"
    name = "H2O"
    paper = "2306.14048"
    slots = frozenset({"keep"})
    core = True
    every_step = True
    graph = True
    search = tries(heavy=(0.25, 0.5, 0.75))

    heavy: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.heavy < 1:
            raise BadArgument("heavy", self.heavy, "give a share from 0 to below 1; the rest is the recent window")

    def needs(self, role: Role) -> Needs:
        return Needs(columns="running")

    @property
    def protect(self) -> Protect:
        return Protect(recent=1 - self.heavy)

    def total(self, shape: ModelShape, length: int) -> int | None:
        budget = Budget.of(self.budget) or Budget.ratio(0.2)
        return None if budget.whole else budget.held_tokens(shape, length, name=self.id, floor=2, extra=8)

    def score(self, view: View, ctx: Context) -> Tensor:
        return view.tag("columns").squeeze(-1)
