"""Taps: a function of yours in place of the attention of every decoder layer, with gradient, for one model instance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate import compat
from foveate.attention import Partial, Span, attend, merge
from foveate.errors import BadArgument, Refused
from foveate.models.shape import LayerShape, ModelShape


@dataclass(frozen=True)
class Tapped:
    """One attention layer in a tapped forward: what it would attend with, and its own way of doing so.

    Attributes:
        shape: geometry of the layer; `shape.index` is its number.
        q, k, v: [B, H, N, D], [B, Hkv, N, D], [B, Hkv, N, Dv], rotated; under MLA the expanded heads.
        scale, softcap: of the logits.
        sinks: learned logits [H] that take softmax mass without a value (gpt-oss), or None.
        module: the attention module, for its weights.
    """

    shape: LayerShape
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    module: nn.Module | None = None

    def project(self, out: Tensor) -> Tensor:
        """What heads' outputs [B, H, N, Dv] add to the residual stream: [B, N, d]."""
        joined = out.transpose(1, 2).flatten(2)
        last = None if self.module is None else compat.output_projection(self.module)
        return joined if last is None else last(joined)

    def attend(self, span: Span | None = None) -> Tensor:
        """The layer's causal attention over the pairs in the span and in its own window: [B, H, N, Dv]."""
        own = () if self.shape.window is None else (Span(window=self.shape.window),)
        visible = own if span is None else (*own, span)
        counted = self.sinks is not None
        part = attend(self.q, self.k, self.v, visible=visible, scale=self.scale, softcap=self.softcap, lse=counted)
        return self.merged([part])

    def merged(self, parts: Sequence[Partial], heads: Tensor | None = None) -> Tensor:
        """Disjoint parts of the layer's attention as one, its learned sinks included: [B, H, N, Dv].

        Args:
            heads: the query heads that the parts are of, where they are not all.
        """
        if self.sinks is None:
            return parts[0].out if len(parts) == 1 else merge(parts).out
        mass = self.sinks if heads is None else self.sinks[heads]
        mass = mass.view(1, -1, 1).to(parts[0].lse.dtype).expand_as(parts[0].lse)
        return merge([*parts, Partial(torch.zeros_like(parts[0].out), mass)]).out


Serve = Callable[[Tapped], Tensor]
"""Gives the heads' outputs [B, H, N, Dv] of one layer."""


class Tap:
    """While entered, every attention layer of the decoder gives `serve(layer)` instead of its own attention.

    Only this model instance changes, and only until the context is left. Nothing is cached; rows carry no padding.

    Args:
        model: a transformers decoder-only model (a PEFT wrapper is unwrapped).
        serve: called once per attention layer and forward, in layer order; gradients flow through it.

    Raises:
        Refused: the model's attention cannot be reached.

    Example:
        >>> with Tap(model, lambda layer: layer.attend(Span(sink=4, window=64))):
        ...     logits = model(ids, use_cache=False).logits
    """

    def __init__(self, model: nn.Module, serve: Serve) -> None:
        self.model = compat.unwrap(model)
        compat.check_model(self.model)
        self.serve = serve
        self.layers = {x.index: x for x in ModelShape.of(self.model).layers if x.kind != "other"}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Tap:
        _, restore = compat.private_config(self.model)
        hook = compat.base_model(self.model).register_forward_pre_hook(self._announce, with_kwargs=True)
        self._undo = [restore, hook.remove]
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _announce(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict]:
        if kwargs.get("past_key_values") is not None:
            raise Refused("a tapped model takes no cache: pass the whole text with use_cache=False")
        return args, kwargs | {"use_cache": False, compat.KEYWORD: self}

    # -- what compat calls --------------------------------------------------------------------------------------------

    def manages(self, module: nn.Module) -> bool:
        return getattr(module, "layer_idx", None) in self.layers and hasattr(module, "num_key_value_groups")

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and (attention_mask.ndim != 2 or not bool(attention_mask.all())):
            raise BadArgument(
                "attention_mask",
                tuple(attention_mask.shape),
                "a tapped model takes rows of equal length without padding",
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        layer = Tapped(self.layers[module.layer_idx], query, key, value, scale, softcap, s_aux, module)
        return self.serve(layer).transpose(1, 2).contiguous(), None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with no parameter asking for a gradient; both put back at the end."""
    training = {m: m.training for m in model.modules()}
    wanting = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Decoder layers keep their input only and run again in the backward pass: a third more time, little memory."""
    inner = compat.unwrap(model)
    attentions = set(compat.attention_modules(inner))
    owners = [m for m in inner.modules() if attentions & set(m.children())]
    before = {m: m.__dict__.get("forward") for m in owners}
    for owner in owners:
        owner.forward = _Recompute(owner.forward)
    try:
        yield
    finally:
        for owner, forward in before.items():
            if forward is None:
                del owner.forward
            else:
                owner.forward = forward


class _Recompute:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
