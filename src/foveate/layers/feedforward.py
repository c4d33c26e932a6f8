"""Layers that stand in the place of a decoder's feed-forward network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.errors import BadArgument
from foveate.layers.routing import Routed, Routing, top_k, widened


class FeedForwardExperts(Routed):
    """Feed-forward networks of which each token takes the `top_k` that a linear router finds likeliest.

    Sources: Switch Transformers (Fedus et al., arXiv:2101.03961, section 2); its place in upcycling: BAM (Zhang et al.,
    arXiv:2408.08274, section 3.1).

    Args:
        network: one such network; each expert starts as a copy of it.
        experts: how many.
        gate: "probability", an expert's output times its probability p_i (Switch, BAM), which makes experts that were
            copied from one model weaker than it; or "normalised", times p_i over the sum of the probabilities of those
            taken, a constant to the gradient: the outputs of equal experts stay, and the router learns all the same.

    Raises:
        BadArgument: numbers that do not make a layer.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        experts: int,
        top_k: int = 1,
        gate: Literal["normalised", "probability"] = "normalised",
    ) -> None:
        super().__init__()
        if experts < 1:
            raise BadArgument("experts", experts, "give at least 1")
        if not 1 <= top_k <= experts:
            raise BadArgument("top_k", top_k, f"give 1 to {experts}, the experts to choose among")
        if gate not in ("normalised", "probability"):
            raise BadArgument("gate", gate, 'give "normalised" or "probability"')
        self.top_k, self.gating = top_k, gate
        self.experts = nn.ModuleList(copy.deepcopy(network) for _ in range(experts))
        like = next(network.parameters())
        width = next(part.in_features for part in network.modules() if isinstance(part, nn.Linear))
        self.gate = nn.Linear(width, experts, bias=False, device=like.device, dtype=like.dtype)

    @property
    def spec(self) -> dict[str, Any]:
        """The keyword arguments that make this layer again: JSON values."""
        return {"experts": len(self.experts), "top_k": self.top_k, "gate": self.gating}

    def take(self, networks: Sequence[nn.Module]) -> None:
        """Copy the weights of the experts.

        Raises:
            BadArgument: another number of them.
        """
        if len(networks) != len(self.experts):
            raise BadArgument("experts", len(networks), f"give {len(self.experts)}")
        for expert, network in zip(self.experts, networks, strict=True):
            expert.load_state_dict(network.state_dict())

    def route(self, tokens: Tensor) -> Routing:
        """Gates [T, experts] of tokens [T, d]."""
        logits = widened(self.gate(tokens))
        probabilities = logits.softmax(-1)
        chosen = top_k(logits.detach(), self.top_k)
        gates = probabilities * chosen
        if self.gating == "normalised":
            gates = gates / gates.sum(-1, keepdim=True).detach()
        return Routing(gates, chosen, probabilities, chosen, logits)

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        routing = self.route(tokens)
        self.note(routing)
        gates = routing.gates.to(tokens.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            at = routing.chosen[:, index].nonzero().squeeze(-1)
            out = out.index_add(0, at, gates[at, index].unsqueeze(-1) * expert(tokens[at]))
        return out.view_as(hidden_states)


class NoFeedForward(nn.Module):
    """Adds nothing: a decoder layer of attention alone.

    Args:
        network: what stood here.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()

    @property
    def spec(self) -> dict[str, Any]:
        """The keyword arguments that make this layer again: none."""
        return {}

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


FEED_FORWARD: dict[str, type[Any]] = {"experts": FeedForwardExperts, "none": NoFeedForward}
"""Every kind of layer by the name that configurations call it by."""


def build_feed_forward(kind: str, network: nn.Module, spec: dict[str, Any]) -> Any:
    """The layer of this kind that takes the place of a network; of one that holds experts, of the first of them.

    Raises:
        BadArgument: an unknown kind, or numbers that this kind does not take.
    """
    if kind not in FEED_FORWARD:
        raise BadArgument("kind", kind, f"give one of {', '.join(sorted(FEED_FORWARD))}")
    if isinstance(network, FeedForwardExperts):
        network = network.experts[0]
    try:
        return FEED_FORWARD[kind](network, **spec)
    except TypeError as error:
        raise BadArgument("spec", spec, f"{kind} does not take this: {error}") from error
