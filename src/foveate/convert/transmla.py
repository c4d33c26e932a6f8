"""TransMLA: models with grouped heads as latent attention (MLA), by weights and the statistics of some text alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveate.compat import is_latent, rotary_factor
from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.joint_rank import balanced, cut, cut_queries
from foveate.convert.surgery.latent_layer import put_latent
from foveate.convert.surgery.latent_norms import fit_norms
from foveate.convert.surgery.rorope import JointKeys, concentrated, divided, leading, lifted, whole
from foveate.errors import BadArgument, Infeasible, Refused
from foveate.models.converted import decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import HeadWeights, LatentWeights, read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOOK = 8
"""Sequences of the calibration text on which values of freqfold are compared."""


@register
@dataclass(frozen=True)
class TransMLA(Conversion):
    """TransMLA (2502.07864): lift to one latent key, RoRoPE, FreqFold and partial RoPE, balance, joint low rank.

    The result is DeepSeek's layout: one latent of `rank` and one rotated key of `rope_dim` per token and layer.

    Args:
        kv: share of the dense cache's bytes per token that the latent and the rotated key take; sets the rank.
        rank: of the latent; None: from kv. The paper has 512 beside 64 rotated dims.
        rope_dim: rotated dims, an even divisor of the head size D; None: the largest one up to 64 (the paper's) and to
            D / 2 that takes at most a third of what is held. Of the model's frequencies every (D / rope_dim)-th stays.
        freqfold: neighbouring frequencies treated as one, a multiple or divisor of D / rope_dim that divides D / 2;
            "auto" begins at D / rope_dim and doubles while the perplexity of the model with partial RoPE falls, on up
            to 8 sequences of the calibration text, as the paper does it.
        rorope: False only sorts pairs by energy instead of turning them, to compare with.
        balance: size of keys without a position over that of values before the joint low rank; None leaves them.
        q_rank: of the queries' own latent; None: one matrix.
        norm: fit norms to the latents, which DeepSeek's have; without it they are left as they are.
    """

    id: ClassVar[str] = "transmla"
    what: ClassVar[str] = "grouped-query attention to MLA in DeepSeek's layout, without training (TransMLA)"

    kv: float = 0.25
    rank: int | None = None
    rope_dim: int | None = None
    freqfold: int | str = "auto"
    rorope: bool = True
    balance: float | None = 1.0
    q_rank: int | None = None
    norm: bool = False

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        w = _same(model, shape)
        groups, dim = w.k.shape[:2]
        _, rope_dim = self.sizes(groups, dim, w.v.shape[1])
        if self.freqfold != "auto":
            fold, collapse = self.freqfold, dim // rope_dim
            if not isinstance(fold, int) or fold < 1 or dim // 2 % fold or (fold % collapse and collapse % fold):
                mend = f'give "auto" or a divisor of {dim // 2} that is a multiple or a divisor of {collapse}'
                raise BadArgument("freqfold", fold, mend)
        if self.balance is not None and self.balance <= 0:
            raise BadArgument("balance", self.balance, "give more than 0, or None")
        width = w.q.shape[0] * (rope_dim + (dim if groups * dim > rope_dim else 0))
        most = min(width, w.q.shape[2] + (w.q_bias is not None))  # a bias is one more direction
        if self.q_rank is not None and not 1 <= self.q_rank <= most:
            raise BadArgument("q_rank", self.q_rank, f"give 1 to {most}")

    def sizes(self, groups: int, dim: int, v_dim: int) -> tuple[int, int]:
        """Rank and rotated dims for a layer of `groups` key heads of `dim` and value heads of `v_dim`.

        Raises:
            BadArgument, Infeasible: what was asked for cannot be had.
        """
        dense = groups * (dim + v_dim)
        if self.rank is None and not 0 < self.kv <= 1:
            raise BadArgument("kv", self.kv, "give a share above 0, up to 1")
        granted = int(self.kv * dense + 1e-9) if self.rank is None else self.rank
        rope_dim = self.rope_dim
        if rope_dim is None:
            fits = granted // 3 if self.rank is None else granted // 2
            rope_dim = max((d for d in range(2, min(dim // 2, 64) + 1, 2) if dim % d == 0 and d <= fits), default=2)
        if rope_dim < 2 or rope_dim % 2 or dim % rope_dim:
            raise BadArgument("rope_dim", rope_dim, f"give an even divisor of the head size {dim}")
        if self.rank is None and granted <= rope_dim:
            floor = (rope_dim + 1) / dense
            raise Infeasible(f"kv={self.kv}: {rope_dim} rotated dims and a latent of 1 take {floor:.4f}", floor)
        rank = granted - rope_dim if self.rank is None else self.rank
        if not 1 <= rank <= dense - rope_dim:
            raise BadArgument("rank", rank, f"give 1 to {dense - rope_dim}, beside {rope_dim} rotated dims")
        return rank, rope_dim

    @torch.no_grad()
    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        inputs = calibration.inputs(model)
        factor = rotary_factor(model)
        keys = [lifted(read_heads(layer.self_attn)) for layer in decoder_layers(model)]
        groups, dim, v_dim = (*keys[0].heads.k.shape[:2], keys[0].heads.v.shape[1])
        rank, rope_dim = self.sizes(groups, dim, v_dim)
        nope = groups * dim - rope_dim

        _put(model, keys, [whole(each) for each in keys], [each.frequencies for each in keys])
        yield Stage("lift", True, {"latent": groups * v_dim, "rope_dim": groups * dim})

        if self.rorope:
            turned = [concentrated(each, inputs[index]) for index, each in enumerate(keys)]
            _put(model, keys, [whole(each) for each in turned], [each.frequencies for each in turned])
            first = [each.energy(inputs[index]).view(dim // 2, -1).sum(0) for index, each in enumerate(turned)]
            yield Stage("rorope", True, {"energy": [float(head[0] / head.sum()) for head in first]})

        def partial(fold: int) -> tuple[list[LatentWeights], list[Tensor], list[float]]:
            weights, frequencies, energy = [], [], []
            for index, each in enumerate(keys):
                turned = concentrated(each, inputs[index], fold, self.rorope)
                kept, chosen = leading(turned, rope_dim, fold, self.rorope)
                share = turned.energy(inputs[index])
                energy.append(float(share[kept].sum() / share.sum()))
                weights.append(divided(turned, kept, factor))
                frequencies.append(chosen)
            _put(model, keys, weights, frequencies)
            return weights, frequencies, energy

        facts: dict[str, Any] = {"rope_dim": rope_dim}
        fold = self.freqfold
        if not isinstance(fold, int):
            fold, facts["tried"] = _fold(model, calibration, partial, dim // rope_dim, dim // 2)
        weights, frequencies, facts["energy"] = partial(fold)
        yield Stage("partial rope", False, facts | {"freqfold": fold})

        if self.balance is not None:
            pairs = [balanced(w, inputs[index], nope, self.balance) for index, w in enumerate(weights)]
            weights = [w for w, _ in pairs]
            _put(model, keys, weights, frequencies)
            yield Stage("balance", True, {"factor": [factor for _, factor in pairs]})

        cuts = [cut(w, inputs[index], nope, rank) for index, w in enumerate(weights)]
        weights = [each.weights for each in cuts]
        _put(model, keys, weights, frequencies)
        kept = {name: [getattr(each, name) for each in cuts] for name in ("energy", "keys", "values")}
        yield Stage("low rank", False, {"rank": rank, **kept})

        if self.q_rank is not None:
            fewer = [cut_queries(w, inputs[index], self.q_rank) for index, w in enumerate(weights)]
            _put(model, keys, [w for w, _ in fewer], frequencies)
            yield Stage("query rank", False, {"rank": self.q_rank, "energy": [share for _, share in fewer]})

        if self.norm:
            stage = fit_norms(model, calibration.batches())
            assert stage is not None
            yield stage


def _same(model: PreTrainedModel, shape: ModelShape) -> HeadWeights:
    """The weights of the first layer, whose geometry all others have.

    Raises:
        Refused: attention that cannot be lifted.
    """
    found = {}
    for layer in decoder_layers(model):
        module: Any = layer.self_attn
        if is_latent(module):
            raise Refused(f"{shape.name} has latent attention (MLA) already")
        w = read_heads(module)
        if w.q_norm is not None or w.k_norm is not None:
            raise Refused(
                f"{shape.name} norms each head's queries and keys, which turning heads into one does not keep"
            )
        if w.rotary_dim != w.k.shape[1]:
            raise Refused(f"{shape.name} rotates {w.rotary_dim} of {w.k.shape[1]} dims of a head; transmla needs all")
        found.setdefault((w.q.shape[0], w.k.shape[:2], w.v.shape[1]), w)
    if len(found) > 1:
        raise Refused(f"{shape.name} has layers with different numbers or sizes of heads")
    return next(iter(found.values()))


def _put(
    model: PreTrainedModel, keys: list[JointKeys], weights: list[LatentWeights], frequencies: list[Tensor]
) -> None:
    """Give every layer these weights."""
    for index, (each, w, pairs) in enumerate(zip(keys, weights, frequencies, strict=True)):
        put_latent(model, index, w, pairs.tolist(), each.heads.softcap, each.heads.window)


def _fold(
    model: PreTrainedModel, calibration: Calibration, partial: Callable[[int], Any], first: int, most: int
) -> tuple[int, dict[str, float]]:
    """The first freqfold whose double has no lower perplexity, and the perplexities seen."""
    tried: dict[str, float] = {}
    best, fold = first, first
    while fold <= most and most % fold == 0:
        calibration.watch(f"trying freqfold {fold}")
        partial(fold)
        tried[str(fold)] = _perplexity(model, calibration)
        if tried[str(fold)] > tried[str(best)]:
            break
        best, fold = fold, 2 * fold
    return best, tried


def _perplexity(model: Any, calibration: Calibration) -> float:
    loss, count = 0.0, 0
    for ids in calibration.tokens[:_LOOK].split(calibration.batch):
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(min(loss / max(count, 1), 700.0))
