"""Different numbers of key and value heads from a checkpoint (DiffQKV, Sigma, arXiv 2501.13629)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING, ClassVar

import torch

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.head_maps import check_heads, floor_map, install, layers_of
from foveate.convert.surgery.head_merge import merge
from foveate.convert.surgery.replay import refit_all
from foveate.errors import BadArgument
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

    Args:
        k_heads, v_heads: heads that stay; None: the share `kv` of all, one key head for four value heads as in the
            paper's models as far as there are so many.
        kv: share of the cache to keep where not both numbers are given.
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
    query_width: int | None = None
    aligned: bool = True
    refit: bool = True

    def numbers(self, kv_heads: int) -> tuple[int, int]:
        """Key and value heads that stay of these many.

        Raises:
            BadArgument: more heads than there are, or a share that leaves less than one of each.
        """
        for name, value in (("k_heads", self.k_heads), ("v_heads", self.v_heads)):
            if value is not None and not 1 <= value <= kv_heads:
                raise BadArgument(name, value, f"the model has {kv_heads} key-value heads")
        if self.k_heads is not None and self.v_heads is not None:
            return self.k_heads, self.v_heads
        units = int(self.kv * 2 * kv_heads + 1e-9)
        if not 2 <= units <= 2 * kv_heads:
            raise BadArgument("kv", self.kv, f"give 1 / {kv_heads} (one key and one value head of {kv_heads}) up to 1")
        if self.k_heads is not None:
            keys = self.k_heads
        elif self.v_heads is not None:
            keys = units - self.v_heads
        else:
            keys = max(units // 5, units - kv_heads, 1)
        values = units - keys if self.v_heads is None else self.v_heads
        if not (1 <= keys <= kv_heads and 1 <= values <= kv_heads):
            raise BadArgument("kv", self.kv, f"it comes to {keys} key and {values} value heads of {kv_heads}")
        return keys, values

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_heads(model)
        for layer in shape.layers:
            self.numbers(layer.num_kv_heads)
            least = min(shape.hidden_size, layer.num_heads * layer.head_dim)
            if self.query_width is not None and self.query_width < least:
                raise BadArgument("query_width", self.query_width, f"give at least {least}, the rank that W_q may have")

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        moments = calibration.inputs(model)
        given, kept = {}, []
        for index, weights in layers_of(model):
            heads, kv_heads = weights.q.shape[0], weights.k.shape[0]
            k_heads, v_heads = self.numbers(kv_heads)
            key_map, value_map = floor_map(heads, k_heads), floor_map(heads, v_heads)
            keys = merge(weights, moments[index], "k", key_map, aligned=self.aligned)
            values = merge(weights, moments[index], "v", value_map, aligned=self.aligned)
            if k_heads < kv_heads or v_heads < kv_heads:
                given[index] = decoder_layers(model)[index].self_attn
            install(model, index, with_changes(keys, v=values.v, v_bias=values.v_bias, o=values.o), key_map, value_map)
            kept.append([k_heads, v_heads])
        yield Stage("fewer key and value heads", not given, {"heads": kept})
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
