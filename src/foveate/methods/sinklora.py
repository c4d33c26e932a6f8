"""SinkLoRA: attention inside groups, shifted in some heads, and to the first tokens from everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection, Span
from foveate.attention.sent import sent
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Role, register, tries
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class SinkLoRA(Method):
    """The prompt is cut into groups; a query attends to what is before it in its group, and to the first tokens of all.
    In shifted heads the groups lie half a group off, so that neighbours exchange what they know. Decode is dense.

    This is the pattern that models are fine-tuned with; on a model that was not, it costs quality. Groups are lists, so
    nothing is rolled: the released roll puts the last half group before the first one, whose queries then see the
    future in shifted heads. Here both halves are groups of their own.

    Args:
        group: tokens of a group, even; None: a quarter of the prompt (paper: a quarter, or 8192).
        shifted: share of the second half of the query heads that is shifted: 1 as in S2-Attn (LongLoRA), 0 none.
        sink: first tokens that everyone sees (ours; neither paper nor code states how many).

    Groups count the tokens that are held. Eviction at inference is the paper's other half: compose with h2o.
    Source: 2406.05678, Sink Fixed Attention, as far as its abstract tells; released code for the groups.
    """

    id = "sinklora"
    name = "SinkLoRA"
    paper = "2406.05678"
    slots = frozenset({"prefill"})
    budgeted = False
    search = tries(shifted=(0.0, 0.5, 1.0), sink=(0, 4, 16))

    group: int | None = None
    shifted: float = 1.0
    sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise BadArgument("group", self.group, "give an even number of tokens, or None for a quarter of the prompt")
        if not 0 <= self.shifted <= 1:
            raise BadArgument("shifted", self.shifted, "give a share from 0 to 1")
        if self.sink < 0:
            raise BadArgument("sink", self.sink, "give 0 or more tokens")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        group = self.group or 2 * -(-length // 8)
        return [Role("groups", extra={"group": group})] * len(shape.layers)

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        half = ctx.role.extra["group"] // 2
        if view.host_lengths.max() <= half:
            return ALL
        own = view.host_lengths - view.host_fresh[:, None]
        # Queries share a list as long as no border of half a group comes between them.
        step = math.gcd(half, *own.flatten().tolist())
        heads, stores = q.shape[1], own.shape[1]
        number = torch.arange(0, q.shape[2], step, device=q.device)
        newest = (sent(own, q.device).unsqueeze(-1) + number) // half
        newest = newest.repeat_interleave(heads // stores, dim=1)
        moved = torch.arange(heads, device=q.device) >= heads - round(self.shifted * (heads // 2))
        moved = moved.long().view(1, -1, 1)
        # In halves, a plain group begins at an even one and a shifted group at an odd one.
        first = ((newest + moved) // 2 * 2 - moved).clamp_min(0)
        lists = torch.stack([first, first + 1], dim=-1)
        last = (view.capacity - 1) // half
        lists = torch.where((lists <= newest.unsqueeze(-1)) & (lists <= last), lists, -1).to(torch.int32)
        near = Span(self.sink, window=1)
        return Selection(lists=lists, q_block=step, k_block=half, span=near)
