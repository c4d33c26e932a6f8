"""What every layer is that can take the place of a decoder's attention module."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar

from torch import nn

from foveate.errors import BadArgument


class Mixer(nn.Module):
    """A layer that mixes tokens, called as transformers calls an attention module.

    `forward(hidden_states [B, N, d], position_embeddings, attention_mask, past_key_values, **kwargs)` returns
    `(out [B, N, d], None)`. `position_embeddings` is the pair (cos, sin), each [B, N, rotary_dim] in the half-split
    layout, that the model's rotary embedding made for this forward.

    A subclass names its `kind`, takes its numbers as keyword arguments of plain JSON, and tells in `spec` the ones
    that rebuild it and in `holds` what it caches, so that a configuration says both.

    Args:
        config: the configuration of the decoder.
        layer_idx: the layer's place in it, which is its place in the cache.
    """

    kind: ClassVar[str]
    layer_type: ClassVar[str] = "full_attention"
    """What transformers' caches take this layer for; "linear_attention" for one that holds a state."""
    keeps_float32: ClassVar[tuple[str, ...]] = ()
    """Parameters that stay in float32 when the model is opened in half precision."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    @property
    def spec(self) -> dict[str, Any]:
        """The keyword arguments that make this layer again: JSON values."""
        raise TypeError(f"{type(self).__name__} states no spec")

    @property
    def holds(self) -> dict[str, Any]:
        """Fields of `foveate.models.shape.LayerShape` in which this layer differs from the one that it replaced."""
        return {}


MIXERS: dict[str, type[Mixer]] = {}
"""Every kind of layer by its name."""

M = TypeVar("M", bound=type[Mixer])


def mixer(kind: str) -> Callable[[M], M]:
    """Register a layer under the name that configurations call it by."""

    def register(cls: M) -> M:
        cls.kind = kind
        MIXERS[kind] = cls
        return cls

    return register


def build(kind: str, config: Any, layer_idx: int, spec: dict[str, Any]) -> Mixer:
    """The layer of this kind.

    Raises:
        BadArgument: an unknown kind, or numbers that this kind does not take.
    """
    package = import_module("foveate.layers")
    for module in iter_modules(package.__path__):
        import_module(f"foveate.layers.{module.name}")
    if kind not in MIXERS:
        raise BadArgument("kind", kind, f"give one of {', '.join(sorted(MIXERS))}")
    try:
        return MIXERS[kind](config, layer_idx, **spec)
    except TypeError as error:
        raise BadArgument("spec", spec, f"{kind} does not take this: {error}") from error
