"""CompressKV: few heads of each layer, known to retrieve, choose what all its heads hold."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from foveate.cache import View
from foveate.errors import BadArgument
from foveate.heads.gates import made_with
from foveate.heads.passkeys import Example, evenly, passkey_examples, running_examples, shortest
from foveate.heads.semantic import compression_errors, semantic_scores
from foveate.methods.base import Context, Method, Needs, Probe, Profile, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.layers import affordable, error_aware
from foveate.methods.policies.window import check_window, pooled, window_mass
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class CompressKV(Method):
    """When the prompt is over, each layer's semantic retrieval heads choose, by the attention of the prompt's last
    queries, which tokens all heads of the layer hold besides these queries' own. Layers whose output suffers most from
    being compressed hold most. Both are known from calibration. Later tokens are all held.

    Args:
        voters: query heads per layer that choose (paper: 4), the best by their semantic retrieval score. Each layer has
            voters, also one in which no head retrieves.
        window: last queries that choose (paper: 8).
        kernel: width of the average along the keys, odd; 1 is none.
        least: tokens that every layer holds (paper: 32), the window counted in.
        most: no layer holds more than this many times the average (paper: 3), nor more than there is: where the paper's
            bound lies beyond the prompt's end, what it would waste goes to the other layers.
        capacity: tokens per head and layer, on average, when no budget is given (paper: 128 to 2048).

    Source: 2508.02401, section 3; released code for the division of the budget. The paper measures its layers on the
    prompts of its benchmark; here texts of our own are used.
    """

    id = "compresskv"
    name = "CompressKV"
    paper = "2508.02401"
    slots = frozenset({"keep"})
    calibrated = True

    voters: int = 4
    window: int = 8
    kernel: int = 5
    least: int = 32
    most: float = 3.0
    capacity: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.kernel)
        if self.voters < 1:
            raise BadArgument("voters", self.voters, "give at least 1 query head per layer")
        if self.least < self.window:
            raise BadArgument("least", self.least, f"it must not be below window={self.window}")
        if self.most < 1:
            raise BadArgument("most", self.most, "give at least 1, which makes all layers alike")

    def stand_in(self, shape: ModelShape) -> Profile:
        """Heads and layers that count the more, the later they come."""
        scores = [[float(head) for head in range(layer.num_heads)] for layer in shape.layers]
        return made_up(self.id, shape, {"scores": scores, "errors": [1.0 + layer.index for layer in shape.layers]})

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        roles = [Role() for _ in shape.layers]
        managed = [layer for layer in shape.layers if layer.kind == "full"]
        try:
            table = {} if profile is None else profile.data
            scores = {x.index: [float(table["scores"][x.index][head]) for head in range(x.num_heads)] for x in managed}
            errors = tuple(float(table["errors"][layer.index]) for layer in managed)
        except (KeyError, IndexError, TypeError, ValueError):
            mend = f"{self.id} needs scores and errors of this model's layers: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        for layer in managed:
            extra = {"voters": best(scores[layer.index], self.voters), "errors": errors}
            roles[layer.index] = Role("vote", extra=extra)
        return roles

    def needs(self, role: Role) -> Needs:
        return Needs(window=self.window)

    def total(self, shape: ModelShape, length: int) -> int:
        budget = Budget.of(self.budget) or Budget.tokens(self.capacity)
        return budget.held_tokens(shape, length, name=self.id, floor=self.least)

    def layer_total(self, role: Role, shape: ModelShape, layer: int, length: int) -> int:
        managed = [x for x in shape.layers if x.kind == "full"]
        weights = [shape.kv_bytes_per_slot(x.index) + 4 * x.store_heads for x in managed]

        def division(average: int) -> list[int]:
            most = min(int(self.most * average), length)
            return error_aware(role.extra["errors"], average, least=self.least, most=most)

        found = affordable(self.total(shape, length), weights, division)
        return found[[x.index for x in managed].index(layer)]

    def score(self, view: View, ctx: Context) -> Tensor:
        mass, inside = window_mass(view, ctx, ctx.role.extra["voters"])
        inside = inside[:, :1]  # all heads hold the same so far
        return pooled(mass.masked_fill(inside, 0.0), self.kernel).mean(1, keepdim=True).masked_fill(inside, torch.inf)

    def calibrate(
        self,
        probe: Probe,
        data: Iterable[Example] | None = None,
        *,
        longest: int | None = None,
        texts: int | None = None,
    ) -> Profile:
        """Score query heads while the model answers questions about its prompt, then measure layers that hold `least`
        tokens of a prompt, chosen by the best `voters`, on these texts and on plain ones.

        Args:
            probe: the model, its tokenizer, a seed.
            data: examples with `recalls` instead of the synthetic texts.
            longest: tokens of the longest text (32000 on a GPU, 512 on a CPU, no more than the model's positions); the
                shortest has half of them.
            texts: how many of each kind (GPU: 200, CPU: 12).

        Raises:
            Refused: the model answers none of the questions.
            BadArgument: texts longer than the model's positions, or too short for a question.
        """
        shape, tokenizer = ModelShape.of(probe.model), probe.tokenizer
        on_cpu = next(probe.model.parameters()).device.type == "cpu"
        texts = texts or (12 if on_cpu else 200)
        if longest is None:
            longest = min(max(512, shortest(tokenizer)) if on_cpu else 32000, shape.max_positions)
        if longest > shape.max_positions:
            raise BadArgument("longest", longest, f"the model has {shape.max_positions} positions")
        lengths = evenly(max(longest // 2, min(longest, shortest(tokenizer))), longest)
        started = time.perf_counter()
        asked = passkey_examples(tokenizer, lengths, probe.seed) if data is None else data
        kinds = [list(islice(asked, texts))]
        if data is None:
            kinds.append(list(islice(running_examples(tokenizer, lengths, probe.seed), texts)))
        report = probe.progress(len(kinds[0]) * (1 + len(kinds)), self.id)
        scores, right, count = semantic_scores(probe.model, kinds[0], report)
        voters = {i: best(row, self.voters) for i, row in enumerate(scores) if row is not None}
        cut = {"chosen": self.least - self.window, "window": self.window, "kernel": self.kernel}
        found = [compression_errors(probe.model, kind, voters, report=report, **cut) for kind in kinds]
        errors = [round(sum(x[i] for x in found) / len(found), 6) if i in voters else None for i in range(len(scores))]
        settings: dict[str, Any] = {"seed": probe.seed, "texts": len(kinds[0]), "voters": self.voters} | cut
        if data is None:
            settings |= {"lengths": [lengths[0], lengths[-1], len(lengths)]}
        seconds = round(time.perf_counter() - started, 1)
        outcome = {"answers": [right, count], "seconds": seconds}
        data_ = {"scores": scores, "errors": errors}
        return Profile(self.id, fingerprint(shape), data_, settings | outcome | made_with(probe.model))


def best(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The heads with the highest scores, in their own order; of equal ones the first."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda head: -scores[head])[:count]))
