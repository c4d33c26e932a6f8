"""Gates on kv heads, learned on a frozen model: how much of each head's far attention does the model need?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.errors import BadArgument, Refused
from foveate.heads.passkeys import Example
from foveate.heads.tap import Tap, Tapped, frozen, recomputed
from foveate.models.shape import LayerShape, ModelShape


@dataclass(frozen=True)
class GateRecipe:
    """How gates are learned.

    Args:
        steps: optimiser steps, one text each.
        lr: peak learning rate of AdamW (no weight decay); it climbs from a tenth over the first fifth of the steps and
            falls back over the last.
        l1: weight of the mean gate in the loss.
        full_term: where a gate's full attention comes from: "teacher", the unchanged stream (exactly lossless with all
            gates at 1, as released), or "self", the gated stream's own q, k, v (what a deployed model computes).

    Source: DuoAttention (2410.10819), section 2.2 and appendix; released code for the schedule.
    """

    steps: int = 2000
    lr: float = 0.02
    l1: float = 0.05
    full_term: Literal["teacher", "self"] = "teacher"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadArgument("steps", self.steps, "give at least 1")
        if not self.lr > 0:
            raise BadArgument("lr", self.lr, "it must be above 0")
        if self.l1 < 0:
            raise BadArgument("l1", self.l1, "it must not be below 0")
        if self.full_term not in ("teacher", "self"):
            raise BadArgument("full_term", self.full_term, 'give "teacher" or "self"')


@dataclass(frozen=True)
class Learned:
    """Gates after training.

    Attributes:
        gates: per layer of the model one number in [0, 1] per kv head; None in layers without gates.
        losses: distance to the unchanged model at each step, without the l1 term.
        tokens: how many were trained on.
    """

    gates: list[list[float] | None]
    losses: list[float]
    tokens: int


Other = Callable[[Tapped], Tensor]
"""What a head gives as far as its gate is closed: [B, H, N, Dv]."""


def gated_layers(shape: ModelShape) -> tuple[LayerShape, ...]:
    """The layers whose kv heads can be told apart: full attention, one cached head per kv head.

    Raises:
        Refused: latent attention (MLA), whose heads share one cached vector.
    """
    layers = tuple(layer for layer in shape.layers if layer.kind == "full")
    if any(layer.latent for layer in layers):
        raise Refused(f"{shape.name} caches one latent vector for all heads (MLA), so no head can be held differently")
    if not layers:
        raise Refused(f"{shape.name} has no layer with full attention, so there is no head to choose")
    return layers


@torch.no_grad()
def unchanged(model: nn.Module, ids: Tensor, layers: frozenset[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The model as it is: final hidden states [B, N, d] (after the last norm) and the head outputs [B, H, N, Dv] of
    the given layers."""
    outputs: dict[int, Tensor] = {}

    def serve(layer: Tapped) -> Tensor:
        out = layer.attend()
        if layer.shape.index in layers:
            outputs[layer.shape.index] = out
        return out

    with Tap(model, serve):
        return _hidden(model, ids), outputs


@contextmanager
def gated(
    model: nn.Module, ids: Tensor, gates: Mapping[int, Tensor], other: Other, full: Mapping[int, Tensor] | None = None
) -> Iterator[Tensor]:
    """Final hidden states [B, N, d] with gate * full attention + (1 - gate) * `other` in every gated head.

    A context, to be left after the backward pass, in which layers may be run again.

    Args:
        ids: [B, N].
        gates: by layer, [Hkv]; used as if clamped to [0, 1]; shared by the query heads of a kv head.
        other: what a closed gate leaves, made of the gated stream's own q, k, v.
        full: head outputs of the unchanged stream; None: full attention of the gated stream itself.
    """

    def serve(layer: Tapped) -> Tensor:
        gate = gates.get(layer.shape.index)
        if gate is None:
            return layer.attend()
        whole = layer.attend() if full is None else full[layer.shape.index]
        gate = gate.to(whole.device).clamp(0, 1).repeat_interleave(whole.shape[1] // len(gate)).view(1, -1, 1, 1)
        return (gate * whole.float() + (1 - gate) * other(layer).float()).to(whole.dtype)

    with Tap(model, serve):
        yield _hidden(model, ids)


class Gates(Protocol):
    """One number in [0, 1] per kv head, over all gated layers in order, however it is parametrised."""

    def parameters(self) -> list[Tensor]:
        """What the optimiser changes."""
        ...

    def draw(self) -> Tensor:
        """The gates of one step [heads], with gradient."""
        ...

    def penalty(self) -> Tensor:
        """What the loss adds for gates that are open."""
        ...

    def settle(self) -> None:
        """Called after each step of the optimiser."""
        ...

    def final(self) -> Tensor:
        """The gates as they are now [heads], without chance or gradient."""
        ...


class Clamped:
    """Gates that are themselves optimised, from 1 on, and kept in [0, 1]."""

    def __init__(self, heads: int, l1: float, device: torch.device) -> None:
        self.values, self.l1 = torch.ones(heads, device=device, requires_grad=True), l1

    def parameters(self) -> list[Tensor]:
        return [self.values]

    def draw(self) -> Tensor:
        return self.values

    def penalty(self) -> Tensor:
        return self.l1 * self.values.clamp(0, 1).mean()

    @torch.no_grad()
    def settle(self) -> None:
        self.values.clamp_(0, 1)

    def final(self) -> Tensor:
        return self.values.detach()


Distance = Callable[[Tensor, Tensor], Tensor]
"""How far final hidden states [B, n, d] of the gated stream are from those of the unchanged one: a scalar."""


def squared(hidden: Tensor, goal: Tensor) -> Tensor:
    """Mean over channels and tokens of the squared difference."""
    return (hidden.float() - goal.float()).square().mean()


def learn_gates(
    model: nn.Module,
    examples: Iterable[Example],
    other: Other,
    recipe: GateRecipe,
    report: Callable[[int, str], None] | None = None,
    gates: Gates | None = None,
    distance: Distance = squared,
) -> Learned:
    """Optimise one gate per kv head so that the model stays close to itself while gates close where they can.

    Loss: distance of the final hidden states of the gated and the unchanged stream over the label tokens, plus what
    open gates cost. The two streams run one after the other instead of as two rows of one batch: the same numbers,
    without a backward pass through the unchanged one. Nothing but the gates gets a gradient.

    Args:
        model: a transformers decoder-only model, on any device and in any dtype; left as it was.
        examples: at least `recipe.steps` of them.
        other: what a closed gate leaves of a head.
        report: called after each step with 1 and the loss in words.
        gates: None: `Clamped` ones under `recipe.l1`.

    Raises:
        Refused: latent attention.
        BadArgument: too few examples.
    """
    model = compat.unwrap(model)
    shape = ModelShape.of(model)
    layers = gated_layers(shape)
    names, sizes = [layer.index for layer in layers], [layer.num_kv_heads for layer in layers]
    device = next(model.parameters()).device
    gates = Clamped(sum(sizes), recipe.l1, device) if gates is None else gates
    optimiser = torch.optim.AdamW(gates.parameters(), lr=recipe.lr, weight_decay=0.0)
    losses: list[float] = []
    tokens = 0
    with frozen(model):
        for step, example in enumerate(islice(examples, recipe.steps)):
            ids = torch.tensor([example.ids], device=device)
            goal, outputs = unchanged(model, ids, frozenset(names))
            full = outputs if recipe.full_term == "teacher" else None
            drawn = dict(zip(names, gates.draw().split(sizes), strict=True))
            again = recomputed(model) if crowded(shape, ids.shape[1], device) else nullcontext()
            with again, gated(model, ids, drawn, other, full) as hidden:
                apart = distance(hidden[:, example.labels :], goal[:, example.labels :])
                optimiser.zero_grad(set_to_none=True)
                (apart + gates.penalty()).backward()
            optimiser.param_groups[0]["lr"] = recipe.lr * trapezoid(step, recipe.steps)
            optimiser.step()
            gates.settle()
            losses.append(float(apart.detach()))
            tokens += ids.shape[1]
            if not math.isfinite(losses[-1]):
                raise Refused(f"the distance is {losses[-1]} at step {step}; load the model in bfloat16 or float32")
            if report is not None:
                report(1, f"distance {losses[-1]:.4g}, mean gate {float(gates.final().mean()):.2f}")
    if len(losses) < recipe.steps:
        raise BadArgument("data", f"{len(losses)} examples", f"{recipe.steps} steps need one each; give more")
    learned = dict(zip(names, gates.final().cpu().split(sizes), strict=True))
    table = [[round(float(g), 6) for g in learned[i]] if i in learned else None for i in range(len(shape.layers))]
    return Learned(table, losses, tokens)


def trapezoid(step: int, steps: int, ramp: float = 0.2, low: float = 0.1) -> float:
    """Factor of the learning rate at a step: up from `low` over the first share `ramp` of steps, down over the last."""
    edge = max(1.0, ramp * steps)
    return min(1.0, low + (1 - low) * step / edge, low + (1 - low) * (steps - 1 - step) / edge)


def crowded(shape: ModelShape, tokens: int, device: torch.device) -> bool:
    """Whether the activations of one training forward would take more than half of the GPU's free memory."""
    if device.type != "cuda":
        return False
    # About 20 vectors of the hidden size are kept per layer and token (attention, the two norms, the wider MLP).
    return (
        40 * len(shape.layers) * shape.hidden_size * shape.dtype.itemsize * tokens > torch.cuda.mem_get_info(device)[0]
    )


def made_with(model: nn.Module) -> dict[str, str]:
    """Device, dtype, versions and date, for the provenance of what was learned."""
    parameter = next(model.parameters())
    name = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else parameter.device.type
    versions = {package: version(package) for package in ("foveate", "torch", "transformers")}
    today = date.today().isoformat()
    return {"device": name, "dtype": str(parameter.dtype).removeprefix("torch.")} | versions | {"date": today}


def _hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return compat.base_model(compat.unwrap(model))(input_ids=ids, use_cache=False).last_hidden_state
