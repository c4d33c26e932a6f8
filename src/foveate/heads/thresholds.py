"""One threshold per query head: as high as the head's output allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.errors import BadArgument, Refused
from foveate.heads.passkeys import Example
from foveate.heads.tap import Tap, Tapped, frozen
from foveate.models.shape import ModelShape

Sparse = Callable[[Tensor, Tensor], Tensor]
"""(heads [h], thresholds [h]) -> what these query heads give under these thresholds: [B, h, N, Dv]."""


@dataclass(frozen=True)
class Halving:
    """How thresholds are searched.

    Args:
        theta: largest error: absolute differences to the exact output, summed over channels, averaged over tokens. The
            unit is that of the values, so a good one differs between models.
        start: the first threshold tried.
        least: where this is still too high, the threshold is 0.

    Source: SALE (2505.24179), released code.
    """

    theta: float = 0.4
    start: float = 0.008
    least: float = 1e-4

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise BadArgument("theta", self.theta, "it must be above 0")
        if not 0 < self.least <= self.start:
            raise BadArgument("least", self.least, f"it must be above 0 and at most start={self.start}")


@torch.no_grad()
def halve_thresholds(
    model: nn.Module,
    examples: Iterable[Example],
    prepare: Callable[[Tapped], Sparse],
    rule: Halving,
    report: Callable[[int, str], None],
) -> list[list[float] | None]:
    """Per layer one threshold per query head (None in layers without full attention): halved from `rule.start` until
    the head is close enough on every text. Each head is measured with all others exact.

    Args:
        prepare: makes what is common to all thresholds of a layer on one text.
        report: called after each text with 1 and how many heads are sparse.

    Raises:
        Refused: no layer has full attention.
        BadArgument: no examples.
    """
    shape = ModelShape.of(compat.unwrap(model))
    device = next(model.parameters()).device
    found = {x.index: torch.full((x.num_heads,), rule.start, device=device) for x in shape.layers if x.kind == "full"}
    if not found:
        raise Refused(f"{shape.name} has no layer with full attention, so there is no threshold to find")

    def serve(layer: Tapped) -> Tensor:
        exact = layer.attend()
        if layer.shape.index in found:
            _lower(exact, prepare(layer), found[layer.shape.index], rule)
        return exact

    done = 0
    with frozen(model), Tap(model, serve):
        for example in examples:
            model(torch.tensor([example.ids], device=device), use_cache=False, logits_to_keep=1)
            done += 1
            sparse = sum(int((tau > 0).sum()) for tau in found.values()) / sum(map(len, found.values()))
            report(1, f"{sparse:.0%} of the heads are sparse")
    if not done:
        raise BadArgument("data", "0 examples", "give at least one text")
    return [[round(x, 8) for x in found[i].tolist()] if i in found else None for i in range(len(shape.layers))]


def _lower(exact: Tensor, sparse: Sparse, tau: Tensor, rule: Halving) -> None:
    """Lower the thresholds of one layer in place, on one text."""
    heads = tau.nonzero().squeeze(1)
    while len(heads):
        away = (sparse(heads, tau[heads]).float() - exact[:, heads].float()).abs().sum((0, 2, 3))
        heads = heads[away >= rule.theta * exact.shape[2]]
        half = tau[heads] / 2
        tau[heads] = torch.where(half < rule.least, 0.0, half)
        heads = heads[tau[heads] > 0]
