"""Recycled Attention: look everywhere now and then, and in between re-read what mattered then."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import ALL, Partial, Parts, Selection
from foveate.attention.sent import sent
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Result, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.places import ascending, on_device, positions_of, slots_of
from foveate.methods.policies.rows import group_reduce, row_probs
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class RecycledAttention(Method):
    """A full decode step attends to everything and lists, per layer and kv head, the K tokens that its query looked at
    most. The steps after it read that list and their own token, and hand on the K of these that they looked at most:
    the new token comes in, the one with the least attention leaves. All is held, so a full step sees every token.

    The first step after a prompt is a full one; the paper's list comes from the
    prompt's last query, one token earlier. Each row of a batch keeps its own clock.

    Args:
        tokens: K when no budget is given; a recycled step reads K + 1 tokens. A budget holds on average over a period,
            full steps counted in.
        stride: S, one step in so many is full.
        similarity: s (paper: 0.8); instead of the stride, every `every` steps the query is compared with that of the
            last full step (cosine of the rotated vectors, mean over heads, in each layer), and the step is full where
            it is below s. A budget then holds even if no check passes.
        every: steps between two comparisons.
        reduce: how the query heads of a kv head agree: "max" or "mean" of their probabilities.

    Source: 2411.05787, section 3; defaults of its evaluation at 32K tokens. Its continued pre-training is not here.
    """

    id = "recycled-attention"
    name = "Recycled Attention"
    paper = "2411.05787"
    slots = frozenset({"decode"})
    croppable = False
    graph = True

    tokens: int = 4096
    stride: int = 50
    similarity: float | None = None
    every: int = 5
    reduce: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "stride", "every"):
            if getattr(self, name) < 1:
                raise BadArgument(name, getattr(self, name), "give at least 1")
        if self.reduce not in ("max", "mean"):
            raise BadArgument("reduce", self.reduce, 'give "max" or "mean"')

    @property
    def period(self) -> int:
        """Steps from one full step to the next that is due, or may turn out to be."""
        return self.stride if self.similarity is None else self.every

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        full = [layer.index for layer in shape.layers if layer.kind == "full"]
        budget, keep = Budget.of(self.budget), self.tokens
        if budget is not None:
            read = budget.read_tokens(shape, length, len(full) / self.period, name=self.id, floor=2)
            keep = UNBOUNDED if budget.whole else max(1, read - 1)
        recycling = Role("recycle", extra={"keep": keep})
        return [recycling if layer.index in full else Role() for layer in shape.layers]

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if ctx.role.name != "recycle":
            return ALL
        read = self._by_kernels(q, view, ctx) if q.shape[2] == 1 else None
        if read is not None:
            return read
        state, keys, reads = dict(ctx.mine), view.k(), []
        for i in range(q.shape[2]):  # several tokens in one step read what single steps would have read
            read, whole = self._step(q[:, :, i], i, keys, state, view, ctx)
            reads.append((read, whole))
        ctx.forward["next"] = state
        if all(whole for _, whole in reads):
            return ALL
        width = max(read.shape[-1] for read, _ in reads)
        lists = torch.stack([F.pad(read, (0, width - read.shape[-1]), value=-1) for read, _ in reads], dim=2)
        return Selection(lists=lists, q_block=1)

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        if ctx.phase == "prompt":
            ctx.mine.clear()  # the list knows nothing of these tokens
        else:
            ctx.mine.update(ctx.forward.pop("next", {}))

    def _by_kernels(self, q: Tensor, view: View, ctx: Context) -> Partial | None:
        """What `_step` gives where kernels attend and keep the list at once, all rows being due or none; else None."""
        held, room, listed = view.held, ctx.role.extra["keep"], ctx.mine.get("list")
        batch, heads = view.lengths.shape if held is not None else (0, 0)
        if held is None or listed is None or view.capacity <= room + 1 or listed.shape != (batch, heads, room):
            return None
        due, mean = ctx.clock % self.period == 0, self.reduce == "mean"
        if (due.any() and (self.similarity is not None or not due.all())) or not listed.is_contiguous():
            return None
        if due.any():
            read = held.scored(q, view.capacity, ctx.scale, ctx.softcap)
            every = on_device(tuple(range(heads)), q.device, torch.int32)
            ctx.forward["next"] = {"list": top_lists(held.token_weights(read, every, 0, mean=mean), room)}
        else:
            counts, windows = (on_device((n,) * heads, q.device, torch.int32) for n in (room, 1))
            counts = counts.expand(batch, heads)
            read = held.listed(q, listed, counts, windows, room + 1, ctx.scale, ctx.softcap, scored=True)
            held.replace_least(listed, read, mean=mean)  # in its place: nothing has to be brought back to it
        return Partial(read.out, read.lse)

    def _step(
        self, q: Tensor, i: int, keys: Tensor, state: dict[str, Tensor], view: View, ctx: Context
    ) -> tuple[Tensor, bool]:
        """Slots [B, Hs, K] that the i-th new tokens read, their queries being q [B, H, D], and whether these are all
        they can see. Brings the state from before the tokens to behind them."""
        room, real = ctx.role.extra["keep"], view.host_fresh > i
        due = self._due(q, ctx.clock + i, state, ctx) & real
        own = view.lengths - view.fresh[:, None] + i
        if not real.all():
            own = own.masked_fill(~sent(real, own.device)[:, None], -1)
        own = own.unsqueeze(-1)
        slot = torch.arange(keys.shape[2], dtype=torch.int32, device=q.device)
        read = torch.where(slot <= own, slot, -1)
        whole = bool(due[real].all()) or keys.shape[2] <= room + 1
        some = None if due.all() or not due.any() else sent(due, q.device).view(-1, 1, 1)
        if not due.all() and state:
            listed = ascending(torch.cat([slots_of(state["list"], view), own], dim=-1))
            wide = F.pad(listed, (0, max(0, read.shape[-1] - listed.shape[-1])), value=-1)
            read = listed if some is None else torch.where(some, read, wide)
        kept = read
        if read.shape[-1] > room:
            at = read.long().clamp_min(0).unsqueeze(-1)
            near = keys if due.all() else keys.gather(2, at.expand(-1, -1, -1, keys.shape[-1]))
            score = group_reduce(row_probs(q, near, read >= 0, ctx), self.reduce)
            best = top_lists(score.masked_fill(read < 0, -torch.inf), room)
            kept = read.gather(-1, best.long().clamp_min(0)).masked_fill(best < 0, -1)
        if self.similarity is not None and (due.any() or not state):
            state["query"] = q.clone() if some is None else torch.where(some, q, state.get("query", q))
        state["list"] = positions_of(kept, view).clone()
        return read, whole

    def _due(self, q: Tensor, clock: np.ndarray, state: dict[str, Tensor], ctx: Context) -> np.ndarray:
        """Which rows look everywhere now: the first step after a prompt, and whenever a period is over."""
        due = clock % self.period == 0
        if not state:
            return np.ones_like(due)
        if self.similarity is None or not due.any():
            return due
        alike = F.cosine_similarity(q.float(), state["query"].float(), dim=-1).mean(1).cpu().numpy()
        return due & ((alike < self.similarity) | (clock == 0))

    def kind(self, clock: np.ndarray) -> Hashable:
        """A comparison looks at values, so such a step is made in the ordinary way."""
        due = clock % self.period == 0
        return None if self.similarity is not None and due.any() else tuple(due.tolist())
