"""Intermediate-layer distillation: each new layer learns by itself what the old one made of the same input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import BadArgument
from foveate.models.converted import decoder_layers


def layer_losses(
    student: Any, teacher: Any, ids: Tensor, layers: Sequence[int], attention: float = 1.0
) -> list[Tensor]:
    """By layer, the distance that its output has from the teacher's on the teacher's own input to that layer.

    Mean over tokens of the 2-norm between the layers' outputs, plus `attention` times that between their token mixers'
    (Zebra-Llama, arXiv 2505.17272, section 3.2, both at weight 1; MaTVLM, 2503.13440, the first alone). Each loss
    depends on the weights of its layer only.

    Args:
        ids: [B, N] token ids without padding.
    """
    losses: list[Tensor] = []
    with _watched(teacher, layers) as seen, torch.no_grad():
        teacher(ids.to(teacher.device), use_cache=False)
    for layer in layers:
        losses.append(_loss(decoder_layers(student)[layer], seen[layer], attention))
    return losses


def ild(
    student: Any,
    teacher: Any,
    batches: Iterable[Tensor],
    steps: int,
    lr: float = 2e-4,
    *,
    layers: Sequence[int] | None = None,
    attention: float = 1.0,
    watch: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train decoder layers of the student, whole, one by one on the teacher's inputs; the teacher is not changed.

    AdamW with a linear warm-up over a tenth of the steps and a cosine to zero, weight decay 0.01 on matrices, gradients
    cut at norm 1 layer by layer, in float32 whatever the model's dtype. Layers do not wait for each other: each learns
    what it would have learned alone.

    Args:
        batches: [B, N] token ids without padding, gone through again and again.
        lr: at the peak.
        layers: which; None: those whose attention was replaced.
        attention: weight of the token mixers' own outputs in the loss (see `layer_losses`).
        watch: told each step and its loss.

    Returns:
        By step, the loss summed over layers.

    Raises:
        BadArgument: steps below 1, no layer, or no batch.
    """
    if steps < 1:
        raise BadArgument("steps", steps, "give at least 1")
    if layers is None:
        entries = getattr(student.config, "attention_layers", None) or []
        layers = [index for index, entry in enumerate(entries) if entry is not None]
    if not layers:
        raise BadArgument("layers", [], "name a layer, or replace one first")
    held = list(batches)
    if not held:
        raise BadArgument("batches", "none", "give at least one batch of token ids [B, N]")
    modules = [decoder_layers(student)[layer] for layer in layers]
    dtype = next(modules[0].parameters()).dtype
    wide = torch.promote_types(dtype, torch.float32)
    asked = [parameter.requires_grad for parameter in student.parameters()]
    student.requires_grad_(False)
    for module in modules:
        module.to(wide).requires_grad_(True)
    each = [list(module.parameters()) for module in modules]
    every = list(itertools.chain.from_iterable(each))
    groups = [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    warm = max(1, steps // 10)
    told = []
    try:
        for step, ids in zip(range(steps), itertools.cycle(held), strict=False):
            share = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            with _watched(teacher, layers) as seen, torch.no_grad():
                teacher(ids.to(teacher.device), use_cache=False)
            total = 0.0
            with torch.enable_grad():
                for layer, module, parameters in zip(layers, modules, each, strict=True):
                    loss = _loss(module, seen.pop(layer), attention)
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            told.append(total)
            watch(step, total)
    finally:
        for module in modules:
            module.to(dtype)
        for parameter, wanted in zip(student.parameters(), asked, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None
    return told


class _Seen:
    """What one decoder layer of the teacher was called with, and what it and its attention returned."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.mixed = self.out = torch.empty(0)


@contextmanager
def _watched(teacher: Any, layers: Sequence[int]):
    """Fills in, by layer, what a forward of the teacher shows."""
    seen = {layer: _Seen() for layer in layers}
    hooks = []
    for layer, note in seen.items():
        module = decoder_layers(teacher)[layer]
        hooks.append(module.register_forward_hook(_whole(note), with_kwargs=True))
        hooks.append(module.self_attn.register_forward_hook(_mixer(note)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _whole(note: _Seen) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        note.args, note.kwargs, note.out = args, kwargs, _first(out)

    return hook


def _mixer(note: _Seen) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], out: Any) -> None:
        note.mixed = _first(out)

    return hook


def _loss(module: Any, seen: _Seen, attention: float) -> Tensor:
    dtype = next(module.parameters()).dtype
    note = _Seen()
    hook = module.self_attn.register_forward_hook(_mixer(note))
    try:
        out = _first(module(*_cast(seen.args, dtype), **_cast(seen.kwargs, dtype)))
    finally:
        hook.remove()
    loss = _distance(out, seen.out)
    return loss + attention * _distance(note.mixed, seen.mixed) if attention else loss


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over tokens of the 2-norm. Where both are equal its gradient is 0, not NaN."""
    return torch.linalg.vector_norm(ours - theirs.to(ours.dtype), dim=-1).mean()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _cast(given: Any, dtype: torch.dtype) -> Any:
    """The same with floating tensors in this dtype."""
    if isinstance(given, Tensor):
        return given.to(dtype) if given.is_floating_point() else given
    if isinstance(given, tuple):
        return tuple(_cast(each, dtype) for each in given)
    if isinstance(given, dict):
        return {name: _cast(each, dtype) for name, each in given.items()}
    return given
