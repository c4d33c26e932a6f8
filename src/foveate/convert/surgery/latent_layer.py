"""Latent attention with given weights in the place of a decoder layer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foveate.layers.latent import LatentAttention
from foveate.models import converted
from foveate.models.weights import LatentWeights, write_latent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put_latent(
    model: PreTrainedModel,
    index: int,
    weights: LatentWeights,
    frequencies: Sequence[int] | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> LatentAttention:
    """Replace one layer's attention of a converted model (see `converted.container`) by these weights.

    Args:
        weights: float64 or the model's dtype. Their `kv_norm` says whether latents are normed.
        frequencies, softcap, window: as `LatentAttention` takes them.
    """
    direct = weights.q is not None
    rows = weights.q if weights.q is not None else weights.q_b
    assert rows is not None
    biases = {
        "q_proj": weights.q_bias if direct else None,
        "q_a_proj": weights.q_a_bias,
        "q_b_proj": None if direct else weights.q_bias,
        "kv_a_proj_with_mqa": weights.dkv_bias if weights.dkv_bias is not None else weights.kr_bias,
        "o_proj": weights.o_bias,
    }
    module: Any = converted.replace(
        model,
        index,
        "latent",
        num_heads=len(weights.o),
        rank=weights.w_dkv.shape[0],
        rope_dim=weights.w_kr.shape[0],
        nope_dim=weights.w_uk.shape[1],
        v_dim=weights.w_uv.shape[1],
        q_rank=None if weights.q_a is None else weights.q_a.shape[0],
        norm="none" if weights.kv_norm is None else "rms",
        frequencies=frequencies,
        interleaved=weights.interleaved,
        scale=weights.scale,
        softcap=softcap,
        window=window,
        biases=[name for name, bias in biases.items() if bias is not None],
    )
    eps = weights.eps if weights.kv_norm is None else float(module.kv_a_layernorm.eps)
    write_latent(module, replace(weights, eps=eps))
    return module
