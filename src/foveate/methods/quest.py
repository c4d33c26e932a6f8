"""Quest: hold everything, read at each step only the pages that could matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import UNBOUNDED, Blocks, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Needs, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.lists import counted_lists
from foveate.methods.policies.summaries import minmax, page_scores
from foveate.models.shape import ModelShape

LEAST_PAGES = 3


@register
@dataclass(frozen=True, kw_only=True)
class Quest(Method):
    """Per page and kv head the channel-wise minimum and maximum of the keys bound every q·k in it from above; the pages
    with the largest bounds are read, and always the newest one. Prompt and first layers are dense.

    Args:
        page: tokens per page.
        dense_layers: first layers that read everything.
        share: "head" lists pages per query head (paper), "group" one list per kv head (the largest bound of its query
            heads), which most kernels want.
        tokens: tokens read per head when no budget is given (paper: 256 to 4096). A budget counts the dense layers in.

    Source: 2406.10774, section 3.3.
    """

    id = "quest"
    name = "Quest"
    paper = "2406.10774"
    slots = frozenset({"decode"})
    core = True
    graph = True
    search = tries(page=(8, 16, 32), dense_layers=(0, 1, 2))

    page: int = 16
    dense_layers: int = 2
    share: Literal["head", "group"] = "head"
    tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise BadArgument("page", self.page, "give at least 1 token")
        if self.dense_layers < 0:
            raise BadArgument("dense_layers", self.dense_layers, "give 0 or more layers")
        if self.share not in ("head", "group"):
            raise BadArgument("share", self.share, 'give "head" or "group"')

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        full = [layer.index for layer in shape.layers if layer.kind == "full"]
        dense = set(full[: self.dense_layers])
        budget = Budget.of(self.budget) or Budget.tokens(self.tokens)
        read = budget.read_tokens(shape, length, len(dense), name=self.id, floor=LEAST_PAGES * self.page)
        pages = UNBOUNDED if budget.whole else max(LEAST_PAGES, read // self.page)
        sparse = Role("select", extra={"pages": pages})
        return [sparse if layer.index in full and layer.index not in dense else Role() for layer in shape.layers]

    def needs(self, role: Role) -> Needs:
        return Needs(blocks={self.id: Blocks(self.page, minmax)}) if role.name == "select" else Needs()

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if ctx.role.name != "select":
            return ALL
        bound = page_scores(q, view, self.id, self.page, group=self.share == "group")
        lists, counts = counted_lists(bound, ctx.role.extra["pages"])
        return Selection(lists, q_block=1, k_block=self.page, counts=counts)
