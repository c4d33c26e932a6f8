"""Routers: who of several heads or experts works for a token, with what gate, and how evenly the work is spread.

Sources: MoH (Jin et al., arXiv:2410.11842, section 3 and the authors' code); BAM (Zhang et al., arXiv:2408.08274,
sections 3.2 and 3.3); the balance loss is that of Switch Transformers (Fedus et al., arXiv:2101.03961, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.errors import BadArgument, FoveateError


@dataclass(frozen=True)
class Routing:
    """What a router said of some tokens.

    Args:
        gates: [..., E] what each expert's output is multiplied by, 0 where it is not asked.
        active: bool [..., E].
        probabilities: [..., R] the router's softmax over the R experts that it chooses among.
        chosen: bool [..., R] those of them that it took.
        logits: [..., R] before that softmax.
    """

    gates: Tensor
    active: Tensor
    probabilities: Tensor
    chosen: Tensor
    logits: Tensor


def widened(logits: Tensor) -> Tensor:
    """In float32 at least: what a softmax is taken of."""
    return logits if logits.dtype == torch.float64 else logits.float()


def top_k(scores: Tensor, k: int) -> Tensor:
    """Bool [..., R]: the k greatest of each row, exactly k of them.

    Raises:
        BadArgument: k is not in 1..R.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise BadArgument("top_k", k, f"give 1 to {scores.shape[-1]}, the experts to choose among")
    best = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, bit for bit, with the gradient of `soft`."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Sum over experts of P_i f_i: mean probability times share of tokens that take the expert.

    k/R when tokens spread evenly, more when the router prefers the experts that it takes. Papers multiply it by R
    (Switch, BAM; MoH's code, where it is then k) or do not (MoH's text).
    """
    share = chosen.flatten(0, -2).to(probabilities.dtype).mean(0)
    return (probabilities.flatten(0, -2).mean(0) * share).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)²: keeps a router's logits small."""
    return logits.logsumexp(-1).square().mean()


class TwoStageRouter(nn.Module):
    """Linear scores in two stages: how much shared and routed heads weigh together, and each within its part.

    Gates are scaled as in MoH's released code, so that equal scores give 1 to every head that works: shared ones
    2 α1 S softmax(W_s x), routed ones 2 α2 k softmax(W_r x) renormalised over the k that are taken, with
    (α1, α2) = softmax(W_h x). Without shared heads there is one part and no α. The last layer of each part starts at
    zero: all scores equal.

    Args:
        width: of a token.
        shared: how many heads always work, S. routed: how many are chosen among, R.
    """

    def __init__(self, width: int, shared: int, routed: int) -> None:
        super().__init__()
        self.shared, self.routed = shared, routed
        self.parts = nn.Linear(width, 2, bias=False) if shared else None
        self.within = nn.Linear(width, shared, bias=False) if shared > 1 else None
        self.among = nn.Linear(width, routed, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """All scores equal, whatever the token."""
        for linear in (self.parts, self.within, self.among):
            if linear is not None:
                linear.weight.zero_()

    def forward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., d] -> gates of the shared heads [..., S], of the routed ones [..., R], and these's logits."""
        logits = widened(self.among(x))
        probabilities = logits.softmax(-1)
        taken = probabilities * top_k(logits, k)
        routed = k * taken / taken.sum(-1, keepdim=True)
        if self.parts is None:
            return routed.new_zeros(*x.shape[:-1], 0), routed, logits
        alpha = 2 * widened(self.parts(x)).softmax(-1)
        within = alpha.new_ones(*x.shape[:-1], 1) if self.within is None else widened(self.within(x)).softmax(-1)
        return alpha[..., :1] * self.shared * within, alpha[..., 1:] * routed, logits


def norm_scores(q: Tensor) -> Tensor:
    """MoH's router without parameters: lengths of a token's queries [..., R, D], over their deviation, [..., R]."""
    lengths = torch.linalg.vector_norm(widened(q), dim=-1)
    if lengths.shape[-1] == 1:
        return lengths
    return lengths / lengths.std(-1, keepdim=True).clamp(min=1e-6)


class RoutingLosses(NamedTuple):
    """What training adds to its loss, each times a weight of its own.

    Args:
        balance: R sum P_i f_i over the R experts of a router: how many a token takes when tokens spread evenly, more
            otherwise.
        z: mean over tokens of logsumexp(logits)².
    """

    balance: Tensor
    z: Tensor


class Routed(nn.Module):
    """A part of a model that routes tokens; what its last forward routed can be asked for once.

    A forward notes it only while gradients are recorded, and asking forgets it, so that no loss of one step is left
    for the next.
    """

    _noted: Routing | None = None

    def note(self, routing: Routing) -> None:
        """Keep what this forward routed, where somebody may train on it."""
        self._noted = routing if torch.is_grad_enabled() else None

    def noted(self) -> Routing:
        """What the last forward routed; forgotten afterwards.

        Raises:
            FoveateError: there was none with gradients since it was last asked for.
        """
        if self._noted is None:
            raise FoveateError("no forward with gradients was routed since its losses were last asked for")
        routing, self._noted = self._noted, None
        return routing

    def losses(self) -> RoutingLosses:
        """Of the last forward with gradients; each forward can be asked once.

        Raises:
            FoveateError: there was none since.
        """
        routing = self.noted()
        experts = routing.probabilities.shape[-1]
        return RoutingLosses(experts * balance_loss(routing.probabilities, routing.chosen), z_loss(routing.logits))

    def balance_loss(self) -> Tensor:
        """The first of `losses`."""
        return self.losses().balance


def routing_losses(model: nn.Module) -> RoutingLosses:
    """The sums over a model's routed layers of their losses of the last forward; each forward counts once.

    Raises:
        FoveateError: the model routes nothing, or there was no forward with gradients since.
    """
    parts = [module.losses() for module in model.modules() if isinstance(module, Routed)]
    if not parts:
        raise FoveateError("no layer of this model routes tokens")
    return RoutingLosses(*(torch.stack(each).sum() for each in zip(*parts, strict=True)))
