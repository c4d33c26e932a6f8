"""The one file that knows transformers' versions (5.15 to 5.23) and reaches into it."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache as CacheBase
from transformers.cache_utils import CacheLayerMixin as CacheLayerBase
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.hub import cached_file

from foveate.errors import Refused

__all__ = ["ALL_ATTENTION_FUNCTIONS", "CacheBase", "CacheLayerBase"]

NAME = "foveate"
"""The attention implementation's name. Never with "flash" in it: transformers tests for that substring."""

KEYWORD = "foveate_call"
"""The keyword that carries one forward's context from the model's pre-hook to the attention function."""

_attention: Callable[..., tuple[Tensor, None]] | None = None


def register(attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Name the attention function of calls that bring none of their own."""
    global _attention
    _attention = attention


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
):
    """Ours where a call was announced by the model's pre-hook, stock SDPA elsewhere (vision towers, unbound models).

    A call may bring an attention function of its own (`call.attention`, for taps); the others take the registered one.
    """
    call = kwargs.pop(KEYWORD, None)
    if call is not None and call.manages(module):
        ours = getattr(call, "attention", None)
        if ours is None:
            assert _attention is not None
            ours = partial(_attention, call)
        with torch.cuda.device_of(query):  # kernels start on the current GPU, wherever their tensors are
            return ours(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # Our mask function says nothing of a chunk without padding; SDPA would let its i-th query see i keys.
        attention_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = four_d(attention_mask, query.shape[2], key.shape[2], kwargs.get("sliding_window"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def four_d(mask: Tensor, n: int, m: int, window: int | None) -> Tensor:
    """A padding mask [B, M] as one over pairs, bool [B, 1, n, m]: the n queries are the last of m keys."""
    i = torch.arange(m - n, m, device=mask.device).unsqueeze(-1)
    j = torch.arange(m, device=mask.device)
    seen = (j <= i) if window is None else (j <= i) & (i - j < window)
    seen = seen & mask[:, None, None, :m].bool()
    return seen | (j == i)  # a padded query sees itself, so that no row is empty


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Padding only; causality and windows are the attention function's. Anything more is transformers' own mask."""
    q_length = kwargs.get("q_length", args[1] if len(args) > 1 else None)
    if kwargs.get("allow_is_causal_skip") is False and q_length != 1:
        return sdpa_mask(*args, **kwargs)
    if q_length == 1 and not _keys_elsewhere(kwargs.get("config")):
        # Every row got one real token and the store knows its older ones; None keeps shapes constant over steps.
        return None
    return kwargs.get("attention_mask")


def _keys_elsewhere(config: Any) -> bool:
    """Whether some layers that a conversion made keep keys in transformers' own cache, which knows of no padding."""
    entries = getattr(config, "attention_layers", None) or ()
    return any(entry and entry["holds"].get("kind") == "other" and entry["holds"]["store_heads"] for entry in entries)


# Together, and as soon as anybody may announce a call: one without the other loses causality.
AttentionInterface.register(NAME, _dispatch)
AttentionMaskInterface.register(NAME, _mask)


def text_config(model: Any) -> Any:
    """The configuration of the decoder that generates text."""
    return model.config.get_text_config(decoder=True)


def base_model(model: Any) -> Any:
    """The module that every forward of the decoder passes, below any head or adapter wrapper."""
    return getattr(model, "base_model", model)


def devices(model: Any) -> list[torch.device]:
    """Where a model lies: on one device, unless accelerate's device map spreads its layers."""
    places = (getattr(model, "hf_device_map", None) or {}).values()
    named = ("cpu" if place == "disk" else place for place in places)
    found = {torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in named}
    return sorted(found, key=str) or [model.device]


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper. Adapters that inject keys are refused."""
    if hasattr(model, "peft_config"):
        for config in getattr(model, "peft_config", {}).values():
            if getattr(config, "is_prompt_learning", False):
                raise Refused(
                    f"{config.peft_type} adapters put keys of their own into the cache; Foveate does not manage those"
                )
        inner = getattr(model, "get_base_model", None)
        return inner() if inner is not None else model
    return model


def attention_modules(model: Any) -> Iterator[Any]:
    """The decoder's attention modules, in layer order."""
    found = [
        m
        for m in base_model(model).modules()
        if isinstance(getattr(m, "layer_idx", None), int)
        and hasattr(m, "num_key_value_groups")
        and hasattr(m, "scaling")
    ]
    return iter(sorted(found, key=lambda m: m.layer_idx))


def output_projection(module: nn.Module) -> nn.Module | None:
    """The linear map behind an attention module's heads; None where it goes by none of the usual names."""
    names = ("o_proj", "out_proj", "dense", "c_proj")
    return next((part for name, part in module.named_children() if name in names), None)


def check_model(model: Any) -> None:
    """Refuse models whose attention cannot be reached or whose layers share keys.

    Raises:
        Refused: with the reason.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise Refused(f"{name} is not a transformers model that generates text")
    if getattr(config, "is_encoder_decoder", False):
        raise Refused(f"{name} is an encoder-decoder; Foveate manages decoder-only models")
    text = text_config(model)
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None):
        raise Refused(f"{name}: some layers read another layer's keys, which Foveate does not manage")
    modules = list(attention_modules(model))
    if not modules:
        raise Refused(f"{name}: no attention module with layer_idx, scaling and num_key_value_groups was found")
    for module in modules:
        source = sys.modules[type(module).__module__]
        if not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            raise Refused(f"{name}: {type(module).__name__} does not call transformers' attention interface")


def stock_layers(model: Any) -> list[Any]:
    """Transformers' own cache layers for this model; layers of linear attention stay as they are."""
    config = text_config(model)
    layers = list(DynamicCache(config=config).layers)
    count = max((m.layer_idx for m in attention_modules(model)), default=-1) + 1
    while len(layers) < max(count, config.num_hidden_layers):
        layers.append(DynamicCache(config=None).layer_class_to_replicate())  # type: ignore[misc]
    return layers


def is_linear_layer(layer: Any) -> bool:
    """A recurrent or convolutional cache layer, which holds no keys per token."""
    return not isinstance(layer, CacheLayerBase) or hasattr(layer, "recurrent_states")


def private_config(model: Any) -> tuple[Any, Callable[[], None]]:
    """Give this model a configuration of its own with our attention selected.

    Configurations are shared by construction; every module that holds the old object gets the copy.

    Returns:
        The copy, and a function that puts the old objects back.
    """
    old = model.config
    new = copy.deepcopy(old)
    pairs = {id(old): new}
    old_text, new_text = old.get_text_config(decoder=True), new.get_text_config(decoder=True)
    pairs[id(old_text)] = new_text
    for name, sub in vars(old).items():
        if hasattr(sub, "get_text_config") and id(sub) not in pairs:
            pairs[id(sub)] = getattr(new, name)
    new_text._attn_implementation_internal = NAME
    rebound: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        held = module.__dict__.get("config")
        if held is not None and id(held) in pairs:
            rebound.append((module, held))
            module.__dict__["config"] = pairs[id(held)]

    def restore() -> None:
        for module, held in rebound:
            module.__dict__["config"] = held

    return new, restore


def prompt_columns(generation_config: Any, model_kwargs: dict[str, Any]) -> int | None:
    """Length at which a generate() call's prompt ends, padding included.

    transformers 5.23 drops an all-ones mask before it prepares the cache and notes its length; older versions keep it.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.shape[1])
    length = getattr(generation_config, "_mask_length", None)
    if length is not None and length > 0:
        return int(length)
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        return int(positions.shape[-1])
    return None


def rotary(model: Any) -> tuple[Tensor, bool]:
    """The rotary embedding of the decoder's full-attention layers.

    Returns:
        Frequencies [F], the angle per position of each pair of channels, which lie F apart; and whether the 2 F rotated
        channels are the last ones (under MLA), not the first.

    Raises:
        Refused: where angles depend on the length or are laid out in a way that cannot be turned by position.
    """
    name = type(model).__name__
    module = next((m for m in base_model(model).modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    if module is None:
        raise Refused(f"{name} has no rotary embedding: positions cannot be moved")
    kind = getattr(module, "rope_type", "default")
    kind = kind.get("full_attention", "default") if isinstance(kind, dict) else kind
    if kind in ("dynamic", "longrope"):
        raise Refused(f"{name}: {kind} rotary angles depend on the length, so positions cannot be moved")
    attention = next(attention_modules(model))
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    probe = torch.arange(4.0)
    own = hasattr(attention, "frequency_indices")  # Foveate's layers hold half-split pairs
    if not own and (rotate is None or not torch.equal(rotate(probe), torch.tensor([-2.0, -3.0, 0.0, 1.0]))):
        raise Refused(f"{name}: its rotary layout is not half-split, so positions cannot be moved")
    inv_freq = getattr(module, "inv_freq", None)
    if inv_freq is None:
        inv_freq = getattr(module, "full_attention_inv_freq", None)
    if inv_freq is None:
        raise Refused(f"{name}: no rotary frequencies were found for its full-attention layers")
    picks = {_frequencies(m, inv_freq.numel()) for m in attention_modules(model)}
    if len(picks) > 1:
        raise Refused(f"{name}: its layers rotate with different frequencies, so positions cannot be moved")
    pick = picks.pop()
    return inv_freq if pick is None else inv_freq[list(pick)], is_latent(attention)


def _frequencies(module: Any, count: int) -> tuple[int, ...] | None:
    """Which of the model's rotary frequencies an attention module turns its pairs with; None: each one once."""
    pick = getattr(module, "frequency_indices", None)
    picked = tuple(range(count)) if pick is None else tuple(pick(count))
    return None if picked == tuple(range(count)) else picked


def rotary_factor(model: Any) -> float:
    """What the decoder's rotary embedding multiplies scores by beside turning queries and keys (YaRN, LongRoPE)."""
    module = next((m for m in base_model(model).modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    return float(getattr(module, "attention_scaling", 1.0)) ** 2


class LatentProjection:
    """The up-projection of an MLA layer: latent [.., r] -> keys without position [H, n] and values [H, v]."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.rank, self.rope_dim = module.kv_lora_rank, module.qk_rope_head_dim
        self.nope, self.v_dim = module.qk_nope_head_dim, module.v_head_dim

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """W_UK [H, nope, r] and W_UV [H, v, r], adapters included, for tensors like this one."""
        linear = self.module.kv_b_proj
        if type(linear) is nn.Linear and linear.weight.device.type != "meta":
            weight = linear.weight
        else:
            weight = linear(torch.eye(self.rank, device=like.device, dtype=like.dtype)).transpose(0, 1)
        weight = weight.view(-1, self.nope + self.v_dim, self.rank)
        return weight[:, : self.nope], weight[:, self.nope :]

    def absorb(self, q: Tensor) -> Tensor:
        """Queries [B, H, N, nope + rope] moved into latent space [B, H, N, r + rope]."""
        w_uk, _ = self.weights(q)
        latent = torch.einsum("bhnd,hdr->bhnr", q[..., : self.nope], w_uk)
        return torch.cat([latent, q[..., self.nope :]], dim=-1)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Stored [B, 1, M, r + rope] -> keys [B, H, M, nope + rope], values [B, H, M, v]."""
        return self.module.expand_kv(latent[..., : self.rank], latent[..., self.rank :])

    def values(self, out: Tensor) -> Tensor:
        """Attention over latents [B, H, N, r] -> head outputs [B, H, N, v]."""
        _, w_uv = self.weights(out)
        return torch.einsum("bhnr,hvr->bhnv", out, w_uv)


def companion_file(source: str, name: str) -> str:
    """Path of a small file that lies beside a checkpoint, local or on the hub."""
    local = os.path.join(source, name)
    if os.path.exists(local):
        return local
    found = cached_file(source, name)
    if found is None:
        raise OSError(f"{source} has no {name}")
    return found


def causal_classes(family: str) -> tuple[Any, Any]:
    """The configuration and the language model class of a model type such as "llama"."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = CONFIG_MAPPING[family]
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[config]


def has_family(family: str) -> bool:
    """Whether this version of transformers knows the model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return family in CONFIG_MAPPING


def register_causal(config: type[Any], model: type[Any]) -> None:
    """Make AutoConfig and AutoModelForCausalLM know a type of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def encoder_classes(family: str) -> tuple[Any, Any]:
    """The configuration and the class, without a task's head, of a model type such as "bert"."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = CONFIG_MAPPING[family]
    return config, MODEL_MAPPING[config]


def register_encoder(config: type[Any], model: type[Any]) -> None:
    """Make AutoConfig and AutoModel know a type of ours."""
    from transformers import AutoConfig, AutoModel

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)


def layer_types(model: Any) -> list[str]:
    """What transformers' caches take each decoder layer for, where the configuration does not say it itself."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def masks_by_type(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook of a decoder that looks masks up by layer type: makes those of types that it does not know.

    Layers that hold a state get the padding mask of the new tokens [B, N], or None.
    """
    types, given = set(module.config.layer_types), kwargs.get("attention_mask")
    inputs = kwargs.get("inputs_embeds")
    inputs = kwargs.get("input_ids", args[0] if args else None) if inputs is None else inputs
    if types <= set(_MASKS) or isinstance(given, dict) or inputs is None:
        return None
    asked = {
        "config": module.config,
        # Read for its shape, dtype and device alone.
        "inputs_embeds": torch.empty(*inputs.shape[:2], 1, dtype=module.dtype, device=inputs.device),
        "attention_mask": given,
        "past_key_values": kwargs.get("past_key_values"),
        "position_ids": kwargs.get("position_ids"),
    }
    local = given[:, -inputs.shape[1] :] if given is not None and given.ndim == 2 else given
    masks = {name: _MASKS[name](**asked) if name in _MASKS else local for name in types}
    return args, {**kwargs, "attention_mask": masks}


_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def is_latent(module: nn.Module) -> bool:
    """An MLA attention module that caches its latent."""
    return hasattr(module, "kv_lora_rank") and hasattr(module, "expand_kv")
