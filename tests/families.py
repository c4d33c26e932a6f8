"""One small random model of each family whose attention Foveate reads, with biases and norms that are not trivial."""

from __future__ import annotations

from typing import Any

import torch

from foveate.models.tiny import FAMILIES as TINY
from foveate.models.tiny import tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3")
"""Families with heads of their own keys and values."""

LATENT = ("deepseek-v2", "deepseek-v3")


def family_model(
    family: str,
    *,
    kv_heads: int = 2,
    heads: int = 8,
    layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """A model in eval mode, heads of 16 dims; `changes` go into its configuration where `tiny` does not make it.

    float64 models round rotations to float32 like all others: transformers computes those angles in float32.
    """
    if family in TINY and not changes:
        model = tiny(family, kv_heads=kv_heads, heads=heads, layers=layers, seed=seed, window=5)
    else:
        model = _made(family, kv_heads, heads, layers, seed, changes)
    return model.to(dtype).eval()


def _made(family: str, kv_heads: int, heads: int, layers: int, seed: int, changes: dict[str, Any]) -> Any:
    import transformers

    common = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * 16,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    sliding = {
        "sliding_window": 5,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
    }
    latent = {
        "num_key_value_heads": heads,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": layers,
        "attention_bias": True,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    name, own = {
        "llama": ("Llama", {}),
        "qwen2": ("Qwen2", {"use_sliding_window": False}),
        "gemma2": ("Gemma2", sliding | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0}),
        "phi": ("Phi", {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}),
        "phi3": ("Phi3", {"rope_parameters": rope | {"partial_rotary_factor": 0.75}, "sliding_window": 7}),
        "deepseek-v2": ("DeepseekV2", latent),
        "deepseek-v3": ("DeepseekV3", latent),
    }[family]
    numbers = common | own | changes
    if family in LATENT:
        del numbers["head_dim"]
    config = getattr(transformers, f"{name}Config")(**numbers)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif "embed_tokens" in parameter_name:
                parameter.copy_(noise / 10 if family == "gemma2" else noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    return model
