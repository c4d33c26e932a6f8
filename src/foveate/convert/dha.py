"""Decoupled heads: similar key heads and similar value heads are fused, each layer as far as it can bear (DHA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveate.attention.request import grouped
from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.head_fusion import Fused, common, fuse, key_costs
from foveate.convert.surgery.head_groups import Path, allocate, gram, key_grams, loss_curvature, mean_path, merge_path
from foveate.convert.surgery.head_maps import check_heads, install, layers_of
from foveate.convert.surgery.head_merge import merge, root, second, with_bias
from foveate.convert.surgery.replay import Replay, refit_all
from foveate.errors import BadArgument
from foveate.heads.moments import Moments
from foveate.models.converted import decoder_layers
from foveate.models.weights import HeadWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True)
class DHA(Conversion):
    """DHA (arXiv 2406.06567): numbers of key and value heads and who reads them, for each layer.

    Search: heads are merged pairwise where that costs least, keys and values apart, and heads are left where they are
    worth most, so that a share `kv` of all is left. A cost is the error of the merged heads weighted by the curvature
    of the loss, so that layers, keys and values compare. The paper finds the costs by training (some 240 steps); here
    they are computed from one reading of the calibration text, backwards included.

    Fusion: inside a group each head is replaced by a combination of the group's heads, which starts as itself; a
    distance of the combinations from what the group has in common is driven to 0 by an augmented Lagrangian while the
    layer is trained, and then each group is one head (`surgery.head_fusion`). What a group has in common are its
    principal components, after its heads were turned towards each other (`surgery.head_merge`), which queries and
    output matrix take back. Where the paper trains the whole model on the loss of the next token, layers are trained
    here, first to last, to return what the original layer returns for the same hidden states, which a short text is
    enough for. Without steps the principal components themselves are the common heads. At the end each layer's output
    matrix is solved for anew.

    Args:
        kv: share of the cache to keep.
        steps: of training, for each layer, one sequence of the calibration text each; 0: none.
        lr: of the combinations; the weights' own is `weight_lr`.
        refit: whether output matrices are solved for anew.
        aligned: False averages heads as they are (mean pooling).
    """

    id: ClassVar[str] = "dha"
    what: ClassVar[str] = "fuse similar key heads and similar value heads, each layer as far as it can bear"

    kv: float = 0.5
    steps: int = 128
    lr: float = 2e-3
    weight_lr: float = 3e-3
    refit: bool = True
    aligned: bool = True

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_heads(model)
        if self.steps < 0:
            raise BadArgument("steps", self.steps, "give 0 or more")
        heads = [layer.num_kv_heads for layer in shape.layers]
        if not len(heads) / sum(heads) <= self.kv <= 1:
            floor = len(heads) / sum(heads)
            raise BadArgument("kv", self.kv, f"give {floor:.4g} (one key and one value head in each layer) up to 1")

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        moments, weights = calibration.inputs(model), dict(layers_of(model))
        given = {index: layer.self_attn for index, layer in enumerate(decoder_layers(model))}
        for index, layer in weights.items():
            install(model, index, layer)
        calibration.watch("finding similar heads")
        costs = loss_curvature(model, calibration.batches())
        paths = {key: path_of(weights[key[0]], moments[key[0]], key[1], cost) for key, cost in costs.items()}
        left = allocate(paths, int(2 * self.kv * sum(len(layer.k) for layer in weights.values()) + 1e-9))
        groups = {key: paths[key].groups[count] for key, count in left.items()}
        facts = {f"{part}_heads": [left[index, part] for index in weights] for part in "kv"}
        yield Stage("head by head", True, facts)

        given = {i: module for i, module in given.items() if left[i, "k"] + left[i, "v"] < 2 * len(weights[i].k)}
        reads = {key: reads_of(groups[key], len(weights[key[0]].q)) for key in groups}
        if self.steps and given:
            calibration.watch("fusing heads")
            fused = self._fused(model, given, weights, moments, costs, groups, calibration)
            facts = {
                "fusion_loss": [list(fused[i].apart) for i in given],
                "missed": [list(fused[i].missed) for i in given],
            }
            yield Stage("heads fused", False, facts)
            for i in given:
                install(model, i, fused[i].weights, reads[i, "k"], reads[i, "v"])
        else:
            for i in given:
                metrics = costs[i, "v"].repeat_interleave(weights[i].groups, 0)
                keys = merge(weights[i], moments[i], "k", reads[i, "k"], aligned=self.aligned)
                values = merge(weights[i], moments[i], "v", reads[i, "v"], metrics, aligned=self.aligned)
                layer = with_changes(keys, v=values.v, v_bias=values.v_bias, o=values.o)
                install(model, i, layer, reads[i, "k"], reads[i, "v"])
        yield Stage("one head for each group", bool(self.steps) or not given)
        if self.refit and given:
            calibration.watch("solving for output matrices")
            yield Stage("output matrices", False, {"missed": refit_all(model, given, calibration.batches())})

    def _fused(
        self,
        model: PreTrainedModel,
        given: Mapping[int, Any],
        weights: Mapping[int, HeadWeights],
        moments: Mapping[int, Moments],
        costs: Mapping[tuple[int, str], Tensor],
        groups: Mapping[tuple[int, str], Sequence[Sequence[int]]],
        calibration: Calibration,
    ) -> dict[int, Fused]:
        """Layers fused first to last, each on what the fused layers before it return."""
        replay, found = Replay(model, calibration.tokens.split(1)), {}
        for index, layer in enumerate(decoder_layers(model)):
            if index in given:
                calibration.watch(f"fusing the heads of layer {index}")
                key = key_costs(weights[index], moments[index])
                value = costs[index, "v"] * weights[index].groups
                keys, values = (
                    [common(weights[index], moments[index], part, g, cost, self.aligned) for g in groups[index, part]]
                    for part, cost in (("k", key), ("v", value))
                )
                calls = replay.calls(index)
                found[index] = fuse(
                    layer.self_attn, given[index], calls, keys, values, self.steps, self.lr, self.weight_lr
                )
            replay.step(index)
        return found


def path_of(weights: HeadWeights, moments: Moments, part: str, curvature: Tensor) -> Path:
    """How the key or value heads of a layer are merged, with costs in units of the loss.

    Args:
        curvature: [heads, dim, dim] (see `loss_curvature`).
    """
    s = second(moments)
    rows = with_bias(getattr(weights, part), getattr(weights, f"{part}_bias"))
    if part == "v":
        return merge_path([gram((root(curvature) @ rows)[None], s)])
    cost = curvature.diagonal(dim1=-2, dim2=-1)
    if weights.k_norm is not None:
        # Nothing can be turned behind a norm: each head is one vector, and what two have in common is their mean.
        return mean_path((cost.sqrt()[..., None] * rows).flatten(1), s)
    half = weights.rotary_dim // 2
    pair = (cost[:, :half] + cost[:, half : 2 * half]) / 2
    cost = torch.cat([pair, pair, cost[:, 2 * half :]], dim=1)
    return merge_path(key_grams(rows, s, cost, weights.rotary_dim))


def reads_of(groups: Sequence[Sequence[int]], heads: int) -> tuple[int, ...]:
    """The new head that each query head reads, where it read one of a group in contiguous groups."""
    count = sum(len(group) for group in groups)
    home = {j: new for new, group in enumerate(groups) for j in group}
    return tuple(home[h] for h in grouped(heads, count))
