"""The geometry read from a config is that of the tensors transformers really makes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from foveate.errors import BadArgument, Refused
from foveate.models import FAMILIES, ModelShape, tiny

SMALL = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20, "q_lora_rank": 16}
# config class -> what it needs beside SMALL, chosen to be unlike the defaults and unlike hidden_size / heads
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 24},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "Phi3": {"sliding_window": 7},
    "Gemma2": {"head_dim": 12, "sliding_window": 7},
    "Gemma3Text": {"head_dim": 12, "sliding_window": 7},
    "GptOss": {"head_dim": 12, "sliding_window": 7, **MOE},
    "Cohere2": {"sliding_window": 7},
    "MiMoV2Flash": {"head_dim": 24, "v_head_dim": 12, "sliding_window": 7, "n_routed_experts": 4, **MOE},
    "DeepseekV3": {**MLA, "num_key_value_heads": 4, "first_k_dense_replace": 4},
    "MiniCPM3": {**MLA, "num_key_value_heads": 4},
    "Qwen3Next": {
        "head_dim": 12,
        **MOE,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
    "Falcon": {"multi_query": True, "new_decoder_architecture": False},
    "GPTBigCode": {"multi_query": True},
    "GPT2": {"num_key_value_heads": 4},
    "Gemma3nText": {
        "head_dim": 12,
        "sliding_window": 7,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **CONFIGS[name]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def cache_after(model: Any, length: int, batch: int) -> DynamicCache:
    """transformers' own cache after a prompt of `length - 1` tokens and one step."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, 100, (batch, length))
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
    return cache


def layer_bytes(layer: Any) -> int:
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("length", "batch"), [(6, 2), (19, 1)])
def test_bytes_are_those_of_the_cache(name: str, length: int, batch: int):
    model = model_of(name)
    shape = ModelShape.of(model)
    layers = cache_after(model, length, batch).layers
    measured = [layer_bytes(layer) for layer in layers] + [0] * (shape.num_layers - len(layers))
    # between steps transformers keeps window - 1 tokens; the next token is the last one of its window
    kept = [min(length, layer.window - 1) if layer.window else length for layer in shape.layers]
    assert measured == [
        batch * n * shape.kv_bytes_per_slot(layer.index) for n, layer in zip(kept, shape.layers, strict=True)
    ]
    waiting = sum(
        shape.kv_bytes_per_slot(layer.index) for layer in shape.layers if layer.window and length >= layer.window
    )
    assert shape.dense_kv_bytes(length, batch) == sum(measured) + batch * waiting


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (3, 1), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_families(family: str, heads: int, kv_heads: int, dtype: torch.dtype):
    model = tiny(family, heads=heads, kv_heads=kv_heads, dtype=dtype)
    shape = ModelShape.of(model)
    layers = cache_after(model, 6, 2).layers
    assert [layer_bytes(layer) for layer in layers] == [
        12 * shape.kv_bytes_per_slot(index) for index in range(shape.num_layers)
    ]
    assert shape.dtype is dtype
    assert shape.kv_bytes_per_token * 12 == shape.dense_kv_bytes(6, batch=2)


@pytest.mark.parametrize("name", ["DeepseekV3", "MiniCPM3"])
def test_latent_layers_store_one_head_and_no_values(name: str):
    layer = ModelShape.of(model_of(name)).layers[0]
    assert (layer.latent, layer.store_heads, layer.store_k_dim, layer.store_v_dim) == (True, 1, 32, 0)
    assert (layer.kind, layer.num_heads, layer.head_dim, layer.v_head_dim) == ("full", 4, 20, 20)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Llama", ["full"] * 4),
        ("Mistral", ["sliding"] * 4),
        ("Qwen2", ["full", "full", "sliding", "sliding"]),
        ("Gemma2", ["sliding", "full"] * 2),
        ("GptOss", ["sliding", "full"] * 2),
        ("Cohere2", ["sliding", "sliding", "sliding", "full"]),
        ("Qwen3Next", ["other", "other", "other", "full"]),
        ("Gemma3nText", ["sliding", "full", "sliding", "other"]),
    ],
)
def test_kinds_of_layers(name: str, kinds: list[str]):
    shape = ModelShape.of(model_of(name))
    assert [layer.kind for layer in shape.layers] == kinds
    assert [layer.window for layer in shape.layers] == [7 if kind == "sliding" else None for kind in kinds]


def test_value_heads_of_another_width_and_windowed_layers_of_other_heads():
    full, sliding = (
        next(layer for layer in ModelShape.of(model_of("MiMoV2Flash")).layers if layer.kind == kind)
        for kind in ("full", "sliding")
    )
    assert (full.head_dim, full.v_head_dim, full.num_kv_heads) == (24, 12, 2)
    assert (sliding.head_dim, sliding.v_head_dim, sliding.num_kv_heads) == (24, 12, 4)


def test_chunked_attention_is_left_to_transformers_but_counted():
    config = transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=48, head_dim=8, attention_chunk_size=8, num_local_experts=2
    )
    shape = ModelShape.of(config)
    assert [layer.kind for layer in shape.layers] == ["other", "other", "other", "full"]
    assert shape.dense_kv_bytes(100) == (3 * 8 + 100) * 2 * 2 * 8 * shape.dtype.itemsize


def test_the_text_decoder_of_a_vision_language_model():
    text = {**SMALL, "head_dim": 12, "sliding_window": 7, "num_hidden_layers": 6}
    config = transformers.Gemma3Config(text_config=text)
    assert ModelShape.of(config).layers == ModelShape.of(config.text_config).layers
    assert ModelShape.of(config).family == "gemma3_text"


def test_rope_is_plain_json_with_one_entry_per_kind_of_layer():
    yarn = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 64}
    shape = ModelShape.of(transformers.LlamaConfig(**SMALL, rope_parameters=yarn, max_position_embeddings=256))
    assert shape.rope == {
        "type": "yarn",
        "theta": 5e4,
        "scaling": {"factor": 4.0, "original_max_position_embeddings": 64},
    }
    assert shape.max_positions == 256
    gemma = ModelShape.of(tiny("gemma3"))
    assert (gemma.rope["theta"], gemma.rope["sliding"]["theta"]) == (1e6, 1e4)
    assert ModelShape.of(model_of("GPT2")).rope == {"type": "none", "theta": None, "scaling": {}}


def test_without_a_limit_of_positions_it_is_the_largest_number():
    config = transformers.MambaConfig(**{**SMALL, "state_size": 4})
    shape = ModelShape.of(config)
    assert shape.max_positions == sys.maxsize


@pytest.mark.parametrize("config", [transformers.MambaConfig, transformers.RwkvConfig])
def test_recurrent_models_hold_no_keys_and_values(config: type):
    shape = ModelShape.of(config(num_hidden_layers=3))
    assert {layer.kind for layer in shape.layers} == {"other"}
    assert shape.dense_kv_bytes(1000) == 0


def test_the_dtype_is_the_models_not_the_configs():
    model = tiny("llama").to(torch.bfloat16)
    model.config.dtype = torch.float32
    assert ModelShape.of(model).dtype is torch.bfloat16
    assert ModelShape.of(transformers.LlamaConfig(**SMALL, dtype="float16")).dtype is torch.float16


def test_names(tmp_path):
    model = tiny("qwen3")
    assert ModelShape.of(model).name == "qwen3"
    model.save_pretrained(tmp_path / "my-model")
    assert ModelShape.of(AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")).name == "my-model"


def test_what_is_no_decoder_is_refused():
    with pytest.raises(BadArgument, match="model_or_config='int'"):
        ModelShape.of(3)
    with pytest.raises(Refused, match="t5 is an encoder-decoder"):
        ModelShape.of(transformers.T5Config())
    config = transformers.LlamaConfig(**SMALL)
    config.layer_types = ["full_attention"] * 3 + ["telepathy"]
    with pytest.raises(Refused, match=r"layer 3 of llama .*'telepathy'"):
        ModelShape.of(config)
