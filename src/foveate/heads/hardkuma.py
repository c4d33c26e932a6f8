"""Gates that are nearly always 0 or 1: HardKuma draws, trained under a bound on how many heads are open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.errors import BadArgument
from foveate.heads.gates import GateRecipe, Learned, gated_layers, learn_gates
from foveate.heads.passkeys import Example
from foveate.heads.tap import Tapped
from foveate.models.shape import ModelShape

EDGE = 1e-6
"""Uniform draws stay this far from 0 and 1, where the inverse has no gradient."""


@dataclass(frozen=True)
class Stretch:
    """z = clip(p + (q - p) s, 0, 1) of s ~ Kumaraswamy(alpha, beta): masses at exactly 0 and 1, a gradient between.

    Source: Bastings et al. 2019 (HardKuma), as used by LycheeDecode (2602.04541).
    """

    low: float = -0.1
    high: float = 1.1

    def __post_init__(self) -> None:
        if not self.low < 0 or not self.high > 1:
            raise BadArgument("stretch", (self.low, self.high), "it must reach below 0 and above 1")

    def below(self, t: Tensor | float, alpha: Tensor, beta: Tensor) -> Tensor:
        """P(stretched value <= t), for t between the ends."""
        x = (torch.as_tensor(t, dtype=alpha.dtype, device=alpha.device) - self.low) / (self.high - self.low)
        return 1 - (1 - x**alpha) ** beta

    def draw(self, u: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """Gates [heads] from uniform numbers u [heads]."""
        u = u.clamp(EDGE, 1 - EDGE)
        s = (1 - (1 - u) ** (1 / beta)) ** (1 / alpha)
        return (self.low + (self.high - self.low) * s).clamp(0, 1)

    def opened(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """P(z > 0)."""
        return 1 - self.below(0.0, alpha, beta)

    def mean(self, alpha: Tensor, beta: Tensor, points: int = 1000) -> Tensor:
        """E[z], the integral of P(z > t) over t in 0..1, by midpoints."""
        t = (torch.arange(points, dtype=alpha.dtype, device=alpha.device) + 0.5) / points
        return (1 - self.below(t, alpha.unsqueeze(-1), beta.unsqueeze(-1))).mean(-1)


@dataclass(frozen=True)
class KumaRecipe:
    """How HardKuma gates are learned.

    Args:
        steps: optimiser steps, one text each.
        lr: peak learning rate of the logarithms of alpha and beta.
        open: share of kv heads that shall be open (32 of 256 in the paper's models).
        seen: share of the text that a closed head sees.
        climb: how fast the multiplier of the bound climbs, per step and share of heads in excess.
    """

    steps: int = 3000
    lr: float = 0.01
    open: float = 0.125
    seen: float = 0.3
    climb: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadArgument("steps", self.steps, "give at least 1")
        for name in ("lr", "climb"):
            if not getattr(self, name) > 0:
                raise BadArgument(name, getattr(self, name), "it must be above 0")
        for name in ("open", "seen"):
            if not 0 < getattr(self, name) <= 1:
                raise BadArgument(name, getattr(self, name), "give a share above 0 and at most 1")


class HardKuma:
    """One HardKuma gate per head, of which `target` shall be open: the expected number of gates above 0 is held there
    by a multiplier that climbs while there are more. The first `always` gates are 1 and count as open.
    """

    def __init__(
        self, heads: int, target: float, always: int, seed: int, device: torch.device, climb: float, stretch: Stretch
    ) -> None:
        self.stretch, self.target, self.always, self.climb = stretch, target, always, climb
        self.logs = torch.zeros(2, heads - always, device=device, requires_grad=True)
        """Logarithms of alpha and beta, which begin at 1."""
        self.generator = torch.Generator().manual_seed(seed)
        self.multiplier = 0.0
        self.drawn = self.draw()

    def parameters(self) -> list[Tensor]:
        return [self.logs]

    def draw(self) -> Tensor:
        u = torch.rand(self.logs.shape[1], generator=self.generator).to(self.logs.device)
        alpha, beta = self.logs.exp()
        z = self.stretch.draw(u, alpha, beta)
        self.drawn = torch.cat([z.new_ones(self.always), z])
        return self.drawn

    def excess(self) -> Tensor:
        """By what share of all heads more than the target are expected to be open."""
        heads = self.always + self.logs.shape[1]
        alpha, beta = self.logs.exp()
        return (self.always + self.stretch.opened(alpha, beta).sum() - self.target) / heads

    def penalty(self) -> Tensor:
        return self.multiplier * self.excess()

    @torch.no_grad()
    def settle(self) -> None:
        self.multiplier = max(0.0, self.multiplier + self.climb * float(self.excess()))

    @torch.no_grad()
    def final(self) -> Tensor:
        alpha, beta = self.logs.detach().double().exp()
        means = self.stretch.mean(alpha, beta).float()
        return torch.cat([means.new_ones(self.always), means])


class HandedDown:
    """What closed heads see in training: in each row the `share` of the text that the last open head above, at the
    same head index, looked at most. Open is a gate drawn above one half.

    Masks are dense, for texts of a few thousand tokens. Each layer remembers what it was given, so it may be run again.

    Args:
        gates: whose draws decide; the first layer's heads are open.
        recent: newest tokens, counted in, that are always seen.
    """

    def __init__(self, shape: ModelShape, layers: tuple[int, ...], gates: HardKuma, share: float, recent: int) -> None:
        self.gates, self.share, self.recent = gates, share, recent
        sizes = [shape.layers[index].num_kv_heads for index in layers]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.own = {index: slice(end - size, end) for index, end, size in zip(layers, ends, sizes, strict=True)}
        self.next = dict(pairwise(layers))
        self.given: dict[int, Tensor] = {}

    def __call__(self, layer: Tapped) -> Tensor:
        index, stores = layer.shape.index, layer.k.shape[1]
        q = layer.q.unflatten(1, (stores, -1))
        logits = (q @ layer.k.unsqueeze(2).transpose(-1, -2)).float() * layer.scale
        if layer.softcap is not None:
            logits = torch.tanh(logits / layer.softcap) * layer.softcap
        n = logits.shape[-1]
        i = torch.arange(n, device=logits.device)
        causal = i <= i[:, None]
        best = self._best(logits.detach().masked_fill(~causal, -torch.inf).softmax(-1).amax(2), causal)
        seen = self.given.get(index, best)
        if index in self.next:
            opened = (self.gates.drawn[self.own[index]].detach() > 0.5).view(1, -1, 1, 1)
            self.given[self.next[index]] = torch.where(opened, best, seen)
        logits = logits.masked_fill(~(seen & causal).unsqueeze(2), -torch.inf)
        if layer.sinks is not None:  # they take mass and give nothing
            logits = torch.cat([logits, layer.sinks.view(1, stores, -1, 1, 1).expand_as(logits[..., :1])], dim=-1)
        weights = logits.softmax(-1)[..., :n].to(layer.v.dtype)
        return (weights @ layer.v.unsqueeze(2)).flatten(1, 2)

    def _best(self, mass: Tensor, causal: Tensor) -> Tensor:
        n = mass.shape[-1]
        i = torch.arange(n, device=mass.device)
        near = causal & (i > i[:, None] - self.recent)
        keep = max(self.recent, math.ceil(self.share * n))
        top = mass.masked_fill(near, torch.inf).masked_fill(~causal, -torch.inf).topk(min(keep, n), dim=-1).indices
        return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, top, True)


def learn_open_heads(
    model: nn.Module,
    examples: Iterable[Example],
    recipe: KumaRecipe,
    *,
    recent: int,
    seed: int = 0,
    stretch: Stretch = Stretch(),
    report: Callable[[int, str], None] | None = None,
) -> Learned:
    """E[z] of every kv head: how much the model needs it to look everywhere, if so many heads may.

    Loss: divergence of the next-token distributions of the gated stream from the unchanged one's, over the label
    tokens, plus the multiplier times the excess of open heads. Both branches of a gate are of the gated stream.

    Raises: as `learn_gates`.
    """
    model = compat.unwrap(model)
    shape = ModelShape.of(model)
    layers = gated_layers(shape)
    heads = sum(layer.num_kv_heads for layer in layers)
    device = next(model.parameters()).device
    always = layers[0].num_kv_heads
    gates = HardKuma(heads, max(always, recipe.open * heads), always, seed, device, recipe.climb, stretch)
    other = HandedDown(shape, tuple(layer.index for layer in layers), gates, recipe.seen, recent)
    head = model.get_output_embeddings()  # type: ignore[operator]

    def divergence(hidden: Tensor, goal: Tensor) -> Tensor:
        got, want = (head(x).float().log_softmax(-1) for x in (hidden, goal))
        return (want.exp() * (want - got)).sum(-1).mean()

    plain = GateRecipe(steps=recipe.steps, lr=recipe.lr, full_term="self")
    return learn_gates(model, examples, other, plain, report, gates, divergence)
