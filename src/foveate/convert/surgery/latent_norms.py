"""Norms for latents that have none, as DeepSeek's loaders expect them: fitted to calibration text, to be healed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.convert.base import Stage
from foveate.layers.latent import LatentAttention
from foveate.models.converted import decoder_layers, replace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("kv_a_layernorm", "q_a_layernorm")
EPSILON = 1e-6


@dataclass(frozen=True)
class Fit:
    """The norm that changes a latent least.

    Args:
        gain: [rank].
        error: relative root mean square by which it changes the latents of the text.
        size: root mean square of their entries.
    """

    gain: Tensor
    error: float
    size: float

    @property
    def scale(self) -> float:
        """A power of two that brings the entries to about 1, which the norm undoes: what loaders add under the root
        (1e-6 in some, the model's own epsilon in others) then makes no difference."""
        return 2.0 ** -round(math.log2(max(self.size, 1e-30)))


@torch.no_grad()
def fitted(model: PreTrainedModel, batches: Iterable[Tensor]) -> dict[tuple[int, str], Fit]:
    """By (layer, name of the norm) for every latent without a norm, the gains of an RMS norm that changes it least.

    With c a latent and u = c / rms(c), the sum over tokens of (g[j] u[j] - c[j])^2 is least at
    g[j] = sum(u[j] c[j]) / sum(u[j]^2).

    Args:
        batches: token ids [B, N] without padding.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for index, layer in enumerate(decoder_layers(model)):
        module = layer.self_attn
        if not isinstance(module, LatentAttention) or module.norm != "none":
            continue
        for name in NAMES:
            if hasattr(module, name):
                hooks.append(getattr(module, name).register_forward_pre_hook(_collector(sums, (index, name))))
    try:
        for batch in batches if hooks else ():
            model(batch.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for key, (ones, mixed, own) in sums.items():
        gain = mixed / ones.clamp_min(1e-30)
        left = (own - mixed * gain).sum().clamp_min(0)
        total = own.sum().clamp_min(1e-30)
        # The squares of u add up to the number of entries.
        found[key] = Fit(gain, math.sqrt(float(left / total)), math.sqrt(float(total / ones.sum())))
    return found


def _collector(sums: dict[tuple[int, str], Tensor], key: tuple[int, str]):
    """Adds up u^2, u c and c^2 over tokens, [3, rank]."""

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        c = inputs[0].flatten(0, -2).double()
        u = c * (c.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        added = torch.stack([u.square().sum(0), (u * c).sum(0), c.square().sum(0)])
        sums[key] = sums[key] + added if key in sums else added

    return hook


@torch.no_grad()
def fit_norms(model: PreTrainedModel, batches: Iterable[Tensor]) -> Stage | None:
    """Give every latent without a norm the one that changes it least on this text; None if all have one."""
    fits = fitted(model, batches)
    for index in sorted({layer for layer, _ in fits}):
        old: Any = decoder_layers(model)[index].self_attn
        new: Any = replace(model, index, old.kind, **{**old.spec, "norm": "rms"})
        new.load_state_dict(old.state_dict(), strict=False)
        for name, down in zip(NAMES, ("kv_a_proj_with_mqa", "q_a_proj"), strict=True):
            if (fit := fits.get((index, name))) is not None:
                getattr(new, name).weight.copy_(fit.gain)
                for tensor in getattr(new, down).parameters():
                    tensor[: len(fit.gain)] *= fit.scale
    if not fits:
        return None
    errors = {
        name: [fits[layer, name].error for layer, each in sorted(fits) if each == name]
        for name in NAMES
        if any(each == name for _, each in fits)
    }
    return Stage("norms on latents", False, {"norm_error": errors})
