"""ThinK: cached keys lose the channels that the prompt's last queries weigh least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import BadArgument, Refused
from foveate.methods.base import Codec, Method, Needs, Profile, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.channels import Thinned, kept, saved
from foveate.methods.policies.checks import at_least, holds_more
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class ThinK(Method):
    """When the prompt is over, each kv head drops the key channels that matter least for the prompt's last queries; its
    newest keys, all values and whatever is generated stay whole. Dropped channels count as 0 in every q·k; the softmax
    scale stays that of the whole head.

    A channel's score is the norm of its share of the logits, ||Q[:, i]|| · ||K[:, i]|| (section 3.2): the greedy
    optimum if shares of different channels do not cancel. The queries are those of the window, over all query heads of
    the kv head: the released code prunes one copy per query head instead, which costs the group factor in memory. Which
    channels are dropped is decided once. Keys are pruned as stored (rotated), channel by channel.

    Composes with eviction (which comes first) and with one further format, which then packs the channels that are left
    (appendix on KIVI: what leaves its exact tail later loses the same channels).

    Args:
        ratio: share of the channels that is dropped (paper: 0.3 to 0.6; main setting 0.4). A budget replaces it by as
            few channels as meet the budget at the prompt's length.
        recent: newest prompt keys that keep all channels.
        window: prompt queries that weigh the channels.

    Source: 2407.21018, section 3.
    """

    id = "think"
    name = "ThinK"
    paper = "2407.21018"
    slots = frozenset({"format"})
    hands_on = True

    ratio: float = 0.4
    recent: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise BadArgument("ratio", self.ratio, "give a share of channels from 0 to below 1")
        at_least(self, recent=0, window=1)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        if any(layer.latent for layer in shape.layers):
            raise Refused(
                f"{self.id}: {shape.name} caches a latent that serves as key and value (MLA); its channels are no keys'"
            )
        ratio = self._ratio(shape, length)
        return [
            Role("thin", extra={"kept": kept(layer.head_dim, ratio), "dim": layer.head_dim}) for layer in shape.layers
        ]

    def needs(self, role: Role) -> Needs:
        return Needs(window=self.window)

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        left, dim = role.extra["kept"], role.extra["dim"]
        return None if left == dim else Codec(Thinned(left, dim, self.window, self.recent), None)

    def _ratio(self, shape: ModelShape, length: int) -> float:
        budget = Budget.of(self.budget)
        if budget is None:
            return self.ratio
        if budget.whole:
            return 0.0
        granted = budget.share(shape, length)
        widest = max((layer.head_dim for layer in shape.layers if layer.kind == "full"), default=1)
        for dropped in range(widest):
            if self.share(shape, length, dropped / widest) <= granted:
                return dropped / widest
        floor = self.share(shape, length, (widest - 1) / widest)
        because = f"values and {self.recent} keys stay whole"
        raise holds_more(self, floor, length, because, "raise the budget or lower recent")

    def share(self, shape: ModelShape, length: int, ratio: float) -> float:
        """Share of the dense cache that is held at this length."""
        full = [layer for layer in shape.layers if layer.kind == "full"]
        spared = sum(saved(layer, shape.dtype.itemsize, length - self.recent, ratio) for layer in full)
        return 1 - spared / shape.dense_kv_bytes(length)
