"""Minimal transformer: one matrix for queries and keys instead of two, and no MLP where that is asked for.

Source: "Reducing the Transformer Architecture to a Minimum", arXiv:2410.13732, whose models are trained from scratch. A
conversion is ours: of each head, the W in x_i W x_j that is nearest to the checkpoint's in its form, in the mean square
over pairs of calibration tokens taken as independent. Where queries and keys are rotated, the distance of a pair turns
W: "symmetric" keeps the rotation and fits each of its frequencies alone; the others have no positions and take the mean
of W over the distances in a context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.score_forms import form_square, mean_form, mean_square, symmetric, triangular
from foveate.errors import BadArgument, Refused
from foveate.layers.minimal import MinimalAttention
from foveate.layers.mixer import Mixer
from foveate.models.converted import decoder_layers, replace, replace_feed_forward
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
@dataclass(frozen=True)
class MinimalTransformer(Conversion):
    """Give each head one matrix for queries and keys.

    Args:
        qk: "symmetric", W = T' T of the rank of the head, rotated as before: queries are keys, and each query head
            gets keys and values of its own; "collapsed", any W, without positions, keys are the tokens themselves; or
            "cholesky", W = T T' with a triangle T, without positions.
        mlp: keep the feed-forward networks.
    """

    qk: Literal["symmetric", "collapsed", "cholesky"] = "symmetric"
    mlp: bool = True

    id: ClassVar[str] = "minimal-transformer"
    what: ClassVar[str] = "one matrix for queries and keys: symmetric, collapsed or triangular"

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        if self.qk not in ("symmetric", "collapsed", "cholesky"):
            raise BadArgument("qk", self.qk, 'give "symmetric", "collapsed" or "cholesky"')
        for layer, held in zip(decoder_layers(model), shape.layers, strict=True):
            module = layer.self_attn
            if isinstance(module, MinimalAttention):
                if module.qk != "separate":
                    raise Refused(f"layer {held.index} has one matrix for queries and keys already")
                continue
            if held.latent or held.kind == "other" or isinstance(module, Mixer):
                raise Refused(f"layer {held.index} is not plain softmax attention, of which one matrix could be made")
            weights = read_heads(module)
            if any(part is not None for part in (weights.q_bias, weights.k_bias, weights.v_bias, weights.o_bias)):
                raise Refused(f"layer {held.index} has biases, which minimal attention does not")
            if weights.q_norm is not None or weights.softcap is not None:
                raise Refused(f"layer {held.index} normalises queries or caps scores: they are no bilinear form")

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        layers = decoder_layers(model)
        moments = calibration.inputs(model)
        turns = _turns(model, calibration)
        before = [sum(p.numel() for p in layer.self_attn.parameters()) for layer in layers]
        kept, exact = [], True
        for index, layer in enumerate(layers):
            old = _Old(layer.self_attn)
            exact &= self.qk == "collapsed" and old.rotary_dim == 0
            second = moments[index].second
            made: Any = replace(
                model,
                index,
                "minimal",
                qk=self.qk,
                vo="none" if old.v is None else "full",
                heads=len(old.q),
                head_dim=old.q.shape[1],
                rotary_dim=old.rotary_dim if self.qk == "symmetric" else 0,
                scale=old.scale,
                window=old.window,
            )
            with torch.no_grad():
                if self.qk == "symmetric":
                    shared, share = symmetric(old.q, old.k, second, old.rotary_dim)
                    made.k_proj.weight.copy_(shared.flatten(0, 1))
                else:
                    cos, sin, weights = turns[index]
                    cos, sin = cos[:, : old.rotary_dim], sin[:, : old.rotary_dim]
                    whole = mean_form(old.q, old.k, cos, sin, weights)
                    missed = 0.0
                    if self.qk == "collapsed":
                        made.q_proj.weight.copy_(whole.transpose(1, 2).flatten(0, 1))
                    else:
                        triangles, missed = triangular(whole, second)
                        made.set_triangle(triangles)
                    total = mean_square(old.q, old.k, second, cos, sin, weights)
                    share = (form_square(whole, second) - missed) / max(total, 1e-60)
                if old.v is not None:
                    made.v_proj.weight.copy_(old.v)
                    made.o_proj.weight.copy_(old.o)
            kept.append(share)
        after = [sum(p.numel() for p in layer.self_attn.parameters()) for layer in layers]
        facts: dict[str, Any] = {"kept": kept, "attention_parameters": [sum(before), sum(after)]}
        yield Stage(f"{self.qk} queries and keys", exact=exact, facts=facts)
        if not self.mlp:
            dropped = sum(p.numel() for layer in layers for p in layer.mlp.parameters())
            for index in range(len(layers)):
                replace_feed_forward(model, index, "none")
            yield Stage("no MLP", exact=False, facts={"mlp_parameters": dropped})


class _Old:
    """What a layer computes, with keys and values of each query head's own: q, k [H, D, d], v [H D, d] or None."""

    def __init__(self, module: Any) -> None:
        if isinstance(module, MinimalAttention):
            parts = [linear.weight.detach().double() for linear in (module.q_proj, module.k_proj)]  # type: ignore[union-attr]
            self.q, self.k = (part.unflatten(0, (module.heads, -1)) for part in parts)
            self.v = None if module.v_proj is None else module.v_proj.weight.detach().double()
            self.o = None if module.o_proj is None else module.o_proj.weight.detach().double()
            self.scale, self.window, self.rotary_dim = module.scaling, module.window, module.rotary_dim
            return
        held = read_heads(module)
        self.q = held.q
        self.k = held.k.repeat_interleave(held.groups, dim=0)
        self.v = held.v.repeat_interleave(held.groups, dim=0).flatten(0, 1)
        self.o = held.o.transpose(0, 1).flatten(1)
        self.scale, self.window, self.rotary_dim = held.scale, held.window, held.rotary_dim


@torch.no_grad()
def _turns(model: Any, calibration: Calibration) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By layer, cos and sin [N, R] of each distance in a context, and the distances' shares of its causal pairs [N]."""
    seen: dict[int, Any] = {}
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: seen.update({index: kwargs["position_embeddings"]}),
            with_kwargs=True,
        )
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        model(calibration.tokens[:1].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    made = []
    for index in range(len(seen)):
        # Angles grow linearly, so those of position n are those of distance n; query and key both bear the scale that
        # position 0 shows.
        cos, sin = (part[0].double() for part in seen[index])
        scale = cos[0, 0].clone()
        pairs = torch.arange(len(cos), 0, -1, dtype=torch.float64, device=cos.device)
        made.append((cos * scale, sin * scale, pairs / pairs.sum()))
    return made
