"""Landmark attention without training: the mean of a block's keys stands for its landmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from foveate.attention import ALL, Frame, Partial, Parts, Selection, turned
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.complete import newest, room
from foveate.methods.policies.features import Limits, best_features
from foveate.methods.policies.positions import at_position, refuse_fixed_positions
from foveate.models.shape import ModelShape


class Layout(NamedTuple):
    """Where queries and blocks stand.

    Args:
        own: positions of the queries, int64 [B, N].
        edge: first local block of each; blocks before it can be retrieved.
        far: bool [B, N, 1], whether anything may be left out.
        place: where queries stand when they read retrieved blocks.
        local: the newest blocks.
    """

    own: Tensor
    edge: Tensor
    far: Tensor
    place: Tensor
    local: Selection


@register
@dataclass(frozen=True, kw_only=True)
class LandmarkMeans(Method):
    """Each query of each head reads its own block, the blocks just before it, and the k earlier blocks whose landmarks
    score highest; prompt and decode alike. The paper trains a landmark token per block. Here the landmark is the mean
    of the block's keys without their positions, scored as if it stood `recent` blocks before the query.

    Retrieved blocks are laid out right before the local ones, in order; those that are not among the last k blocks
    before them stand one block further away (the paper's stingy positions). So no distance exceeds k + 1 + recent
    blocks.

    Args:
        block: tokens per block (paper: 50).
        k: blocks retrieved (paper: 2 to 5); a budget replaces it.
        recent: newest blocks always read, the query's own included.
        softmax: "plain" is one softmax over all that is read. "grouped" is the paper's: the local tokens share one with
            the landmarks, and what a landmark wins is divided among its block's tokens by a softmax of their own; a
            model that was not trained for it gives past blocks too little. A budget of 1.0 leaves dense attention.
        reposition: False reads retrieved blocks where they stand in the text.

    Source: 2305.16300, sections 3.1 and 3.2.
    """

    id = "landmark-means"
    name = "Landmark Attention (means)"
    paper = "2305.16300"
    slots = frozenset({"prefill", "decode"})
    aligned = True
    graph = True

    block: int = 50
    k: int = 5
    recent: int = 5
    softmax: Literal["plain", "grouped"] = "plain"
    reposition: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, block=1, k=1, recent=1)
        if self.softmax not in ("plain", "grouped"):
            raise BadArgument("softmax", self.softmax, 'give "plain" or "grouped"')

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        refuse_fixed_positions(shape, self.id)
        budget, k = Budget.of(self.budget), self.k
        if budget is not None:
            read = budget.read_tokens(shape, length, 0, name=self.id, floor=(self.recent + 1) * self.block)
            k = UNBOUNDED if budget.whole else max(1, read // self.block - self.recent)
        return [Role("select", extra={"k": k})] * len(shape.layers)

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        size, k = self.block, ctx.role.extra["k"]
        # A grouped softmax differs from a plain one as soon as there is a past block.
        enough = self.recent + (k if self.softmax == "plain" else 0)
        if k == UNBOUNDED or not view.exceeds(enough * size):
            ctx.mine.pop("means", None)  # nobody makes those of blocks that become complete now
            return ALL
        single = q.shape[2] == 1
        key = f"layout {q.device}"
        layout = ctx.forward.get(key) if single else None
        if layout is None:
            layout = self._layout(q, k, view)
            if single:  # all layers hold the same tokens
                ctx.forward[key] = layout
        grouped, limits = self.softmax == "grouped", Limits(layout.own, layout.edge)
        how: dict[str, Any] = {"place": self.recent * self.block, "scale": ctx.scale, "softcap": ctx.softcap}
        means = self._means(view, ctx, single)
        listed, score = best_features(q, means, limits, k, ctx, scored=grouped, **how)
        if single and not grouped and self.reposition and turned.serves(q, ctx.rope.angles()):
            # One read of all: keys come to a query that stays where it is.
            lists, places = turned.line_up(listed, layout.own[:, 0], k, size, self.recent)
            return Selection(lists, q_block=1, k_block=size, frame=Frame(keys=places))
        number = torch.arange(listed.shape[-1], dtype=torch.int32, device=q.device)
        rank = number - (listed >= 0).sum(-1, keepdim=True, dtype=torch.int32)  # -1 is the newest
        start = (rank - (listed < (layout.edge - k).int()[:, None, :, None]).int()).add_(k + 1).mul_(size)
        target = torch.where(layout.far.unsqueeze(1), start, listed * size)
        frame = Frame(layout.place, target) if self.reposition else Frame()
        if score is None:
            return [Selection(lists=listed, q_block=1, k_block=size, frame=frame), layout.local]
        parts: list[Selection | Partial] = [layout.local]
        for n in range(listed.shape[-1]):
            one = slice(n, n + 1)
            keys = None if frame.keys is None else frame.keys[..., one]
            block = Selection(listed[..., one].contiguous(), 1, size, frame=Frame(frame.query, keys))
            parts.append(Partial(ctx.attend(q, view, block).out, score[..., n]))
        return parts

    def _layout(self, q: Tensor, k: int, view: View) -> Layout:
        """Where queries and blocks stand."""
        size = self.block
        own = (view.lengths[:, :1].long() - view.fresh[:, None]) + torch.arange(q.shape[2], device=q.device)
        edge = own // size - self.recent + 1
        if q.shape[2] == 1:  # token by token, in which kernels read blocks of any size
            near = edge.clamp_min(0)[..., None] * size + torch.arange(self.recent * size, device=q.device)
            near = near.masked_fill(near > own[..., None], -1)
            local = Selection(lists=near.to(torch.int32).unsqueeze(1), q_block=1)
        else:
            # Queries of one block read the same blocks: one list, where blocks of queries and of keys begin together.
            per = 1 if ((view.host_lengths[:, 0] - view.host_fresh) % size).any() else size
            near = edge[:, ::per].clamp_min(0)[..., None] + torch.arange(self.recent, device=q.device)
            behind = (near > (own[:, ::per] // size)[..., None]) | (near * size >= view.capacity)
            local = Selection(
                lists=near.masked_fill(behind, -1).to(torch.int32).unsqueeze(1), q_block=per, k_block=size
            )
        far = edge[..., None] > k
        # Positions count from the oldest block that may be laid out, unless nothing is left out yet.
        place = torch.where(far[..., 0], own - (edge - k - 1) * size, own)
        return Layout(own, edge, far, place, local)

    def _means(self, view: View, ctx: Context, single: bool) -> Tensor:
        """Mean keys of all complete blocks without positions, float32 [B, Hs, blocks, D]; made once and held. Behind
        those that are complete there is room for more. A `single` token came with this forward, or several."""
        size, keys = self.block, view.k()
        known = ctx.mine.get("means")
        if known is not None and (known.shape[1], known.shape[3]) != (keys.shape[1], keys.shape[3]):
            known = None  # latent attention: heads in the prompt, then latents
        if known is not None and single and not view.exceeds((known.shape[2] + 1) * size - 1):
            angles = ctx.rope.angles()
            if turned.serves(keys, angles):
                turned.newest_mean(known, keys, view.lengths[:, 0], size, angles)
                return known
            last = newest(view, size)
            if not ctx.sure(~last.now):
                raw = at_position(last.of(keys, size), last.slots(size), 0, ctx.rope)
                known = ctx.mine["means"] = last.put(known, raw.float().mean(2))
            return known
        total = view.capacity // size
        begin = 0 if known is None else int((view.host_lengths[:, 0] - view.host_fresh).min()) // size
        if known is None or known.shape[2] < total:
            means = keys.new_zeros(len(keys), keys.shape[1], room(total, size), keys.shape[3], dtype=torch.float32)
            if known is not None:
                means[:, :, : known.shape[2]] = known
            known = means
        if begin < total:
            slots = slice(begin * size, total * size)
            raw = at_position(keys[:, :, slots], view.positions[:, :, slots], 0, ctx.rope)
            known = known.clone()
            known[:, :, begin:total] = raw.float().unflatten(2, (total - begin, size)).mean(3)
        ctx.mine["means"] = known
        return known
