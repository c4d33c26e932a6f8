"""Random-weight models small enough for a test, whose attention still matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import BadArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "qwen3", "gemma3", "deepseek-v3", "mistral")


def tiny(
    family: str,
    *,
    layers: int = 3,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 16,
    window: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = 256,
    max_positions: int = 512,
) -> PreTrainedModel:
    """A small decoder of one of `FAMILIES`, in eval mode, with a config of its own and weights drawn from `seed`.

    llama; qwen3 (norms on queries and keys); gemma3 (sliding layers, every third and the last one global);
    deepseek-v3 (latent attention, dense MLPs); mistral (full attention, sliding in all layers if given a window).

    The weights are drawn so that attention is peaked and its output is a good part of the residual stream: dropping
    a few tokens of the context moves the logits visibly, which a freshly initialised model would hide.

    Args:
        heads: query heads.
        kv_heads: key-value heads, a divisor of `heads`; all of them if None. Latent attention stores one head whatever
            this says.
        head_dim: of queries, keys and values; even. For latent attention it is the part without a position, beside a
            rotated part half as wide, over a latent of `2 * head_dim`.
        window: keys that a query of a sliding layer sees, its own included: 8 in gemma3 if not given. The families
            without sliding layers ignore it.

    Raises:
        BadArgument: an unknown family, or numbers that do not make a model.
    """
    if family not in FAMILIES:
        raise BadArgument("family", family, f"give one of {', '.join(FAMILIES)}")
    kv_heads = heads if kv_heads is None else kv_heads
    if layers < 1 or (family == "gemma3" and layers < 2):
        raise BadArgument("layers", layers, "give at least 1, for gemma3 at least 2 (one sliding, one global)")
    if kv_heads < 1 or heads % kv_heads:
        raise BadArgument("kv_heads", kv_heads, f"give a divisor of heads={heads}")
    if head_dim < 4 or head_dim % 4:
        raise BadArgument("head_dim", head_dim, "give a multiple of 4: half of it is rotated in pairs")
    if window is not None and window < 1:
        raise BadArgument("window", window, "give at least 1, the query's own key")
    common = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        # not heads * head_dim: who derives the head dim from the hidden size shall notice
        "hidden_size": heads * -(-64 // heads),
        "intermediate_size": 128,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    model = _CLASSES[family](common, window)
    _draw(model, seed)
    _cast(model, dtype)
    return model.eval()


def _llama(common: dict[str, Any], window: int | None) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**common))


def _qwen3(common: dict[str, Any], window: int | None) -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**common, use_sliding_window=False))


def _mistral(common: dict[str, Any], window: int | None) -> PreTrainedModel:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**common, sliding_window=window))


def _gemma3(common: dict[str, Any], window: int | None) -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = common["num_hidden_layers"]
    types = [
        "full_attention" if layer % 3 == 2 or layer == layers - 1 else "sliding_attention" for layer in range(layers)
    ]
    config = Gemma3TextConfig(
        **common,
        sliding_window=8 if window is None else window,
        layer_types=types,
        query_pre_attn_scalar=common["head_dim"],
    )
    return Gemma3ForCausalLM(config)


def _deepseek_v3(common: dict[str, Any], window: int | None) -> PreTrainedModel:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    head_dim = common.pop("head_dim")
    # every query head has its own expanded key and value; what is shared is the latent
    common["num_key_value_heads"] = common["num_attention_heads"]
    config = DeepseekV3Config(
        **common,
        kv_lora_rank=2 * head_dim,
        q_lora_rank=3 * head_dim,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=head_dim // 2,
        v_head_dim=head_dim,
        first_k_dense_replace=common["num_hidden_layers"],
    )
    return DeepseekV3ForCausalLM(config)


_CLASSES: dict[str, Callable[[dict[str, Any], int | None], PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "deepseek-v3": _deepseek_v3,
    "mistral": _mistral,
}


@torch.no_grad()
def _draw(model: PreTrainedModel, seed: int) -> None:
    """Matrices that keep the variance of what they multiply, queries louder so that a row's weight lies on few keys."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            # norms, around the value they start from; those of queries and keys set how peaked attention is
            parameter.add_(0.1 * noise)
            if "q_norm" in name:
                parameter.add_(1.0)
        elif "embed_tokens" in name:
            # Gemma multiplies its embeddings by the root of the hidden size
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if "gemma" in model.config.model_type else noise)
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "q_b_proj", "o_proj")) else 1.0
            parameter.copy_(gain * noise / parameter.shape[-1] ** 0.5)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters only, as from_pretrained does: rounded rotation frequencies would be another model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
