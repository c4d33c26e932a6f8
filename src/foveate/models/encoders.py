"""Encoders of BERT's build whose layers keep some of their heads: a registered type that transformers loads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate import compat
from foveate.errors import BadArgument, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "foveate_"
KEY = "kept_heads"
"""In the configuration: for each layer the heads of the original that it keeps, in order; None: all of them."""

FAMILIES = ("bert", "roberta")
"""Model types with `encoder.layer[i].attention`: query, key and value in `self`, the projection in `output.dense`."""


def check_encoder(model: Any) -> None:
    """Refuse what is not an encoder of BERT's build.

    Raises:
        Refused: with the reason.
    """
    check_config(getattr(model, "config", model))
    if not hasattr(model, "encoder"):
        family = model.config.model_type
        raise Refused(f"{type(model).__name__} has a task's head; give the encoder in it, such as model.{family}")


def check_config(config: Any) -> None:
    """Refuse what is not an encoder of BERT's build, by its configuration.

    Raises:
        Refused: with the reason.
    """
    family = str(getattr(config, "model_type", "")).removeprefix(PREFIX)
    if family not in FAMILIES:
        what = family or type(config).__name__
        raise Refused(f"{what} models are not encoders of BERT's build: {', '.join(FAMILIES)}")
    if getattr(config, "is_decoder", False):
        raise Refused(f"this {family} model is a decoder (is_decoder=True); heads are pruned in encoders")


def encoder_layers(model: Any) -> Any:
    """The encoder's layers, first to last."""
    return model.encoder.layer


def registered(model_type: str) -> type[PreTrainedModel]:
    """The class of encoders of this family with fewer heads; the first call makes and registers it."""
    return _class_of(model_type.removeprefix(PREFIX))


@functools.cache
def _class_of(family: str) -> type[PreTrainedModel]:
    config_base, model_base = compat.encoder_classes(family)
    config_class = type(
        f"Foveate{config_base.__name__}",
        (config_base,),
        {"model_type": PREFIX + family, "__module__": __name__, KEY: None, "__annotations__": {KEY: "list | None"}},
    )

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        for layer, heads in zip(encoder_layers(self), getattr(config, KEY, None) or (), strict=False):
            keep_heads(layer, range(len(heads)))
        self.post_init()

    model_class = type(
        f"Foveate{model_base.__name__}",
        (model_base,),
        {"config_class": config_class, "__init__": init, "__module__": __name__},
    )
    compat.register_encoder(config_class, model_class)
    return model_class


def register_all() -> None:
    """Make every type of encoder with fewer heads known to transformers' Auto classes."""
    for family in FAMILIES:
        registered(family)


def encoder_container(model: PreTrainedModel) -> PreTrainedModel:
    """The same encoder as one of the type that may have fewer heads: weights copied, all heads kept.

    Raises:
        Refused: not an encoder of BERT's build.
    """
    check_encoder(model)
    cls: Any = registered(model.config.model_type)
    state = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    config = cls.config_class(**state)
    config.kept_heads = getattr(model.config, KEY, None) or [
        list(range(config.num_attention_heads)) for _ in encoder_layers(model)
    ]
    config._attn_implementation = model.config._attn_implementation
    made = cls(config, add_pooling_layer=getattr(model, "pooler", None) is not None)
    made.load_state_dict(model.state_dict(), strict=True)
    made = made.to(device=model.device, dtype=model.dtype)
    made.config.name_or_path = model.config.name_or_path
    return made.train(model.training)


@torch.no_grad()
def keep_heads(layer: Any, heads: Sequence[int]) -> None:
    """Cut all other heads out of one encoder layer, weights and arithmetic both.

    Raises:
        BadArgument: no heads, or heads that the layer does not have.
    """
    inner, dim = layer.attention.self, layer.attention.self.attention_head_size
    count = inner.query.out_features // dim
    if not heads or not all(0 <= head < count for head in heads) or len(set(heads)) != len(heads):
        raise BadArgument("heads", list(heads), f"give at least one, different ones, from 0 to {count - 1}")
    rows = torch.cat([torch.arange(head * dim, head * dim + dim) for head in heads])
    for name in ("query", "key", "value"):
        old = getattr(inner, name)
        at = rows.to(old.weight.device)
        setattr(inner, name, _linear(old, old.weight[at], old.bias[at]))
    out = layer.attention.output
    out.dense = _linear(out.dense, out.dense.weight[:, rows.to(out.dense.weight.device)], out.dense.bias)
    inner.num_attention_heads, inner.all_head_size = len(heads), len(heads) * dim


def _linear(like: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    if made.weight.device.type != "meta":
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    made.train(like.training)
    return made


def layer_parameters(width: int, inner: int, head_dim: int, heads: int) -> int:
    """Numbers in one encoder layer with so many heads: attention, its projection, the MLP and two layer norms.

    Args:
        width: of the hidden states, d. inner: of the MLP, f.
    """
    attention = 3 * (width + 1) * heads * head_dim + (heads * head_dim + 1) * width
    return attention + (width + 1) * inner + (inner + 1) * width + 4 * width


def layer_flops(width: int, inner: int, head_dim: int, heads: int, length: int) -> int:
    """Floating-point operations of the matrix products of one encoder layer for one sequence of `length` tokens."""
    projections = 4 * 2 * length * width * heads * head_dim
    pairs = 2 * 2 * length * length * heads * head_dim
    return projections + pairs + 2 * 2 * length * width * inner
