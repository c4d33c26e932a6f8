"""Different numbers of key and value heads from a checkpoint (DiffQKV, Sigma, arXiv 2501.13629)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING, ClassVar

import torch

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.head_maps import check_heads, floor_map, install, layers_of, read
from foveate.convert.surgery.head_merge import key_weights, merge, second, with_bias
from foveate.convert.surgery.replay import refit_all
from foveate.errors import BadArgument
from foveate.heads.moments import Moments
from foveate.models.converted import decoder_layers, replace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foveate.layers.head_mapped import HeadMappedAttention
    from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True)
class DiffQKV(Conversion):
    """Few key heads, more value heads, and if wanted queries through two matrices.

    Query head h reads key head floor(h * k_heads / H) and value head floor(h * v_heads / H) (section 2.1). The paper
    pre-trains; here the heads that come to be read as one are merged (`surgery.head_merge`), and each layer's
    output matrix is solved for anew on the calibration text. Equal numbers of key and value heads make plain GQA.

    Two options of the paper that its models do not take: keys cached in fewer dims than they are read in, and steps
    that read few values. A layer with either, or with different numbers of key and value heads, is held by
    transformers' own cache, and Foveate's methods leave it alone.

    Args:
        k_heads, v_heads: heads that stay; None: the share `kv` of all, one key head for four value heads as in the
            paper's models as far as there are so many.
        kv: share of the cache to keep where not both numbers are given.
        k_dim: numbers that are cached of each key, half of the head's in the paper: the principal components of the
            keys without position, each dim weighed by the queries that meet it. None: all.
        top_values: a generated token reads the values of this many keys alone, in each head those of the highest
            scores; the paper's is 100. The ladder reads whole texts, where it changes nothing. None: all values.
        query_width: width between the two matrices of augmented queries, the paper's is 1.5 times the hidden size; at
            least the rank of W_q, so that the conversion itself changes nothing. None: one matrix.
        aligned: False averages heads as they are, as GQA does when it is made of MHA.
        refit: whether output matrices are solved for anew.
    """

    id: ClassVar[str] = "diffqkv"
    what: ClassVar[str] = "few key heads, more value heads, queries through two matrices if wanted"

    k_heads: int | None = None
    v_heads: int | None = None
    kv: float = 0.5
    k_dim: int | None = None
    top_values: int | None = None
    query_width: int | None = None
    aligned: bool = True
    refit: bool = True

    def numbers(self, kv_heads: int, head_dim: int | None = None) -> tuple[int, int]:
        """Key and value heads that stay of these many.

        Args:
            head_dim: of keys, of which `k_dim` are cached; None: all are.

        Raises:
            BadArgument: more heads than there are, or a share that leaves less than one of each.
        """
        for name, value in (("k_heads", self.k_heads), ("v_heads", self.v_heads)):
            if value is not None and not 1 <= value <= kv_heads:
                raise BadArgument(name, value, f"the model has {kv_heads} key-value heads")
        if self.k_heads is not None and self.v_heads is not None:
            return self.k_heads, self.v_heads
        key = 1.0 if self.k_dim is None or head_dim is None else self.k_dim / head_dim  # what a key head costs
        units = self.kv * 2 * kv_heads + 1e-9
        if not 1 + key <= units <= 2 * kv_heads + 1e-6:
            least = (1 + key) / (2 * kv_heads)
            raise BadArgument("kv", self.kv, f"give {least:.4g} (one key and one value head of {kv_heads}) up to 1")
        if self.k_heads is not None:
            keys = self.k_heads
        elif self.v_heads is not None:
            keys = min(kv_heads, int((units - self.v_heads) / key))
        else:
            keys = min(kv_heads, max(int(units / (4 + key)), math.ceil((units - kv_heads - 1e-6) / key), 1))
        values = min(kv_heads, int(units - keys * key)) if self.v_heads is None else self.v_heads
        if self.k_heads is None:  # what is left of a whole value head
            keys = min(kv_heads, int((units - values) / key))
        if min(keys, values) < 1 or keys * key + values > units:
            raise BadArgument("kv", self.kv, f"it comes to {keys} key and {values} value heads of {kv_heads}")
        return keys, values

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_heads(model)
        if self.top_values is not None and self.top_values < 1:
            raise BadArgument("top_values", self.top_values, "give at least 1")
        for layer in shape.layers:
            if self.k_dim is not None and not 1 <= self.k_dim <= layer.head_dim:
                raise BadArgument("k_dim", self.k_dim, f"give 1 to {layer.head_dim}, the dims of a head")
            self.numbers(layer.num_kv_heads, layer.head_dim)
            least = min(shape.hidden_size, layer.num_heads * layer.head_dim)
            if self.query_width is not None and self.query_width < least:
                raise BadArgument("query_width", self.query_width, f"give at least {least}, the rank that W_q may have")

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        moments = calibration.inputs(model)
        given, kept, merged = {}, [], False
        for index, weights in layers_of(model):
            heads, kv_heads = weights.q.shape[0], weights.k.shape[0]
            k_heads, v_heads = self.numbers(kv_heads, weights.k.shape[1])
            key_map, value_map = floor_map(heads, k_heads), floor_map(heads, v_heads)
            keys = merge(weights, moments[index], "k", key_map, aligned=self.aligned)
            values = merge(weights, moments[index], "v", value_map, aligned=self.aligned)
            fewer = self.k_dim is not None and self.k_dim < weights.k.shape[1]
            if k_heads < kv_heads or v_heads < kv_heads or fewer:
                given[index] = decoder_layers(model)[index].self_attn
            changed = with_changes(keys, v=values.v, v_bias=values.v_bias, o=values.o)
            install(model, index, changed, key_map, value_map, top_values=self.top_values)
            kept.append([k_heads, v_heads])
            merged = merged or k_heads < kv_heads or v_heads < kv_heads
        yield Stage("fewer key and value heads", not merged, {"heads": kept})
        if self.k_dim is not None:
            whole = [layer.self_attn.head_dim <= self.k_dim for layer in decoder_layers(model)]
            energy = [
                narrowed(model, layer.self_attn, moments[i], self.k_dim)
                for i, layer in enumerate(decoder_layers(model))
            ]
            yield Stage("keys in fewer dims", all(whole), {"k_dim": self.k_dim, "energy": energy})
        if self.refit and given:
            calibration.watch("solving for output matrices")
            yield Stage("output matrices", False, {"missed": refit_all(model, given, calibration.batches())})
        if self.query_width is not None:
            for layer in decoder_layers(model):
                augmented(model, layer.self_attn, self.query_width)
            yield Stage("queries through two matrices", True, {"query_width": self.query_width})


@torch.no_grad()
def augmented(model: PreTrainedModel, module: HeadMappedAttention, width: int) -> HeadMappedAttention:
    """The same layer with its query matrix as a product of two, from its singular vectors.

    Rows of the first beyond the rank are random, and the second's columns for them 0: training can use them.
    """
    made = replace(model, module.layer_idx, "head-mapped", **{**module.spec, "query_width": width})
    state = module.state_dict()
    weight = state.pop("q_proj.weight").double()
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    root, rank = sizes.sqrt(), len(sizes)
    noise = torch.randn(width, weight.shape[1], generator=torch.Generator().manual_seed(module.layer_idx))
    up = noise.to(weight) * weight.square().mean().sqrt()
    up[:rank] = root[:, None] * right
    down = weight.new_zeros(weight.shape[0], width)
    down[:, :rank] = left * root
    state |= {"q_up_proj.weight": up, "q_proj.weight": down}
    made.load_state_dict(state)
    return made  # type: ignore[return-value]


@torch.no_grad()
def narrowed(model: PreTrainedModel, module: HeadMappedAttention, moments: Moments, dims: int) -> float:
    """The same layer with keys that are cached as `dims` numbers, the principal components of what each key head gives
    on the calibration text, without positions; errors weigh what the queries that meet them make of them.

    Returns:
        The share of the weighted energy that these components have.
    """
    weights = read(module)
    s, costs = second(moments), key_weights(weights, moments)
    downs, ups, kept, whole = [], [], 0.0, 0.0
    for head, rows in enumerate(with_bias(weights.k, weights.k_bias)):
        readers = [h for h, key in enumerate(module.key_map) if key == head]
        cost = costs[readers].sum(0)
        size = cost.clamp_min(1e-6 * cost.amax().clamp_min(1e-12)).sqrt()[:, None]
        energy, vectors = torch.linalg.eigh(_symmetric((size * rows) @ s @ (size * rows).T))
        top = vectors[:, -dims:].flip(1)
        downs.append(top.T @ (size * rows))
        ups.append(top / size)
        kept, whole = kept + float(energy[-dims:].sum()), whole + float(energy.sum())
    made = replace(model, module.layer_idx, "head-mapped", **{**module.spec, "k_dim": dims})
    state = module.state_dict()
    down = torch.stack(downs)
    state["k_proj.weight"], state["k_up"] = down[..., :-1].flatten(0, 1), torch.stack(ups)
    if weights.k_bias is not None:
        state["k_proj.bias"] = down[..., -1].flatten()
    made.load_state_dict(state)
    return kept / max(whole, 1e-300)


def _symmetric(x: torch.Tensor) -> torch.Tensor:
    return (x + x.T) / 2
