"""LongHeads: every head reads the chunks it wants, as many as the model was trained to read, numbered without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.attention import ALL, Frame, Parts, Selection, turned
from foveate.attention.at_once import at_once
from foveate.attention.kernel import softmax_attention
from foveate.attention.sent import sent
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument, Refused
from foveate.methods.base import Context, Method, Profile, Result, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.complete import completes, newest, room
from foveate.methods.policies.features import Limits, best_features
from foveate.methods.policies.positions import refuse_fixed_positions
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class LongHeads(Method):
    """From token number `tokens` on, each query of each head reads tokens / chunk chunks of the text: the first one,
    its own, the one before it, and those between whose features score highest. They are attended as if they were all
    there is, at positions 0 to tokens - 1, so the model never sees a distance that it was not trained on. The query's
    own key is read in prompt and decode alike (the released prompt loop cuts it off).

    The feature of a chunk, per query head: let the chunk attend to itself in both directions; let the mean of the
    outputs attend to the chunk's keys, turned to positions 0 .. chunk - 1; the mean of those keys under that attention
    is the feature. A query scores it unrotated. Features do not depend on where a chunk stands.

    Args:
        chunk: tokens per chunk w.
        tokens: tokens that a query reads at most, several chunks; a budget replaces it.

    Needs the queries of past tokens, so tokens cannot be taken back (assisted decoding).
    Source: 2402.10685, section 3; defaults for a model trained on 4096 tokens.
    """

    id = "longheads"
    name = "LongHeads"
    paper = "2402.10685"
    slots = frozenset({"prefill", "decode"})
    aligned = True
    croppable = False
    graph = True

    chunk: int = 256
    tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise BadArgument("chunk", self.chunk, "give at least 1 token")
        if self.tokens < 3 * self.chunk:
            raise BadArgument("tokens", self.tokens, "give at least 3 chunks: the first, the previous and the current")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        refuse_fixed_positions(shape, self.id)
        if any(layer.kind == "full" and (layer.latent or layer.head_dim != layer.v_head_dim) for layer in shape.layers):
            raise Refused(f"{self.id} lets values meet keys, which in {shape.name} have other dimensions")
        budget, tokens = Budget.of(self.budget), self.tokens
        if budget is not None:
            tokens = budget.read_tokens(shape, length, 0, name=self.id, floor=3 * self.chunk)
        chunks = UNBOUNDED if budget is not None and budget.whole else max(3, tokens // self.chunk)
        return [Role("select", extra={"chunks": chunks})] * len(shape.layers)

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        size, most = self.chunk, ctx.role.extra["chunks"]
        if most == UNBOUNDED:
            return ALL
        features = self._features(q, view, ctx)
        ctx.forward[f"features {ctx.layer}"] = features
        if not view.exceeds(most * size):
            return ALL
        single = q.shape[2] == 1
        key = f"common {q.device}"
        common = ctx.forward.get(key) if single else None
        if common is None:
            own = (view.lengths[:, 0].long() - view.fresh)[:, None] + torch.arange(q.shape[2], device=q.device)
            place = torch.where(own < most * size, own, (most - 1) * size + own % size)
            ranks = torch.arange(min(most, features.shape[2]), device=q.device).mul(size)
            limits = Limits(own, own // size + 1, own // size - 1)
            common = place, ranks, limits
            if single and turned.serves(q, ctx.rope.angles()):  # by kernels, keys come to a query that stays
                ranks = (ranks + (own - place)).int()[:, None, None].expand(-1, q.shape[1], -1, -1)
                common = None, ranks.contiguous(), limits
            if single:  # all layers hold the same tokens
                ctx.forward[key] = common
        place, ranks, limits = common
        listed, _ = best_features(q, features, limits, most, ctx, place=0)
        return Selection(listed, q_block=1, k_block=size, frame=Frame(place, ranks.expand_as(listed)))

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        """Keep the features, and the queries of incomplete chunks: the query of position p in place p mod chunk."""
        features = ctx.forward.pop(f"features {ctx.layer}", None)
        if features is None:
            return
        ctx.mine["features"] = features
        if "queries" not in ctx.mine:
            ctx.mine["queries"] = q.new_zeros(*q.shape[:2], self.chunk, q.shape[3])
        held = ctx.mine["queries"]
        if q.shape[2] == 1 and view.host_fresh.all():
            key = f"queries {q.device}"
            place = ctx.forward.get(key)
            if place is None:  # all layers hold the same tokens
                place = ctx.forward[key] = ((view.lengths[:, :1].long() - 1) % self.chunk)[:, None, :, None]
            held.scatter_(2, place.expand_as(q), q)
            return
        count = min(q.shape[2], self.chunk)
        column = view.fresh[:, None].long() - count + torch.arange(count, device=q.device)
        place = ((view.lengths[:, :1].long() - view.fresh[:, None] + column) % self.chunk)[:, None, :, None]
        index = place.expand(-1, q.shape[1], -1, q.shape[3])
        new = q.gather(2, column.clamp_min(0)[:, None, :, None].expand_as(index))
        held.scatter_(2, index, torch.where((column >= 0)[:, None, :, None], new, held.gather(2, index)))

    def completes(self, seen: np.ndarray) -> bool:
        """A complete chunk gets its feature."""
        return completes(seen, self.chunk)

    def _features(self, q: Tensor, view: View, ctx: Context) -> Tensor:
        """Features of all complete chunks, float32 [B, H, chunks, D]; zeros where a row has fewer, and behind them, so
        that a step finds room for more."""
        size, (batch, heads, _, dim) = self.chunk, q.shape
        known = ctx.mine.get("features")
        if known is not None and q.shape[2] == 1 and not view.exceeds(known.shape[2] * size):
            return self._completed(q, known, view, ctx) if self.completes(ctx.seen) else known
        first = view.host_lengths[:, 0] - view.host_fresh
        total = int((view.host_lengths[:, 0] // size).max())
        begun = int((first // size).min())
        held = 0 if known is None else known.shape[2]
        chunks = held if total < held else room(total, size)
        features = q.new_zeros(batch, heads, chunks, dim, dtype=torch.float32)
        if known is not None:
            features[:, :, :held] = known
        if (view.host_lengths[:, 0] // size <= first // size).all():
            return features
        keys, values = view.k(), view.v()
        start = sent(first, q.device)
        end = sent(view.host_lengths[:, 0], q.device)
        old = ctx.mine.get("queries", q.new_zeros(batch, heads, size, dim))
        step = max(1, at_once(q.device) // (2 * batch * heads * size * max(size, dim)))
        for number in range(begun, total, step):
            some = torch.arange(number, min(number + step, total), device=q.device)
            count, slots = len(some), slice(number * size, (number + len(some)) * size)
            new = torch.arange(slots.start, slots.stop, device=q.device) - start[:, None]
            begin = slots.start - int(first[0])
            if begin >= 0 and (first == first[0]).all() and slots.stop - int(first[0]) <= q.shape[2]:
                rows = q[:, :, begin : begin + count * size]  # all of them are new
            else:
                index = new.clamp(0, q.shape[2] - 1)[:, None, :, None].expand(-1, heads, -1, dim)
                rows = torch.where((new >= 0)[:, None, :, None], q.gather(2, index), old.repeat(1, 1, count, 1))
            held, fresh = (x[:, :, slots] for x in (keys, values))
            q_of, k_of, v_of = (
                x.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1) for x in (rows, held, fresh)
            )
            made = self._feature(q_of, k_of, v_of, some.repeat(batch) * size, ctx)
            made = made.unflatten(0, (batch, count)).transpose(1, 2)
            now = (start[:, None] < (some + 1) * size) & ((some + 1) * size <= end[:, None])
            places = features[:, :, number : number + count]
            places.copy_(torch.where(now[:, None, :, None], made, places))
        return features

    def _completed(self, q: Tensor, known: Tensor, view: View, ctx: Context) -> Tensor:
        """The same with those of chunks that single queries q [B, H, 1, D] complete."""
        size, last = self.chunk, newest(view, self.chunk)
        rows = torch.cat([ctx.mine["queries"][:, :, :-1], q], dim=2)
        keys, values = last.of(view.k(), size), last.of(view.v(), size)
        return last.put(known, self._feature(rows, keys, values, last.number * size, ctx))

    def _feature(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, ctx: Context) -> Tensor:
        """Features [X, H, D] of chunks q [X, H, w, D], k and v [X, Hs, w, D] that begin at positions `start` [X]."""
        group = q.shape[1] // k.shape[1]
        near = ctx.rope.move(k, -start[:, None].expand(-1, k.shape[2])).float()
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and ctx.softcap is None and len(q) > 1:
            outs = softmax_attention(q, k, v, scale=ctx.scale, lse=False)[0].float()
        else:
            k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
            outs = _weights(q.float() @ k.transpose(-1, -2), ctx) @ v
        mean = outs.mean(2).unflatten(1, (-1, group))  # the heads of a group share their keys
        return (_weights(mean @ near.transpose(-1, -2), ctx) @ near).flatten(1, 2)


def _weights(scores: Tensor, ctx: Context) -> Tensor:
    scores = scores * ctx.scale
    if ctx.softcap is not None:
        scores = torch.tanh(scores / ctx.softcap) * ctx.softcap
    return scores.softmax(-1)
