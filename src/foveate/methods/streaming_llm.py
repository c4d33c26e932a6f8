"""StreamingLLM: a constant cache of the first tokens and the most recent ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.attention import ALL, Frame, Parts, Selection, Span
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument, Refused
from foveate.methods.base import Context, Method, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Hold the first `sink` tokens and the last `recent` ones; forget the rest.

    With positions="cache" distances are counted inside the cache, as in the paper: the far part is read with the query
    moved to where it would stand if the gap had closed, so no key is ever rotated again. With "absolute" keys keep
    their distance in the text (what most later papers call StreamingLLM).

    Every token looks back as if the text had come token by token. The released code reads a piece of text whole and
    makes room for all of it before, so that its first tokens see less and its last ones more.

    Args:
        sink: first tokens held (paper: 4).
        recent: newest tokens held, the current one included; a budget replaces it by what is left after the sinks.
        positions: "cache" or "absolute".

    Source: 2309.17453, section 3.2.
    """

    id = "streaming-llm"
    name = "StreamingLLM"
    paper = "2309.17453"
    slots = frozenset({"keep"})
    graph = True
    core = True
    search = tries(sink=(1, 4, 16))

    sink: int = 4
    recent: int = 512
    positions: Literal["cache", "absolute"] = "cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink < 0:
            raise BadArgument("sink", self.sink, "give 0 or more tokens")
        if self.recent < 1:
            raise BadArgument("recent", self.recent, "give at least 1 token")
        if self.positions not in ("cache", "absolute"):
            raise BadArgument("positions", self.positions, 'give "cache" or "absolute"')

    @property
    def fills(self) -> frozenset[str]:
        # Re-counted positions decide how every pair is read, so nobody else can.
        return self.slots | {"prefill", "decode"} if self.positions == "cache" else self.slots

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        if self.positions == "cache" and shape.rope.get("type") in (None, "dynamic", "longrope"):
            raise Refused(f'{self.id}: positions cannot be re-counted on {shape.name}; use positions="absolute"')
        recent = self.recent
        budget = Budget.of(self.budget)
        if budget is not None and budget.whole:
            return [Role("stream", extra={"recent": UNBOUNDED})] * len(shape.layers)
        if budget is not None:
            recent = budget.held_tokens(shape, length, name=self.id, floor=self.sink + 1) - self.sink
            recent = max(1, recent)
        return [Role("stream", Span(self.sink, recent), extra={"recent": recent})] * len(shape.layers)

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        recent = ctx.role.extra["recent"]
        if not view.exceeds(recent):
            return ALL
        near = Selection(span=Span(window=recent))
        if self.sink == 0:
            return near
        place = ctx.forward.get("place")
        if place is None:
            own = (view.seen - view.fresh)[:, None] + torch.arange(q.shape[2], device=q.device)
            place = own.clamp_max(self.sink + recent - 1)
            if ctx.phase == "decode" and q.shape[2] == 1:  # of a single query, it is the same in all layers
                ctx.forward["place"] = place
        return [near, Selection(span=Span(self.sink, window=0, beyond=recent), frame=Frame(query=place))]
