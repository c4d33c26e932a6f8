"""DELTA: a few layers look everywhere and choose pages for the layers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Needs, Profile, Result, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.lists import counted_lists
from foveate.methods.policies.pages import page_weights
from foveate.models.shape import ModelShape

PLACES = (0.0, 1 / 28, 2 / 28, 14 / 28, 22 / 28)
"""Depths of the full layers in the paper's 28-layer models: 0, 1, 2, 14, 22."""


@register
@dataclass(frozen=True, kw_only=True)
class DeltaAttention(Method):
    """At each decode step full layers read everything; the last of each run of full layers (a Δ-layer) scores tokens by
    the largest probability over all its heads and passes the best pages to the layers behind it. All is held. Of equal
    pages the first is the better one (a released selector takes 1e-7 times its number from each page's score instead).

    Args:
        page: tokens per page.
        pages: pages a sparse layer reads when no budget is given (paper: 64). A budget counts the full layers in.
        recent: newest pages that are always read.
        full_layers: layers that read everything; None places them at the paper's relative depths.

    Source: 2510.09883, section 3; defaults of the released code. Placement of the full layers by the paper's
    calibration pass is an input here (`full_layers`).
    """

    id = "delta-attention"
    name = "DELTA"
    paper = "2510.09883"
    slots = frozenset({"decode"})
    core = True
    graph = True
    aligned = True
    search = tries(page=(8, 16, 32), recent=(2, 4, 8))

    page: int = 16
    pages: int = 64
    recent: int = 8
    full_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise BadArgument("page", self.page, "give at least 1 token")
        if self.recent < 1:
            raise BadArgument("recent", self.recent, "give at least 1 page, so that a token can see itself")
        if self.full_layers is not None:
            object.__setattr__(self, "full_layers", tuple(self.full_layers))
            if 0 not in self.full_layers:
                raise BadArgument("full_layers", self.full_layers, "layer 0 must be among them")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        managed = [layer.index for layer in shape.layers if layer.kind == "full"]
        if self.full_layers is None:
            full = {managed[min(round(place * len(managed)), len(managed) - 1)] for place in PLACES}
        else:
            wrong = [i for i in self.full_layers if i >= len(shape.layers)]
            if wrong:
                raise BadArgument("full_layers", self.full_layers, f"{shape.name} has {len(shape.layers)} layers")
            full = set(self.full_layers) | {managed[0]}
        budget = Budget.of(self.budget) or Budget.tokens(self.pages * self.page)
        least = (self.recent + 1) * self.page
        read = budget.read_tokens(shape, length, len(full & set(managed)), name=self.id, floor=least)
        pages = UNBOUNDED if budget.whole else max(self.recent + 1, read // self.page)
        roles = [Role() for _ in shape.layers]
        for here, after in zip(managed, [*managed[1:], None], strict=True):
            if here not in full:
                roles[here] = Role("reuse")
            elif after is not None and after not in full:
                roles[here] = Role("select", extra={"pages": pages})
        return roles

    def needs(self, role: Role) -> Needs:
        return Needs(probs=role.name == "select")

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if ctx.role.name != "reuse":
            return ALL
        lists, counts = ctx.forward["pages"]
        return Selection(lists=lists, q_block=1, k_block=self.page, counts=counts)

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        if ctx.role.name != "select" or result.probs is None:
            return
        lists, counts = counted_lists(page_weights(result.probs, view, self.page, self.recent), ctx.role.extra["pages"])
        ctx.forward["pages"] = lists.unsqueeze(1), None if counts is None else counts.unsqueeze(1)
