"""SpAtten: tokens and heads that mattered little so far are gone from all later layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection, Span
from foveate.cache import View
from foveate.errors import BadArgument, Refused
from foveate.methods.base import Context, Method, Needs, Profile, Result, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.lists import mask_lists
from foveate.methods.policies.lowbit import rough_and_fine
from foveate.methods.policies.pruned import pruned_attention
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class SpAtten(Method):
    """Cascade pruning inside the prompt. A token's importance is the attention it got from all heads and rows of the
    layers so far; each layer reads and holds only the most important of those that the layer before still had. A
    head's importance is the sum of its absolute outputs; a pruned head gives zero in all later layers and from then
    on. Within a head and row, values of the smallest probabilities are not read, and nothing is rescaled for it.

    The first layer has everything, and shares fall linearly with depth. Importance is not divided by how many rows
    could see a token, as in the paper, which favours old tokens; hence `recent`. Pruned heads still vote on tokens, and
    so do rows of pruned tokens: they read what is left, and themselves. What is generated later is held, not pruned.
    With `msb`, generated tokens first look at the upper bits of quantised keys, and at all bits where their attention
    comes out flat. That shows what it costs in accuracy; the traffic it saves is that of the paper's accelerator.

    Args:
        last: share of tokens that is left in the last layer. A budget decides it instead.
        start, recent: first and newest prompt tokens that are never pruned (class default and demo of the release).
        heads: share of query heads that is left in the last layer.
        values: share of the values that each head and row reads.
        msb, lsb: upper and lower bits of a key's numbers (paper: 4 to 12, and 4), one scale per key; msb None: no look.
        threshold: a head and row takes all bits if none of its probabilities reaches this (ours; the paper calibrates).

    A prompt given in pieces is pruned piece by piece on what was seen up to then. A second prompt is dense.
    Source: 2012.09852, sections III-A to III-C.
    """

    id = "spatten"
    name = "SpAtten"
    paper = "2012.09852"
    slots = frozenset({"prefill", "keep", "weights"})
    causality = "prompt"
    chunked = "approximate"
    croppable = False

    last: float = 0.5
    start: int = 4
    recent: int = 128
    heads: float = 1.0
    values: float = 1.0
    msb: int | None = None
    lsb: int = 4
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, start=0, recent=1)
        for name, share in (("last", self.last), ("heads", self.heads), ("values", self.values)):
            if not 0 < share <= 1:
                raise BadArgument(name, share, "give a share above 0 and at most 1")
        if self.lsb < 0 or (self.msb is not None and not 1 <= self.msb <= 24 - self.lsb):
            raise BadArgument("msb" if self.lsb >= 0 else "lsb", (self.msb, self.lsb), "give 1 to 24 bits together")
        if not 0 <= self.threshold <= 1:
            raise BadArgument("threshold", self.threshold, "give a probability")

    @property
    def graph(self) -> bool:  # type: ignore[override]
        return self.values == 1 and self.msb is None

    @property
    def fills(self) -> frozenset[str]:
        """Where rows are edited in decode, nobody else may leave parts of them unread."""
        return self.slots if self.graph else self.slots | {"decode"}

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        layers = [layer for layer in shape.layers if layer.kind == "full"]
        if any(layer.latent for layer in layers):
            raise Refused(f"{shape.name} attends to latents (MLA); {self.id} needs keys whose attention it can sum")
        roles = [Role() for _ in shape.layers]
        for i, (layer, count) in enumerate(zip(layers, self._counts(shape, length), strict=True)):
            depth = i / max(1, len(layers) - 1)
            on = max(1, math.ceil(layer.num_heads * (1 - (1 - self.heads) * depth) - 1e-9))
            roles[layer.index] = Role("cascade", extra={"share": count / length, "heads": on})
        return roles

    def _counts(self, shape: ModelShape, length: int) -> list[int]:
        """Tokens per managed layer, from everything on down in equal steps as far as the tokens that always stay."""
        layers = sum(layer.kind == "full" for layer in shape.layers)
        least = min(length, self.start + self.recent)
        budget = Budget.of(self.budget)
        if budget is None or budget.whole:
            gone = (1 - self.last if budget is None else 0.0) / max(1, layers - 1)
            return [max(least, int(length * (1 - gone * i) + 1e-6)) for i in range(layers)]
        floor = math.ceil((length + (layers - 1) * least) / max(1, layers))
        granted = budget.held_tokens(shape, length, name=self.id, floor=floor, extra=8) * layers
        flat, steep = 0.0, float(length)  # tokens less per layer
        for _ in range(48):
            step = (flat + steep) / 2 if flat else 0.0
            counts = [max(least, int(length - step * i)) for i in range(layers)]
            fits = sum(counts) <= granted
            if fits and not flat:
                return counts
            flat, steep = (flat or 1e-9, step) if fits else (max(step, 1e-9), steep)
        return [max(least, int(length - steep * i)) for i in range(layers)]

    def needs(self, role: Role) -> Needs:
        return Needs(columns="sum") if role.name == "cascade" else Needs()

    def total(self, shape: ModelShape, length: int) -> int | None:
        budget = Budget.of(self.budget)
        if self.last == 1 if budget is None else budget.whole:
            return None
        counts = self._counts(shape, length)
        return sum(counts) // max(1, len(counts))

    def layer_total(self, role: Role, shape: ModelShape, layer: int, length: int) -> int:
        return self._left(role, length)

    def _left(self, role: Role, length: int) -> int:
        """Tokens that are left of a row of this length."""
        return min(length, max(self.start + self.recent, int(role.extra["share"] * length + 1e-6)))

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if ctx.role.name != "cascade" or not view.aligned:
            return ALL
        alive = ctx.forward["alive"] = self._alive(view, ctx)
        if bool((alive == view.valid()[:, 0]).all()):
            return ALL
        return Selection(lists=mask_lists(alive)[:, None, None], span=Span(window=1))

    def _alive(self, view: View, ctx: Context) -> Tensor:
        """The tokens that this layer still has, bool [B, C]: the most important of those that the last one had."""
        valid, mass = view.valid()[:, 0], ctx.forward.get("mass")
        if mass is None:
            return valid
        before, slot = ctx.forward["alive"], torch.arange(valid.shape[1], device=valid.device)
        forced = (slot < self.start) | (slot >= view.lengths[:, :1] - self.recent)
        order = mass.masked_fill(forced, torch.inf).masked_fill(~before, -torch.inf)
        rank = order.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        left = np.array([self._left(ctx.role, int(n)) for n in view.host_lengths[:, 0]])
        return before & (rank < torch.from_numpy(left).to(rank.device)[:, None])

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> Tensor | None:
        if ctx.role.name != "cascade":
            return None
        exact = self.values == 1 and (self.msb is None or ctx.phase == "prompt")
        out = result.out if exact else self._local(q, view, ctx)
        if ctx.role.extra["heads"] < out.shape[1] or self.heads < 1:
            out = self._gated(out, view, ctx)
        if ctx.phase == "prompt" and view.aligned:
            mass = view.tag("columns").sum(dim=(1, 3))
            if bool((mass.sum(-1) > 0).all()):  # nobody sums attention where nothing is cached
                ctx.forward["mass"] = ctx.forward.get("mass", 0) + mass
        return None if out is result.out else out

    def score(self, view: View, ctx: Context) -> Tensor:
        if "alive" not in ctx.forward:
            raise Refused(f"{self.id} decides while a prompt is read which tokens stay, and here none was read")
        return ctx.forward["alive"].float().unsqueeze(1)

    def _gated(self, out: Tensor, view: View, ctx: Context) -> Tensor:
        """Head outputs [B, H, N, Dv] with those of pruned heads zero."""
        if ctx.phase == "prompt":
            real = torch.arange(out.shape[2], device=out.device) < view.fresh[:, None]
            before = ctx.forward.get("heads", out.new_zeros(out.shape[:2]).float())
            last = ctx.forward.get("on", torch.ones_like(before, dtype=torch.bool))
            rank = before.masked_fill(~last, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            on = last & (rank < ctx.role.extra["heads"])
            ctx.mine["size"] = ctx.mine.get("size", 0) + (out.float().abs().sum(-1) * real.unsqueeze(1)).sum(-1) * on
            ctx.mine["on"] = on
            ctx.forward["heads"], ctx.forward["on"] = before + ctx.mine["size"], on
        on = ctx.mine.get("on")
        return out if on is None else out * on[:, :, None, None].to(out.dtype)

    def _local(self, q: Tensor, view: View, ctx: Context) -> Tensor:
        """Attention over what is read, of which each head and row leaves out the least probable values."""
        slot, keys = torch.arange(view.capacity, device=q.device), view.k()
        own = (view.lengths - view.fresh[:, None]).unsqueeze(-1) + torch.arange(q.shape[2], device=q.device)
        own = torch.minimum(own, view.lengths.unsqueeze(-1) - 1).unsqueeze(-1)
        alive = ctx.forward.get("alive") if ctx.phase == "prompt" and view.aligned else None

        def seen(some: Tensor) -> Tensor:
            past = slot <= own[:, :, some]
            return past if alive is None else past & (alive[:, None, None] | (slot == own[:, :, some]))

        looks = (keys,) if self.msb is None or ctx.phase == "prompt" else rough_and_fine(keys, self.msb, self.lsb)
        return pruned_attention(q, looks, view.v(), seen, ctx, values=self.values, threshold=self.threshold)
