"""SnapKV: keep what the last queries of the prompt look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Needs, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.window import window_scores
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class SnapKV(Method):
    """When the prompt is over, hold per head the tokens that the prompt's last `window` queries attend to most, and the
    window itself. Later tokens are all held.

    Args:
        window: observation window W (code: 32).
        kernel: pooling width along the keys, odd; 1 is none.
        pool: "avg" or "max".
        reduce: how the query heads of a kv head agree: "mean" or "max" (the released code keeps one cache per query
            head instead, which costs the group factor in memory).
        capacity: tokens per head when no budget is given (code: 2048).

    Source: 2404.14469, section 3; released code for the defaults.
    """

    id = "snapkv"
    name = "SnapKV"
    paper = "2404.14469"
    slots = frozenset({"keep"})
    core = True
    search = tries(window=(8, 16, 32, 64), kernel=(1, 3, 5, 7, 13))

    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    reduce: Literal["mean", "max"] = "mean"
    capacity: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise BadArgument("window", self.window, "give at least 1 query")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise BadArgument("kernel", self.kernel, "give an odd width, 1 for no pooling")
        if self.pool not in ("avg", "max"):
            raise BadArgument("pool", self.pool, 'give "avg" or "max"')
        if self.reduce not in ("mean", "max"):
            raise BadArgument("reduce", self.reduce, 'give "mean" or "max"')

    def needs(self, role: Role) -> Needs:
        return Needs(window=self.window)

    def total(self, shape: ModelShape, length: int) -> int:
        budget = Budget.of(self.budget) or Budget.tokens(self.capacity)
        return budget.held_tokens(shape, length, name=self.id, floor=self.window)

    def score(self, view: View, ctx: Context) -> Tensor:
        return window_scores(view, ctx, kernel=self.kernel, pool=self.pool, reduce=self.reduce)
