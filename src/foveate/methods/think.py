"""ThinK: cached keys lose the channels that the prompt's last queries weigh least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cache import Observed
from foveate.errors import BadArgument, Refused
from foveate.methods.base import Codec, Method, Needs, Profile, Role, register
from foveate.methods.budget import PAIR_BYTES, Budget
from foveate.methods.policies.checks import at_least, holds_more
from foveate.models.shape import LayerShape, ModelShape

INDEX = torch.int16
"""What a kept channel is named by."""


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
            Role("thin", extra={"kept": _kept(layer.head_dim, ratio), "dim": layer.head_dim}) for layer in shape.layers
        ]

    def needs(self, role: Role) -> Needs:
        return Needs(window=self.window)

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        kept, dim = role.extra["kept"], role.extra["dim"]
        return None if kept == dim else Codec(Thinned(kept, dim, self.window, self.recent), None)

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
        saved = sum(self._saved(layer, shape.dtype.itemsize, length, ratio) for layer in full)
        return 1 - saved / shape.dense_kv_bytes(length)

    def _saved(self, layer: LayerShape, itemsize: int, length: int, ratio: float) -> int:
        kept = _kept(layer.head_dim, ratio)
        packed = max(0, length - self.recent)
        if kept == layer.head_dim:
            return 0
        lost = kept * INDEX.itemsize + PAIR_BYTES
        return layer.store_heads * (packed * (layer.head_dim - kept) * itemsize - lost)


def _kept(dim: int, ratio: float) -> int:
    return max(1, dim - int(ratio * dim + 1e-9))


@dataclass(frozen=True)
class Thinned:
    """Keys with `kept` channels of each pair, chosen when the prompt is over; `tail` newest ones stay whole."""

    kept: int
    dim: int
    window: int
    tail: int
    flush: int = 0
    unit: int = 1

    def fit(self, x: Tensor, lengths: Tensor, observed: Observed | None) -> tuple[Tensor, ...]:
        """The channels to keep, [P, kept], ascending."""
        assert observed is not None, "channels are weighed by Needs(window=...)"
        q = observed.q[:, :, -self.window :].float()
        q = q * observed.real[:, None, -self.window :, None]
        there = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        k = x.float().masked_fill(~there.unsqueeze(-1), 0.0)
        energy = q.square().sum((1, 2)) * k.square().sum(1)
        order = energy.argsort(dim=-1, descending=True, stable=True)[:, : self.kept]
        return (order.sort(dim=-1).values.to(INDEX),)

    def channels(self, *fitted: Tensor) -> Tensor:
        """Which channels the packed tensor holds, [P, kept]."""
        return fitted[0]

    def pack(self, x: Tensor, *fitted: Tensor) -> tuple[Tensor, ...]:
        """[P, n, D] -> ([P, n, kept],)."""
        return (x.gather(2, self._index(fitted, x.shape[1])),)

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype, *fitted: Tensor) -> Tensor:
        (x,) = packed
        whole = x.new_zeros(*x.shape[:2], self.dim, dtype=dtype)
        return whole.scatter_(2, self._index(fitted, x.shape[1]), x.to(dtype))

    def _index(self, fitted: tuple[Tensor, ...], tokens: int) -> Tensor:
        return fitted[0].long().unsqueeze(1).expand(-1, tokens, -1)
