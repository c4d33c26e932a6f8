"""MoH: turn a checkpoint's attention into a mixture of heads.

Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv:2410.11842, section 3.4: half of the
heads always work, the longest queries choose among the others, 75 % of the heads work for a token. The paper then
trains on 100 B tokens, with `foveate.layers.routing.routing_losses` times 0.01 in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate import compat
from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.errors import BadArgument, Refused
from foveate.layers.mixture_of_heads import COMPUTE
from foveate.layers.routing import Routed
from foveate.layers.softmax import HeadGeometry
from foveate.models.converted import decoder_layers, replace
from foveate.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QUIET = 0.01
"""Deviation of a fitted router's logits: enough to order heads, too little to weigh them otherwise than with 1."""
_RIDGE = 1e-3
"""Of the mean square of a token's entries, what the fit of a router adds to each."""


@register
@dataclass(frozen=True)
class Moh(Conversion):
    """Each token takes some of the heads.

    Args:
        active: share of a layer's heads that work for a token.
        shared: share of a layer's heads that work for every token; less than `active`.
        router: "norm", the heads with the longest queries (the paper's for checkpoints), or "linear", a trained one;
            without training it starts from a linear fit of how much each head writes, which is ours.
        shared_heads: "energy", those that write most into the residual stream on the calibration text (ours), or
            "first" (the paper).
        compute: "masked", all heads and a mask, "gathered", active pairs only, or "auto" (see `MixtureOfHeads`).
    """

    active: float = 0.75
    shared: float = 0.5
    router: Literal["norm", "linear"] = "norm"
    shared_heads: Literal["energy", "first"] = "energy"
    compute: Literal["auto", "masked", "gathered"] = "auto"

    id: ClassVar[str] = "moh"
    what: ClassVar[str] = "mixture of heads: a router gives each token some of the attention heads"

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        for name, known in (
            ("router", ("norm", "linear")),
            ("shared_heads", ("energy", "first")),
            ("compute", COMPUTE),
        ):
            if getattr(self, name) not in known:
                raise BadArgument(name, getattr(self, name), f"give one of {', '.join(known)}")
        for layer, held in zip(decoder_layers(model), shape.layers, strict=True):
            if held.latent or held.kind == "other":
                raise Refused(f"layer {held.index} is not softmax attention with heads of its own, which moh routes")
            if isinstance(layer.self_attn, Routed):
                raise Refused(f"layer {held.index} routes its heads already")
            self._counts(HeadGeometry.of(layer.self_attn).num_heads)

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        layers = decoder_layers(model)
        seen: list[_Seen] = []
        if self.shared_heads == "energy" or self.router == "linear":
            calibration.watch("reading what heads write")
            seen = _look(model, calibration)
        shared = []
        for index, layer in enumerate(layers):
            old = layer.self_attn
            geometry = HeadGeometry.of(old)
            always, _ = self._counts(geometry.num_heads)
            order = list(range(geometry.num_heads))
            if self.shared_heads == "energy":
                order = seen[index].energy.argsort(descending=True).tolist()
            made: Any = replace(
                model,
                index,
                "mixture-of-heads",
                geometry=geometry.json(),
                shared=sorted(order[:always]),
                top_k=geometry.num_heads - always,
                router=self.router,
                compute=self.compute,
            )
            made.take(old)
            shared.append(made.shared)
        yield Stage("routers, every head on", exact=True, facts={"shared": shared})

        kept = []
        for index, layer in enumerate(layers):
            made = layer.self_attn
            _, made.active = self._counts(made.geometry.num_heads)
            if made.gate is not None:
                kept.append(seen[index].fit(made))
            model.config.attention_layers[index]["spec"] = made.spec
        facts: dict[str, Any] = {"heads": [sum(self._counts(layer.self_attn.geometry.num_heads)) for layer in layers]}
        if kept:
            facts["explained"] = kept
        yield Stage(f"{self.active:.0%} of the heads for a token", exact=False, facts=facts)

    def _counts(self, heads: int) -> tuple[int, int]:
        """Heads that always work, and those that a token takes of the others."""
        if not 0 <= self.shared < 1:
            raise BadArgument("shared", self.shared, "give a share from 0 up to 1")
        if not 0 < self.active <= 1:
            raise BadArgument("active", self.active, "give a share above 0, at most 1")
        always, working = int(self.shared * heads + 0.5), int(self.active * heads + 0.5)
        if not always < working:
            raise BadArgument(
                "active",
                self.active,
                f"of {heads} heads {always} are shared (shared={self.shared:g}), so give {(always + 1) / heads:.3g} or "
                "more: a token must take one of the others",
            )
        return always, working - always


class _Seen:
    """Of one layer's calibration tokens: sums over tokens x [d] and what its heads wrote, float64."""

    def __init__(self, geometry: HeadGeometry, o: Tensor) -> None:
        heads = o.to(torch.float64).unflatten(1, (geometry.num_heads, -1)).transpose(0, 1)
        self.gram = heads.transpose(-1, -2) @ heads  # [H, D, D]: the squared length of what a head writes
        self.second, self.cross, self.energy, self.squares, self.count = 0.0, 0.0, torch.zeros(0), 0.0, 0
        self._x: Tensor | None = None

    def read(self, x: Tensor) -> None:
        self._x = x.detach().double().flatten(0, -2)

    def wrote(self, out: Tensor) -> None:
        out = out.detach().double().flatten(0, -2).unflatten(-1, (self.gram.shape[0], -1))
        energy = torch.einsum("thd,hde,the->th", out, self.gram, out)
        loud = energy.clamp(min=1e-30).log() / 2
        assert self._x is not None
        self.second, self.cross = self.second + self._x.T @ self._x, self.cross + self._x.T @ loud
        self.squares = self.squares + loud.T @ loud
        self.energy = energy.sum(0) if self.count == 0 else self.energy + energy.sum(0)
        self.count += len(loud)

    @torch.no_grad()
    def fit(self, layer: Any) -> float:
        """Let the layer's router predict the logarithm of what each routed head writes, relative to their mean.

        Returns:
            The share of that quantity's mean square that the fit explains.
        """
        second: Any = self.second / self.count
        center = torch.eye(len(layer.routed), dtype=torch.float64, device=second.device) - 1 / len(layer.routed)
        cross = self.cross[:, layer.routed] @ center / self.count  # pyright: ignore[reportIndexIssue]
        squares = self.squares[layer.routed][:, layer.routed] / self.count  # pyright: ignore[reportIndexIssue]
        ridge = _RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64, device=second.device)
        weight = torch.linalg.solve(second + ridge, cross).T
        spread = torch.einsum("rd,de,re->r", weight, second, weight).mean().sqrt()
        layer.gate.among.weight.copy_(weight * (_QUIET / spread.clamp(min=1e-30)))
        total = (center @ squares @ center).diagonal().sum()
        left = total - 2 * (weight * cross.T).sum() + torch.einsum("rd,de,re->", weight, second, weight)
        return float(1 - left / total)


@torch.no_grad()
def _look(model: Any, calibration: Calibration) -> list[_Seen]:
    """What each layer's heads write for the calibration text."""
    seen, handles = [], []
    for layer in decoder_layers(model):
        module = layer.self_attn
        last: Any = compat.output_projection(module)
        one = _Seen(HeadGeometry.of(module), last.weight.detach())
        seen.append(one)
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, one=one: one.read(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        handles.append(last.register_forward_pre_hook(lambda _, args, one=one: one.wrote(args[0])))
    was_training = model.training
    model.eval()
    try:
        for batch in calibration.batches():
            model(batch.to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen
