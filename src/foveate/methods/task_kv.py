"""Task-KV: heads that say something else than the others hold the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cache import View
from foveate.errors import BadArgument, Refused
from foveate.methods.base import BudgetRule, Context, Method, Needs, Profile, Protect, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.window import check_window, pooled, window_mass
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class TaskKV(Method):
    """When the prompt is over, each kv head is summed up by the values it attends to most. In every layer the heads
    farthest from the layer's mean, and the one nearest to it, hold all tokens; the others hold the first and the newest
    ones and those that the last queries attend to most. Later tokens are all held.

    The number of far heads is a share of the layer's kv heads in the first layer and goes down on a line to a fixed
    number in the last. A budget that does not reach for all of them fills them in order, the farthest first.

    The paper is silent on grouped queries: here a group's attention is the mean of its query heads'. Two kv heads are
    always equally far from their mean, so in a layer of two the first counts as the far one.

    Args:
        beta: share of far heads in the first layer (paper: 0.3 for Mistral-7B, 0.25 for Llama-2-7B).
        far: number of far heads in the last layer (paper: 1 and 4).
        top: tokens that sum a head up (paper: 256).
        sink, recent: first and newest tokens that every head holds.
        window: last queries whose attention is looked at.
        kernel: width of the average along the keys, odd; 1 is none.

    Without a budget: 0.4 of the cache, as in the paper's tables.
    Source: 2501.15113, section 3.
    """

    id = "task-kv"
    name = "Task-KV"
    paper = "2501.15113"
    slots = frozenset({"keep"})

    beta: float = 0.3
    far: int = 1
    top: int = 256
    sink: int = 16
    recent: int = 256
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.kernel)
        if not 0 <= self.beta <= 1:
            raise BadArgument("beta", self.beta, "give a share of heads from 0 to 1")
        at_least(self, far=0, top=1, sink=0, recent=1)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        roles = [Role() for _ in shape.layers]
        managed = [layer for layer in shape.layers if layer.kind == "full"]
        if any(layer.latent for layer in managed):
            raise Refused(
                f"{self.id}: {shape.name} caches one latent vector for all heads (MLA), so no head can hold more"
            )
        for rank, layer in enumerate(managed):
            first = layer.num_kv_heads * self.beta
            count = round(first - (first - self.far) * rank / max(1, len(managed) - 1))
            roles[layer.index] = Role("task", extra={"far": min(max(count, 0), layer.num_kv_heads)})
        return roles

    def needs(self, role: Role) -> Needs:
        return Needs(window=self.window)

    @property
    def protect(self) -> Protect:
        return Protect(self.sink, self.recent)

    def total(self, shape: ModelShape, length: int) -> int:
        budget = Budget.of(self.budget) or Budget.ratio(0.4)
        return budget.held_tokens(shape, length, name=self.id, floor=self.sink + self.recent)

    def score(self, view: View, ctx: Context) -> Tensor:
        return pooled(self._attention(view, ctx), self.kernel)

    @property
    def rule(self) -> BudgetRule:
        return self._counts

    def _counts(self, scores: Tensor, view: View, total: Tensor, ctx: Context) -> Tensor:
        distance = distances(head_vectors(self._attention(view, ctx), view.v().float(), self.top)).cpu()
        lengths = view.lengths.cpu()
        counts = torch.zeros_like(lengths, dtype=torch.int64)
        for row, grant in enumerate(total.tolist()):
            whole = full_heads(distance[row], ctx.role.extra["far"])
            counts[row] = torch.tensor(divided(lengths[row].tolist(), grant, self.sink + self.recent, whole))
        return counts

    def _attention(self, view: View, ctx: Context) -> Tensor:
        """Mean attention of the window's queries, and of a group's heads, to each token: [B, Hs, C]."""
        mass, inside = window_mass(view, ctx)
        assert ctx.window_valid is not None
        queries = ctx.window_valid.sum(1).clamp_min(1).view(-1, 1, 1)
        return mass.unflatten(1, (inside.shape[1], -1)).mean(2) / queries


def head_vectors(attention: Tensor, v: Tensor, top: int) -> Tensor:
    """Values [B, Hs, C, D] of each head's `top` most attended tokens, weighted by their attention: [B, Hs, D]."""
    weight, slot = attention.topk(min(top, attention.shape[-1]), dim=-1)
    values = v.gather(2, slot.unsqueeze(-1).expand(*slot.shape, v.shape[-1]))
    return (weight.unsqueeze(-1) * values).sum(2)


def distances(vectors: Tensor) -> Tensor:
    """How far each head's vector lies from the mean of its layer's: [B, Hs] of [B, Hs, D]."""
    if vectors.shape[1] == 2:  # equally far, which rounding must not decide
        return (vectors[:, 0] - vectors[:, 1]).norm(dim=-1, keepdim=True).expand(-1, 2) / 2
    return (vectors - vectors.mean(1, keepdim=True)).norm(dim=-1)


def full_heads(distance: Tensor, far: int) -> list[int]:
    """The `far` heads of the largest distances, in order, then the one of the smallest; among equals the first."""
    found = distance.argsort(descending=True, stable=True).tolist()[:far]
    nearest = int(distance.argmin())
    return found if nearest in found else [*found, nearest]


def divided(lengths: Sequence[int], average: int, least: int, whole: Sequence[int]) -> list[int]:
    """Tokens per head, len(lengths) * average in all or whatever there is: `least` for each, then everything for the
    heads in `whole`, one after the other, as far as it reaches, then equal parts for the rest."""
    found = [min(least, length) for length in lengths]
    spare = len(lengths) * average - sum(found)
    for head in whole:
        given = min(spare, lengths[head] - found[head])
        found[head] += given
        spare -= given
    rest = [head for head in range(len(lengths)) if head not in whole]
    for number, head in enumerate(rest):
        given = min(-(-spare // (len(rest) - number)), lengths[head] - found[head])
        found[head] += given
        spare -= given
    return found
