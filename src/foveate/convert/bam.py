"""BAM: several dense checkpoints of one build in one, their attention mixed softly, their MLPs chosen by a router.

Source: Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
arXiv:2408.08274, section 3: embeddings, norms and head are averaged, attention and feed-forward networks are experts,
routers start at random. The paper's block is parallel (Phi has one such); in serial blocks, as most families have, the
feed-forward experts read what attention gave, which deviates from it. It then trains on 100 B tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.errors import BadArgument, Refused
from foveate.layers.feedforward import FeedForwardExperts
from foveate.layers.softmax import HeadGeometry, SoftmaxHeads
from foveate.models.converted import decoder_layers, replace, replace_feed_forward
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUTER = 0.02
"""Standard deviation of a router's first weights."""


@register
@dataclass(frozen=True)
class Bam(Conversion):
    """Upcycle dense checkpoints to a mixture of experts in attention and feed-forward networks.

    Args:
        experts: folders of checkpoints of the model's build, which itself is the first expert; or a number: so many
            copies of the model itself.
        keys: "experts", keys and values of each expert's own, in as many times the cache; or "shared", their mean.
        top_k: feed-forward experts that serve a token.
        gate: "normalised", or the paper's "probability", with which even equal experts are another model until it is
            trained (see `FeedForwardExperts`).
        seed: of the routers.
    """

    experts: int | list[str] | tuple[str, ...] = 4
    keys: Literal["experts", "shared"] = "experts"
    top_k: int = 1
    gate: Literal["normalised", "probability"] = "normalised"
    seed: int = 0

    id: ClassVar[str] = "bam"
    what: ClassVar[str] = "mixture of attention and feed-forward experts made of several dense checkpoints"

    @property
    def count(self) -> int:
        """How many experts there will be."""
        return self.experts if isinstance(self.experts, int) else 1 + len(self.experts)

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        if self.count < 2:
            raise BadArgument("experts", self.experts, "give at least 2, or the folder of another checkpoint")
        if not 1 <= self.top_k <= self.count:
            raise BadArgument("top_k", self.top_k, f"give 1 to {self.count}, the experts to choose among")
        for name, one, other in (("keys", "experts", "shared"), ("gate", "normalised", "probability")):
            if getattr(self, name) not in (one, other):
                raise BadArgument(name, getattr(self, name), f'give "{one}" or "{other}"')
        for layer, held in zip(decoder_layers(model), shape.layers, strict=True):
            if held.latent or held.kind == "other" or isinstance(layer.self_attn, SoftmaxHeads):
                raise Refused(f"layer {held.index} is not plain softmax attention, of which bam makes experts")
            if isinstance(layer.mlp, FeedForwardExperts):
                raise Refused(f"layer {held.index} holds feed-forward experts already")
            HeadGeometry.of(layer.self_attn)
        if not isinstance(self.experts, int):
            from transformers import AutoConfig

            for folder in self.experts:
                _check_alike(folder, AutoConfig.from_pretrained(folder), model.config)

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        alike = isinstance(self.experts, int)
        others = [] if isinstance(self.experts, int) else [_opened(folder, model) for folder in self.experts]
        layers = decoder_layers(model)
        attention = [[layer.self_attn for layer in layers]]
        networks = [[layer.mlp for layer in layers]]
        for other in others:
            attention.append([layer.self_attn for layer in decoder_layers(other)])
            networks.append([layer.mlp for layer in decoder_layers(other)])
        if alike:
            attention, networks = attention * self.count, networks * self.count
        else:
            moved = _average(model, others)
            yield Stage("embeddings, norms and head averaged", exact=False, facts={"moved": moved})

        generator = torch.Generator().manual_seed(self.seed)
        for index, experts in enumerate(zip(*attention, strict=True)):
            geometry = HeadGeometry.of(experts[0]).json()
            made: Any = replace(
                model, index, "attention-experts", geometry=geometry, experts=self.count, keys=self.keys
            )
            made.take([read_heads(expert) for expert in experts])
            _draw(made.gate.weight, generator)
        yield Stage(f"{self.count} attention experts", exact=alike, facts={"keys": self.keys})

        for index, experts in enumerate(zip(*networks, strict=True)):
            expert_layer = replace_feed_forward(
                model, index, "experts", experts=self.count, top_k=self.top_k, gate=self.gate
            )
            expert_layer.take(experts)
            _draw(expert_layer.gate.weight, generator)
        yield Stage(
            f"{self.count} feed-forward experts",
            exact=alike and self.gate == "normalised",
            facts={"parameters_per_layer": sum(p.numel() for p in layers[0].parameters())},
        )


def _check_alike(folder: str, config: Any, own: Any) -> None:
    """Refuse a checkpoint of another build than ours."""
    family = own.model_type.removeprefix("foveate_")
    if config.model_type != family:
        raise Refused(f"{folder} is a {config.model_type} model; its attention cannot be an expert beside {family}'s")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "vocab_size", "rope_parameters", "tie_word_embeddings")
    for name in names:
        theirs, ours = getattr(config, name, None), getattr(own, name, None)
        if theirs != ours:
            raise Refused(f"{folder} has {name} {theirs}, this model {ours}: experts must be of one build")


def _opened(folder: str, model: PreTrainedModel) -> Any:
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    return made.to(model.device).eval()


@torch.no_grad()
def _average(model: Any, others: list[Any]) -> float:
    """Average what is neither attention nor feed-forward network.

    Returns:
        By how much that moved the model's own numbers, as relative root mean square.
    """
    moved = size = 0.0
    theirs = [dict(other.named_parameters()) for other in others]
    for name, parameter in model.named_parameters():
        if ".self_attn." in name or ".mlp." in name:
            continue
        before = parameter.double()
        mean = torch.stack([before, *(held[name].double() for held in theirs)]).mean(0)
        moved += float((mean - before).square().sum())
        size += float(before.square().sum())
        parameter.copy_(mean)
    return (moved / size) ** 0.5


@torch.no_grad()
def _draw(weight: Tensor, generator: torch.Generator) -> None:
    weight.copy_(_ROUTER * torch.randn(weight.shape, generator=generator))
