"""The geometry of a decoder: heads, dims, windows and what a dense KV cache of it weighs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from foveate.errors import BadArgument, Refused

Kind = Literal["full", "sliding", "other"]

# What transformers calls the attention of a layer, old spellings included.
_FULL = {"full_attention", "attention"}
_SLIDING = {"sliding_attention"}
# Left to transformers, though they cache keys and values of every token or of a window.
_OTHER_WITH_KV = {
    "chunked_attention",
    "indexed_attention",
    "deepseek_sparse_attention",
    "qwen_sparse_attention",
    "minimax_m3_sparse",
    "reference_sliding_attention",
    "hybrid",
    "hybrid_sliding",
}
# Left to transformers, and without keys and values of their own.
_OTHER_WITHOUT_KV = {"linear_attention", "mamba", "conv", "recurrent", "moe", "mlp", "shared", "cross"}
_WINDOWED = {"sliding_attention", "hybrid_sliding", "reference_sliding_attention"}


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer as its KV cache sees it. All dims are elements, not bytes.

    `kind`: "full" and "sliding" are causal softmax attention that Foveate may take over. "other" is left to
    transformers: linear attention, convolution and Mamba layers, layers without attention, layers that read another
    layer's keys and values, and attention with a pattern of its own (chunks, indexers).

    `head_dim` is the width of a query and key head, `v_head_dim` that of a value head, as the attention function sees
    them. `store_heads`, `store_k_dim` and `store_v_dim` are what one cached token costs: for latent attention (MLA) one
    head of `kv_lora_rank + qk_rope_head_dim` and nothing for the value, which is a view of the latent
    (DeepSeek-V2, section 2.1); `latent_dim` is its `kv_lora_rank`, 0 elsewhere. A layer that caches no keys and values
    has `store_heads == 0`.

    `window` counts the keys a query of a sliding layer sees, its own included; None without a limit.
    """

    index: int
    kind: Kind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    latent: bool
    store_heads: int
    store_k_dim: int
    store_v_dim: int
    latent_dim: int = 0

    def held_tokens(self, length: int) -> int:
        """Tokens that a dense cache of this layer holds for the next query of a context of `length` tokens."""
        return length if self.window is None else min(length, self.window)


@dataclass(frozen=True)
class ModelShape:
    """The geometry of a decoder language model.

    `rope` is plain JSON: `type` ("default", "yarn", "llama3", ... or "none"), `theta`, `scaling` (the other numbers of
    that type) and, where sliding layers rotate differently, the same three keys again under `sliding`.
    `max_positions` is `sys.maxsize` where the config states no limit. `dtype` is the dtype of the weights, which is
    that of the cache.
    """

    name: str
    family: str
    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    max_positions: int
    rope: dict[str, Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, model_or_config: Any) -> ModelShape:
        """Read the geometry from a transformers model or config; of a vision-language model, its text decoder.

        Raises:
            BadArgument: the object is neither.
            Refused: the config is not one of a decoder-only language model.
        """
        config = getattr(model_or_config, "config", model_or_config)
        if not hasattr(config, "get_text_config"):
            raise BadArgument("model_or_config", type(model_or_config).__name__, "give a transformers model or config")
        if getattr(config, "is_encoder_decoder", False):
            raise Refused(f"{config.model_type} is an encoder-decoder; Foveate reads decoder-only language models")
        text = config.get_text_config(decoder=True)
        if _first(text, "num_hidden_layers") is None or _first(text, "hidden_size") is None:
            raise Refused(f"the config of {config.model_type} states no decoder layers; give a language model")
        return cls(
            name=_name(model_or_config, config),
            family=text.model_type,
            layers=tuple(_layers(text)),
            hidden_size=text.hidden_size,
            vocab_size=_first(text, "vocab_size") or 0,
            max_positions=_first(text, "max_position_embeddings", "max_seq_len", "seq_length") or sys.maxsize,
            rope=_rope(text),
            dtype=_dtype(model_or_config, config, text),
        )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kv_bytes_per_slot(self, layer: int) -> int:
        """Bytes of one cached token in one layer, keys and values of all its stored heads, in the model's dtype."""
        shape = self.layers[layer]
        return shape.store_heads * (shape.store_k_dim + shape.store_v_dim) * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one more token adds to the dense cache while no window is full: all layers, keys and values."""
        return sum(self.kv_bytes_per_slot(layer.index) for layer in self.layers)

    def dense_kv_bytes(self, length: int, batch: int = 1) -> int:
        """Bytes of keys and values that the dense model reads for the next token of `batch` contexts of `length`.

        A layer with a window holds at most its window. Between two steps transformers' own cache keeps one token less
        in such a layer, because the next token brings the last one. Recurrent states and indexer keys are not keys
        and values and are not counted.
        """
        return batch * sum(self.kv_bytes_per_slot(layer.index) * layer.held_tokens(length) for layer in self.layers)


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that is there and not None: families spell the same number differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _name(model_or_config: Any, config: Any) -> str:
    path = str(getattr(model_or_config, "name_or_path", "") or getattr(config, "_name_or_path", ""))
    if path and Path(path).is_dir():
        return Path(path).name
    return path or config.model_type


def _dtype(model_or_config: Any, config: Any, text: Any) -> torch.dtype:
    if isinstance(model_or_config, torch.nn.Module):
        return model_or_config.dtype  # pyright: ignore[reportReturnType]  # a property of every PreTrainedModel
    dtype = _first(text, "dtype") or _first(config, "dtype") or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _layer_configs(text: Any) -> Sequence[Any]:
    """One config a layer: transformers resolves per-layer overrides (Gemma-4, OpenELM) itself."""
    if getattr(text, "is_heterogeneous", False):
        return list(text.per_layer_config)
    return [text] * text.num_hidden_layers


def _layer_types(text: Any, configs: Sequence[Any]) -> list[str]:
    """The attention of each layer. Without a statement, a window in the config means sliding, as in transformers."""
    types = _first(text, "layer_types", "layers_block_type")
    if types is None:
        types = [
            "sliding_attention"
            if _first(config, "sliding_window") is not None
            else "chunked_attention"
            if _first(config, "attention_chunk_size") is not None
            else "full_attention"
            for config in configs
        ]
    cross = set(getattr(text, "cross_attention_layers", None) or ())
    return _without_shared(text, ["cross" if index in cross else kind for index, kind in enumerate(types)])


def _without_shared(text: Any, types: list[str]) -> list[str]:
    """Mark layers that read another layer's keys and values; transformers 5.23 names modes, 5.15 counts the last n."""
    modes = getattr(text, "kv_sharing_modes", None)
    if modes is not None:
        return ["shared" if mode == "reuse" else kind for kind, mode in zip(types, modes, strict=True)]
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    return types[: len(types) - shared] + ["shared"] * shared


def _layers(text: Any) -> list[LayerShape]:
    configs = _layer_configs(text)
    layers = [
        _layer(index, attention, config)
        for index, (attention, config) in enumerate(zip(_layer_types(text, configs), configs, strict=True))
    ]
    # Layers that a conversion replaced say themselves what they hold.
    replaced = getattr(text, "attention_layers", None) or [None] * len(layers)
    return [
        layer if entry is None else replace(layer, **entry["holds"])
        for layer, entry in zip(layers, replaced, strict=True)
    ]


def _layer(index: int, attention: str, config: Any) -> LayerShape:
    if _first(config, "num_attention_heads") is None:
        attention = "recurrent"  # RWKV and the first Mamba state no layer types, and no heads either
    window = None
    if attention in _WINDOWED:
        window = _first(config, "sliding_window")
    elif attention == "chunked_attention":
        window = _first(config, "attention_chunk_size")
    kind: Kind = "other"
    if attention in _FULL or (attention in _SLIDING and window is None):
        kind = "full"
    elif attention in _SLIDING:
        kind = "sliding"
    elif attention not in _OTHER_WITH_KV | _OTHER_WITHOUT_KV:
        raise Refused(f"layer {index} of {config.model_type} has attention of an unknown type, {attention!r}")

    heads, kv_heads, head_dim = _heads(config, attention)
    latent = _first(config, "kv_lora_rank") is not None and attention not in _OTHER_WITHOUT_KV
    if latent:
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    v_head_dim = _first(config, "v_head_dim") or head_dim
    if attention in _OTHER_WITHOUT_KV:
        store = (0, 0, 0)
    elif latent:
        store = (1, config.kv_lora_rank + config.qk_rope_head_dim, 0)
    else:
        store = (kv_heads, head_dim, v_head_dim)
    rank = config.kv_lora_rank if latent else 0
    return LayerShape(index, kind, heads, kv_heads, head_dim, v_head_dim, window, latent, *store, latent_dim=rank)


def _heads(config: Any, attention: str) -> tuple[int, int, int]:
    """Query heads, key-value heads and head dim. A few families give their windowed layers other numbers."""
    heads = _first(config, "num_attention_heads") or 0
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    head_dim = _first(config, "head_dim", "attention_head_dim", "kv_channels")
    if head_dim is None:
        head_dim = config.hidden_size // heads if heads else 0
    if attention in _WINDOWED:
        heads = _first(config, "swa_num_attention_heads") or heads
        kv_heads = _first(config, "swa_num_key_value_heads") or kv_heads
        head_dim = _first(config, "swa_head_dim") or head_dim
        if config.model_type == "mimo_v2_flash":  # fixed in its attention class, stated nowhere in the config
            kv_heads *= 2
    return heads, kv_heads, head_dim


def _rope(text: Any) -> dict[str, Any]:
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        return {"type": "none", "theta": None, "scaling": {}}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        full = _rope_of(parameters.get("full_attention") or {})
        sliding = _rope_of(parameters.get("sliding_attention") or {})
        return full if full == sliding else full | {"sliding": sliding}
    return _rope_of(parameters)


def _rope_of(parameters: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in parameters.items() if name not in ("rope_type", "type", "rope_theta")}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return json.loads(json.dumps({"type": kind, "theta": parameters.get("rope_theta"), "scaling": rest}))
