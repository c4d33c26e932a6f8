"""Random-weight models of well-known geometry: what speed and memory can be measured on without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import BadArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 1 << 20
"""Positions that these models accept: their weights are random, so nothing limits the length."""


def named(
    name: str, *, layers: int | None = None, device: Any = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> PreTrainedModel:
    """A model of a published geometry with random weights, in eval mode.

    Args:
        name: one of `NAMED`.
        layers: build only so many of its layers; None: all.

    Raises:
        BadArgument: an unknown name, or a number of layers that it does not have.
    """
    if name not in NAMED:
        raise BadArgument("shape", name, f"give one of {', '.join(NAMED)}")
    from transformers import AutoModelForCausalLM

    config = NAMED[name]()
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise BadArgument("layers", layers, f"{name} has 1 to {config.num_hidden_layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(seed)
    with torch.device(device):  # weights are drawn where they are used
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None  # random answers do not end
    return model.eval()


def _llama3_8b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )


def _qwen3_8b() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )


def _deepseek_v2_lite() -> Any:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        vocab_size=102400,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )


def _smollm2_135m() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )


NAMED: dict[str, Callable[[], Any]] = {
    "llama3-8b": _llama3_8b,
    "qwen3-8b": _qwen3_8b,
    "deepseek-v2-lite": _deepseek_v2_lite,
    "smollm2-135m": _smollm2_135m,
}
"""Configurations by name."""
