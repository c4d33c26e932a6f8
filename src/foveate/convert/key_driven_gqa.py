"""Key-driven grouped queries: strong key heads get many query heads, weak ones few (arXiv 2408.08454)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.head_maps import check_heads, heads_for, install, layers_of
from foveate.convert.surgery.replay import hidden_states
from foveate.errors import BadArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foveate.models.shape import ModelShape
    from foveate.models.weights import HeadWeights

RULES = ("kdgqa", "dgqa-diff", "dgqa-ema", "pgqa")


@register
@dataclass(frozen=True)
class KeyDrivenGQA(Conversion):
    """Key and value heads are averaged over contiguous groups; query heads are then dealt out by the size of the keys.

    The size of a key head is the sum over batches of the Frobenius norm of its keys. In the paper the groups follow it
    in every forward; a decoder needs them fixed, since its cache holds keys of the past, so they are taken from the
    calibration text, read once, each batch a step. What the paper repairs by chance is decided by the largest
    remainder. A key-value head that gets no query head is dropped. The paper trains afterwards, and without that the
    model is lost wherever groups are not those that were averaged.

    Args:
        rule: "kdgqa", shares by the sizes, the least one subtracted (which leaves the weakest head without queries);
            "dgqa-diff", by how far sizes moved from those that were remembered; "dgqa-ema", by 0.9 of the sizes and 0.1
            of those remembered; "pgqa", equal groups, and noise in training.
        kv_heads: key-value heads; None: half of them.
        kv: share of the cache to keep, instead of kv_heads.
        window: batches between two updates of what is remembered.
        noise: of "pgqa", in shares of what heads return.
    """

    id: ClassVar[str] = "key-driven-gqa"
    what: ClassVar[str] = "grouped queries whose groups are as large as their key head is strong"

    rule: Literal["kdgqa", "dgqa-diff", "dgqa-ema", "pgqa"] = "kdgqa"
    kv_heads: int | None = None
    kv: float | None = None
    window: int = 300
    noise: float = 1.0

    def number(self, kv_heads: int) -> int:
        """Key-value heads that stay of these many.

        Raises:
            BadArgument: a number that does not divide them.
        """
        if self.kv is not None and self.kv_heads is not None:
            raise BadArgument("kv", self.kv, "give kv or kv_heads, not both")
        left = heads_for(self.kv, kv_heads) if self.kv is not None else self.kv_heads or max(1, kv_heads // 2)
        if not 1 <= left <= kv_heads or kv_heads % left:
            name, value = ("kv", self.kv) if self.kv is not None else ("kv_heads", left)
            raise BadArgument(name, value, f"give a number of heads that divides the model's {kv_heads}")
        return left

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_heads(model)
        if self.rule not in RULES:
            raise BadArgument("rule", self.rule, f"give one of {', '.join(RULES)}")
        if self.window < 1:
            raise BadArgument("window", self.window, "give at least 1")
        for layer in shape.layers:
            self.number(layer.num_kv_heads)

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        layers, exact = {}, True
        for index, weights in layers_of(model):
            left = self.number(len(weights.k))
            exact = exact and left == len(weights.k)
            layers[index] = pooled(weights, left)
        sizes = key_sizes(model, layers, calibration)
        groups = []
        for index, weights in layers.items():
            heads = len(weights.q)
            uniform = [heads // len(weights.k)] * len(weights.k)
            counts = uniform if self.rule == "pgqa" else self._counts(sizes[index], heads)
            key_map = [j for j, count in enumerate(counts) for _ in range(count)]
            more = {"noise": self.noise} if self.rule == "pgqa" else {}
            install(model, index, weights, key_map, key_map, **more)
            groups.append(counts)
            exact = exact and counts == uniform
        yield Stage("query heads dealt out", exact, {"groups": groups})

    def _counts(self, sizes: Tensor, heads: int) -> list[int]:
        if self.rule == "kdgqa":
            whole = sizes.sum(0)
            return shares(whole - whole.min(), heads)
        return shares(dynamics(sizes, self.rule, self.window), heads)


def pooled(weights: HeadWeights, left: int) -> HeadWeights:
    """Key and value heads averaged over contiguous groups."""
    changes = {}
    for name in ("k", "v", "k_bias", "v_bias"):
        rows = getattr(weights, name)
        if rows is not None:
            changes[name] = rows.unflatten(0, (left, -1)).mean(1)
    return with_changes(weights, **changes)


def shares(strength: Tensor, heads: int) -> list[int]:
    """`heads` query heads dealt out in proportion to strength [n], by the largest remainder.

    Evenly where all are equal, be it up to rounding.
    """
    count = len(strength)
    total = float(strength.sum())
    if total <= 1e-9 * max(1.0, float(strength.abs().max())) or float(strength.max() - strength.min()) <= 1e-9 * total:
        return [heads // count + (j < heads % count) for j in range(count)]
    exact = strength.double() / strength.double().sum() * heads
    dealt = exact.floor()
    order = sorted(range(count), key=lambda j: (float(dealt[j] - exact[j]), j))
    dealt = [int(x) for x in dealt]
    for j in order[: heads - sum(dealt)]:
        dealt[j] += 1
    return dealt


def dynamics(sizes: Tensor, rule: str, window: int) -> Tensor:
    """Strengths [n] after these sizes [steps, n] were seen one after the other.

    Every `window` steps what was seen since is mixed into what is remembered, (remembered + seen) / window as in the
    released code.
    """
    remembered = sizes[0].clone()
    strength = sizes[0].clone()
    for start in range(0, len(sizes), window):
        seen = sizes[start : start + window].sum(0)
        strength = (remembered - seen).abs() if rule == "dgqa-diff" else 0.9 * seen + 0.1 * remembered
        remembered = (remembered + seen) / window
    return strength


def key_sizes(model: PreTrainedModel, layers: dict[int, HeadWeights], calibration: Calibration) -> dict[int, Tensor]:
    """By layer, for each batch the norm of each head's keys over its tokens and dims, [batches, heads]."""
    calibration.watch("measuring keys")
    found: dict[int, list[Tensor]] = {index: [] for index in layers}
    for index, x in hidden_states(model, calibration.batches()):
        weights = layers[index]
        keys = x.double().flatten(0, -2) @ weights.k.flatten(0, 1).T
        keys = keys.unflatten(-1, weights.k.shape[:2])
        if weights.k_bias is not None:
            keys = keys + weights.k_bias
        if weights.k_norm is not None:
            keys = keys * torch.rsqrt(keys.square().mean(-1, keepdim=True) + weights.norm_eps) * weights.k_norm
        found[index].append(keys.square().sum((0, 2)).sqrt())
    return {index: torch.stack(rows) for index, rows in found.items()}
