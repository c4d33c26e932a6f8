"""SHRP: keep the heads of an encoder that tokens use most, and cut the others out.

Source: "SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression", arXiv:2512.20635; only its
abstract is known to us: heads are experts, the usage of a Top-1 router says which survive, one per layer; one expander
behind them replaces projection and MLP and is trained. Ours, because a checkpoint has no trained router and expander:
usage is counted by a router without parameters, the MLP stays, and the projection of the heads that are kept is fitted
by least squares to what all heads wrote on the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.errors import BadArgument
from foveate.heads.moments import Moments, collect
from foveate.layers.expert_heads import ExpertHeads
from foveate.models.encoders import check_encoder, encoder_layers, keep_heads, layer_flops, layer_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RIDGE = 1e-4
"""Of the mean variance of what heads give, what the fit of a projection adds to each."""


@register
@dataclass(frozen=True)
class Shrp(Conversion):
    """Keep the most used heads of each layer of an encoder.

    Args:
        heads: how many a layer keeps.
        router: whose usage counts: "written", the head that writes most for a token, or "norm", the head whose query
            is longest.
        fitted: fit the projection of the heads that stay; else their columns are taken as they are.
    """

    heads: int = 1
    router: Literal["written", "norm"] = "written"
    fitted: bool = True

    id: ClassVar[str] = "shrp"
    takes: ClassVar[str] = "encoder"
    what: ClassVar[str] = "encoders only: keep the attention heads that a router uses most"

    def check(self, model: PreTrainedModel, shape: None = None) -> None:
        check_encoder(model)
        fewest = min(layer.attention.self.num_attention_heads for layer in encoder_layers(model))
        if not 1 <= self.heads <= fewest:
            raise BadArgument("heads", self.heads, f"give 1 to {fewest}, the heads that a layer has")
        if self.router not in ("written", "norm"):
            raise BadArgument("router", self.router, 'give "written" or "norm"')

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        """Of a model of the type that `foveate.models.encoders.encoder_container` gives."""
        routed(model, self.router, k=None)
        yield Stage("heads as experts", exact=True)
        calibration.watch("counting which heads are used")
        usage = count_usage(model, calibration)
        written = None
        if self.fitted:
            layers = encoder_layers(model)
            modules = {index: layer.attention.output.dense for index, layer in enumerate(layers)}
            unrouted(model)
            written = collect(model, modules, calibration.batches())
        kept = prune_by_usage(model, usage, self.heads, written)
        yield Stage(
            f"{self.heads} heads a layer",
            exact=False,
            facts={
                "kept": kept,
                "usage": [counts.tolist() for counts in usage],
                "used": [float(each[keep].sum() / each.sum()) for each, keep in zip(usage, kept, strict=True)],
                **size(model, calibration),
            },
        )


def routed(model: Any, router: Literal["linear", "norm", "written"], k: int | None = 1) -> None:
    """Make experts of the heads of every layer; of k=None all serve. `unrouted` undoes it."""
    for layer in encoder_layers(model):
        inner, output = layer.attention.self, layer.attention.output.dense
        made = ExpertHeads(inner, output, router, k or inner.num_attention_heads)
        layer.attention.self = made.train(inner.training)


def unrouted(model: Any) -> None:
    """Take the routers out again."""
    for layer in encoder_layers(model):
        if isinstance(layer.attention.self, ExpertHeads):
            layer.attention.self = layer.attention.self.inner


@torch.no_grad()
def count_usage(model: Any, calibration: Calibration) -> list[torch.Tensor]:
    """Of how many tokens of the text each head of a routed encoder is the router's first choice, [H] a layer."""
    experts = [layer.attention.self for layer in encoder_layers(model)]
    for expert in experts:
        expert.usage.zero_()
    was_training = model.training
    model.eval()
    try:
        for batch in calibration.batches():
            model(batch.to(model.device))
    finally:
        model.train(was_training)
    return [expert.usage.clone() for expert in experts]


@torch.no_grad()
def prune_by_usage(
    model: Any, usage: list[torch.Tensor], heads: int, written: dict[int, Moments] | None = None
) -> list[list[int]]:
    """Cut all but the most used heads out of every layer, routers included: what is left is a plain encoder.

    Args:
        usage: [H] a layer. heads: how many to keep.
        written: by layer, moments of what all heads gave to the projection; with them it is fitted anew.

    Returns:
        The heads that each layer keeps, in order.
    """
    unrouted(model)
    kept = []
    for index, layer in enumerate(encoder_layers(model)):
        inner, out = layer.attention.self, layer.attention.output.dense
        keep = sorted(usage[index].argsort(descending=True, stable=True)[:heads].tolist())
        weight, bias = out.weight.double(), out.bias.double()
        keep_heads(layer, keep)
        if written is not None and len(keep) < len(usage[index]):
            rows = torch.cat([torch.arange(inner.attention_head_size) + h * inner.attention_head_size for h in keep])
            mean = written[index].mean
            spread = written[index].second - torch.outer(mean, mean)
            own = spread[rows][:, rows]
            own = own + _RIDGE * own.diagonal().mean() * torch.eye(len(rows), dtype=own.dtype, device=own.device)
            fitted = torch.linalg.solve(own, spread[rows] @ weight.T).T
            made = layer.attention.output.dense
            made.weight.copy_(fitted)
            made.bias.copy_(bias + weight @ mean - fitted @ mean[rows])
        kept.append(keep)
    before = getattr(model.config, "kept_heads", None)
    if before is not None:
        model.config.kept_heads = [[had[head] for head in keep] for had, keep in zip(before, kept, strict=True)]
    return kept


def size(model: Any, calibration: Calibration) -> dict[str, Any]:
    """Numbers and operations of the encoder's layers, for sequences as long as the calibration text's."""
    config, length = model.config, calibration.tokens.shape[1]
    parameters = flops = 0
    for layer in encoder_layers(model):
        inner = layer.attention.self
        numbers = (config.hidden_size, config.intermediate_size, inner.attention_head_size, inner.num_attention_heads)
        parameters += layer_parameters(*numbers)
        flops += layer_flops(*numbers, length)
    return {"layer_parameters": parameters, "layer_flops": flops, "length": length}
