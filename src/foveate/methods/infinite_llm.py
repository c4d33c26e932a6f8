"""Infinite-LLM: blocks of the cache lie wherever there is memory, and are attended where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.cache import UNBOUNDED, Place
from foveate.errors import BadArgument
from foveate.methods.base import Method, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class InfiniteLLM(Method):
    """Tokens are held in blocks. The device has room for so many; when more arrive, in the prompt or behind it, the
    oldest blocks go to the host's memory. Queries are sent to where keys lie, each place attends its own, and one
    softmax is merged of both by lse: what crosses over in a step does not grow with the text, and no output changes.

    The paper spreads blocks over the memories of many machines; here there are two holders, the device that borrows and
    the host that lends. `foveate.cache.ledger` keeps the books for any number of them, without moving tokens. Layers
    with a window of their own do not borrow.

    Args:
        block: tokens per block (the paper names no number).
        device: tokens per head that the device has room for when no budget is given; a budget is its share of the
            cache. What one forward brings comes on top until the layer is done with it.
        host: tokens per head and row that the host lends at most; a forward for which that is not enough is refused,
            and changes nothing. None: no end.

    Source: 2401.02669, sections on DistAttention and the ledger. No code was released.
    """

    id = "infinite-llm"
    name = "Infinite-LLM"
    paper = "2401.02669"
    slots = frozenset({"format"})
    offloads = True
    lossless = True
    search = tries(block=(16, 64), device=(512, 2048, 8192), host=(None,))

    block: int = 16
    device: int = 2048
    host: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise BadArgument("block", self.block, "give at least 1 token")
        if self.device < self.block:
            raise BadArgument("device", self.device, f"give at least one block of {self.block} tokens")
        if self.host is not None and self.host < 0:
            raise BadArgument("host", self.host, "give 0 or more tokens, or None for no end")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        budget = Budget.of(self.budget) or Budget.tokens(self.device)
        here = UNBOUNDED
        if not budget.whole:
            here = budget.held_tokens(shape, length, name=self.id, floor=self.block, extra=0)
        here = max(here, self.block)  # a prompt of less than a block needs no more room than that
        limit = None if self.host is None or budget.whole else here + self.host
        place = Place(recent=here, block=self.block, steady=True, limit=limit)
        return [Role("blocks", place=place)] * len(shape.layers)
