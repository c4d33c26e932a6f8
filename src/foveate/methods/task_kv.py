"""Task-KV: heads that say something else than the others hold the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from foveate.cache import View
from foveate.errors import BadArgument, Refused
from foveate.methods.base import BudgetRule, Context, Method, Needs, Profile, Protect, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.apart import distances, granted, head_vectors
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.window import check_window, mean_attention, pooled
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
        return pooled(mean_attention(view, ctx), self.kernel)

    @property
    def rule(self) -> BudgetRule:
        return self._counts

    def _counts(self, scores: Tensor, view: View, total: Tensor, ctx: Context) -> Tensor:
        distance = distances(head_vectors(mean_attention(view, ctx), view.v().float(), self.top)).cpu()
        return granted(distance, view.lengths.cpu(), total, ctx.role.extra["far"], self.sink + self.recent)
