"""Models some of whose attention layers were replaced: registered types that transformers loads without remote code."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch

from foveate import compat
from foveate.errors import BadArgument, Refused
from foveate.layers.feedforward import build_feed_forward
from foveate.layers.mixer import Mixer, build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "foveate_"
KEY = "attention_layers"
"""In the configuration: for each layer None, or its kind, the numbers that rebuild it and what it holds."""
FEED_FORWARD_KEY = "feed_forward_layers"
"""In the configuration: for each layer None, or the kind of its feed-forward network and the numbers of it."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "deepseek_v2", "deepseek_v3")
"""Model types whose decoder layers keep their attention at `model.layers[i].self_attn`."""


def registered(model_type: str) -> type[PreTrainedModel]:
    """The class of converted models of this family; the first call makes and registers it with transformers' Auto
    classes, so that `AutoModelForCausalLM` opens what `save_pretrained` wrote.

    Raises:
        Refused: a family that Foveate does not convert.
    """
    family = model_type.removeprefix(PREFIX)
    if family not in FAMILIES:
        raise Refused(f"{family} models cannot be converted; Foveate converts {', '.join(FAMILIES)}")
    return _class_of(family)


@functools.cache
def _class_of(family: str) -> type[PreTrainedModel]:
    config_base, model_base = compat.causal_classes(family)
    # Decoders of such families look their masks up by layer type, and know the types alone that they were written for.
    by_type = hasattr(config_base, "layer_types")
    config_class = type(
        f"Foveate{config_base.__name__}",
        (config_base,),
        {
            "model_type": PREFIX + family,
            "__module__": __name__,
            KEY: None,
            FEED_FORWARD_KEY: None,
            "__annotations__": {KEY: "list | None", FEED_FORWARD_KEY: "list | None"},
        },
    )

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        layers = decoder_layers(self)
        strict = set(self._keep_in_fp32_modules_strict or ())
        for index, entry in enumerate(getattr(config, KEY, None) or [None] * len(layers)):
            if entry is not None:
                made = layers[index].self_attn = build(entry["kind"], config, index, entry["spec"])
                strict |= {f"self_attn.{name}" for name in made.keeps_float32}
        self._keep_in_fp32_modules_strict = strict
        for index, entry in enumerate(getattr(config, FEED_FORWARD_KEY, None) or ()):
            if entry is not None:
                layers[index].mlp = build_feed_forward(entry["kind"], layers[index].mlp, entry["spec"])
        if by_type:
            compat.base_model(self).register_forward_pre_hook(compat.masks_by_type, with_kwargs=True)
        self.post_init()

    model_class = type(
        f"Foveate{model_base.__name__}",
        (model_base,),
        {"config_class": config_class, "__init__": init, "__module__": __name__},
    )
    compat.register_causal(config_class, model_class)
    return model_class


def register_all() -> None:
    """Make every converted type known to transformers' Auto classes."""
    for family in FAMILIES:
        if compat.has_family(family):
            registered(family)


def decoder_layers(model: Any) -> Any:
    """The decoder's layers, first to last."""
    return compat.base_model(model).layers


def is_converted(model_or_config: Any) -> bool:
    """Whether the model is of a converted type, be its layers replaced or not."""
    config = getattr(model_or_config, "config", model_or_config)
    return str(getattr(config, "model_type", "")).startswith(PREFIX)


def container(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as one of the converted type of its family: weights copied, no layer replaced.

    Raises:
        Refused: a family that Foveate does not convert.
    """
    cls = registered(model.config.model_type)
    state = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    config = cls.config_class(**state)  # type: ignore[misc]
    config.attention_layers = getattr(config, KEY, None) or [None] * config.num_hidden_layers
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        made: Any = cls(config)
    made = made.to(dtype=model.dtype).to_empty(device=model.device)
    made.load_state_dict(model.state_dict(), strict=True, assign=False)
    # What no state dict holds, such as rotation frequencies.
    given = dict(model.named_buffers())
    for name in dict(made.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        made.get_submodule(owner)._buffers[leaf] = given[name].clone()
    if model.generation_config is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    made.config.name_or_path = model.config.name_or_path
    made.tie_weights()
    return made.train(model.training)


def replace(model: PreTrainedModel, layer: int, kind: str, **spec: Any) -> Mixer:
    """Put a new layer of this kind in the place of one decoder layer's attention, weights not yet set.

    Args:
        model: of a converted type (see `container`).
        spec: the numbers of this kind.

    Raises:
        BadArgument: no such layer or kind, or numbers that do not fit.
    """
    layers = _replaceable(model, layer)
    old = layers[layer].self_attn
    parameter = next(old.parameters())
    made = build(kind, model.config, layer, spec).to(device=parameter.device, dtype=parameter.dtype)
    made.train(old.training)
    layers[layer].self_attn = made
    listed: list[Any] = list(getattr(model.config, KEY, None) or [None] * len(layers))
    listed[layer] = {"kind": kind, "spec": made.spec, "holds": made.holds}
    setattr(model.config, KEY, listed)
    stated = getattr(model.config, "layer_types", None)
    types = list(stated or compat.layer_types(model))
    if made.layer_type != "full_attention" or types[layer] not in ("full_attention", "sliding_attention"):
        types[layer] = made.layer_type
    # A family that states no types is left without: where they are there, transformers hands over a mask for each.
    if stated or types != compat.layer_types(model):
        model.config.layer_types = types
    return made


def replace_feed_forward(model: PreTrainedModel, layer: int, kind: str, **spec: Any) -> Any:
    """Put a new layer of this kind in the place of one decoder layer's feed-forward network.

    Args:
        model: of a converted type (see `container`).
        spec: the numbers of this kind.

    Raises:
        BadArgument: no such layer or kind, or numbers that do not fit.
    """
    layers = _replaceable(model, layer)
    old = layers[layer].mlp  # which some kinds copy
    made = build_feed_forward(kind, old, spec).train(old.training)
    layers[layer].mlp = made
    listed: list[Any] = list(getattr(model.config, FEED_FORWARD_KEY, None) or [None] * len(layers))
    listed[layer] = {"kind": kind, "spec": made.spec}
    setattr(model.config, FEED_FORWARD_KEY, listed)
    return made


def _replaceable(model: PreTrainedModel, layer: int) -> Any:
    if not is_converted(model):
        raise BadArgument("model", type(model).__name__, "give what container(model) returned")
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise BadArgument("layer", layer, f"give 0 to {len(layers) - 1}")
    return layers
