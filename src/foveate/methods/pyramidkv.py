"""PyramidKV: the lower layers hold more of the prompt than the upper ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Needs, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.layers import affordable, pyramid
from foveate.methods.policies.window import check_window, window_scores
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class PyramidKV(Method):
    """When the prompt is over, hold per head the window of its last queries and the tokens that these attend to most:
    many of them in the first layer, ever fewer towards the last. Later tokens are all held.

    All layers together hold what they would hold at the budget each. The first never gets more than the prompt has,
    which makes the slope less steep when budgets are large; the released code has no slope at all for prompts of less
    than twice the budget, so that there a larger budget may hold less in a layer.

    Args:
        beta: the last layer chooses 1/beta of the average number of tokens (paper: 20); 1 gives all layers the same.
        window: last queries that choose and are held themselves (code: 8 in its scripts).
        kernel: pooling width along the keys, odd; 1 is none.
        pool: "avg" or "max".
        reduce: how the query heads of a kv head agree: "mean" or "max".
        capacity: tokens per head and layer, on average, when no budget is given (code: 2048).

    Source: 2406.02069, section 4; released code for the defaults and the bound of the first layer.
    """

    id = "pyramidkv"
    name = "PyramidKV"
    paper = "2406.02069"
    slots = frozenset({"keep"})

    beta: int = 20
    window: int = 8
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    reduce: Literal["mean", "max"] = "mean"
    capacity: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.kernel, self.pool)
        if self.beta < 1:
            raise BadArgument("beta", self.beta, "give at least 1, which is no slope")
        if self.reduce not in ("mean", "max"):
            raise BadArgument("reduce", self.reduce, 'give "mean" or "max"')

    def needs(self, role: Role) -> Needs:
        return Needs(window=self.window)

    def total(self, shape: ModelShape, length: int) -> int:
        budget = Budget.of(self.budget) or Budget.tokens(self.capacity)
        return budget.held_tokens(shape, length, name=self.id, floor=self.window)

    def layer_total(self, role: Role, shape: ModelShape, layer: int, length: int) -> int:
        managed = [x for x in shape.layers if x.kind == "full"]
        weights = [shape.kv_bytes_per_slot(x.index) + 4 * x.store_heads for x in managed]

        def line(average: int) -> list[int]:
            return pyramid(average, len(managed), beta=self.beta, most=length - self.window)

        chosen = affordable(self.total(shape, length) - self.window, weights, line)
        return self.window + chosen[[x.index for x in managed].index(layer)]

    def score(self, view: View, ctx: Context) -> Tensor:
        return window_scores(view, ctx, kernel=self.kernel, pool=self.pool, reduce=self.reduce)
