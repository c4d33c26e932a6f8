"""DuoAttention: some kv heads hold everything, the others their sinks and a recent window."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from foveate.attention import Span
from foveate.cache import UNBOUNDED
from foveate.errors import BadArgument, Infeasible
from foveate.heads.gates import GateRecipe, gated_layers, learn_gates, made_with
from foveate.heads.passkeys import Example, evenly, passkey_examples, shortest
from foveate.heads.tap import Tapped
from foveate.methods.base import Method, Probe, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class DuoAttention(Method):
    """Retrieval heads hold the whole context; streaming heads hold the first `sink` tokens and the `recent` ones before
    the current one. Which is which is decided by gates that a short calibration learned: the lowest stream.

    Heads are not permuted in the weights, since the cache groups them by what they hold.

    Args:
        sink, recent: what a streaming head holds (code: 64 and 256).
        sparsity: share of streaming heads; None: 0.5 with grouped queries, 0.75 without (paper). A budget replaces it
            by as few streaming heads as meet the budget at the prompt's length.
        in_prompt: True: streaming heads are restricted inside the prompt as well, as when it is prefilled token by
            token. False: the prompt's own attention is dense, as in the first call of the released code.

    Source: 2410.10819, section 2; released code for the defaults.
    """

    id = "duo-attention"
    name = "DuoAttention"
    paper = "2410.10819"
    slots = frozenset({"keep"})
    core = True
    calibrated = True
    search = tries(sink=(4, 16, 64), recent=(64, 128, 256))

    sink: int = 64
    recent: int = 256
    sparsity: float | None = None
    in_prompt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink < 0:
            raise BadArgument("sink", self.sink, "give 0 or more tokens")
        if self.recent < 0:
            raise BadArgument("recent", self.recent, "give 0 or more tokens")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise BadArgument("sparsity", self.sparsity, "give a share of heads from 0 to 1")

    def stand_in(self, shape: ModelShape) -> Profile:
        """Gates that rise from head to head, so that every layer has heads of both kinds."""
        gates = [
            [] if layer.kind != "full" else [(head + 0.5) / layer.num_kv_heads for head in range(layer.num_kv_heads)]
            for layer in shape.layers
        ]
        return made_up(self.id, shape, {"gates": gates})

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        ranked = self._ranked(shape, profile)
        streaming = set(ranked[: self._streaming(shape, length, ranked)])
        roles = []
        for layer in shape.layers:
            flags = [(layer.index, head) in streaming for head in range(layer.num_kv_heads)]
            if not any(flags):
                roles.append(Role("retrieval"))
                continue
            window = torch.tensor([self.recent + 1 if flag else UNBOUNDED for flag in flags])
            visible = Span(self.sink, self.recent + 1 if all(flags) else window)
            extra = {"streaming": tuple(head for head, flag in enumerate(flags) if flag)}
            roles.append(Role("streaming" if all(flags) else "mixed", visible, self.in_prompt, extra=extra))
        return roles

    def total(self, shape: ModelShape, length: int) -> None:
        """Nothing is evicted by score: `plan` spends the budget on retrieval heads."""
        return None

    def floor(self, shape: ModelShape, length: int) -> float:
        gain = sum(layer.num_kv_heads * self._gain(shape, layer.index, length) for layer in gated_layers(shape))
        return 1 - gain / shape.dense_kv_bytes(length)

    def _gain(self, shape: ModelShape, layer: int, length: int) -> float:
        """Bytes that one streaming head of a layer saves at this length."""
        per_token = shape.kv_bytes_per_slot(layer) / shape.layers[layer].num_kv_heads
        return per_token * (length - min(length, self.sink + self.recent))

    def _ranked(self, shape: ModelShape, profile: Profile | None) -> list[tuple[int, int]]:
        """(layer, kv head) by gate, lowest first; equal gates in the order of layers and heads."""
        try:
            table = {} if profile is None else profile.data["gates"]
            heads = [(layer.index, head) for layer in gated_layers(shape) for head in range(layer.num_kv_heads)]
            gates = {(layer, head): float(table[layer][head]) for layer, head in heads}
        except (KeyError, IndexError, TypeError, ValueError):
            mend = f"{self.id} needs one gate per kv head of this model: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        return sorted(heads, key=gates.__getitem__)

    def _streaming(self, shape: ModelShape, length: int, ranked: Sequence[tuple[int, int]]) -> int:
        """How many heads stream."""
        budget = Budget.of(self.budget)
        if budget is None:
            grouped = any(layer.num_heads > layer.num_kv_heads for layer in gated_layers(shape))
            share = self.sparsity if self.sparsity is not None else 0.5 if grouped else 0.75
            return int(share * len(ranked) + 0.5)
        dense = held = shape.dense_kv_bytes(length)
        granted = {"ratio": budget.value * dense, "bytes": budget.value}.get(budget.kind)
        if granted is None:  # tokens per head of the layers that are managed
            managed = sum(shape.kv_bytes_per_slot(layer.index) for layer in gated_layers(shape))
            granted = dense - managed * max(0, length - budget.value)
        for count, (layer, _) in enumerate(ranked):
            if held <= granted * (1 + 1e-9):
                return count
            held -= self._gain(shape, layer, length)
        if held <= granted * (1 + 1e-9):
            return len(ranked)
        floor = self.floor(shape, length)
        raise Infeasible(
            f"budget={budget}: {self.id} cannot hold less than {floor:.3f} of the dense cache at {length} tokens "
            f"(every head streams {self.sink} + {self.recent} tokens); raise the budget",
            floor,
        )

    def calibrate(
        self,
        probe: Probe,
        data: Iterable[Example] | None = None,
        *,
        longest: int | None = None,
        recipe: GateRecipe | None = None,
    ) -> Profile:
        """Learn one gate per kv head on texts with passkeys: how much of its far attention does the model need?

        The paper's settings on a GPU: 2000 steps on texts of 1000 to 32000 tokens, closed gates leaving 128 sinks and
        256 recent tokens. Where texts are shorter, that window is at most an eighth of the longest (the sinks half of
        it), so that gates are learned on what it cannot reach. On a CPU 100 steps are made on texts of 256 to 512
        tokens: minutes for a small model, and a coarser ranking.

        Args:
            probe: the model, its tokenizer, a seed.
            data: examples instead of the synthetic ones.
            longest: tokens of the longest text; the shortest has half of them, at most 1000.
            recipe: other steps, learning rate, l1 weight or full term.

        Raises:
            Refused: latent attention (MLA).
            BadArgument: texts longer than the model's positions, or too short for a passkey.
        """
        shape = ModelShape.of(probe.model)
        gated_layers(shape)
        on_cpu = next(probe.model.parameters()).device.type == "cpu"
        recipe = recipe or (GateRecipe(steps=100) if on_cpu else GateRecipe())
        if longest is None:
            longest = min(max(512, shortest(probe.tokenizer)) if on_cpu else 32000, shape.max_positions)
        if longest > shape.max_positions:
            raise BadArgument("longest", longest, f"the model has {shape.max_positions} positions")
        recent = max(1, min(256, longest // 8))
        sink = recent // 2
        lengths = evenly(min(longest, max(min(1000, longest // 2), shortest(probe.tokenizer))), longest)
        examples = passkey_examples(probe.tokenizer, lengths, probe.seed) if data is None else data
        report = probe.progress(recipe.steps, f"{self.id}: gates")

        def near(layer: Tapped) -> torch.Tensor:
            return layer.attend(Span(sink, recent))

        started = time.perf_counter()
        learned = learn_gates(probe.model, examples, near, recipe, report)
        settings: dict[str, Any] = {"sink": sink, "recent": recent, "seed": probe.seed} | asdict(recipe)
        if data is None:
            settings |= {"lengths": [lengths[0], lengths[-1], len(lengths)]}
        tenth = max(1, recipe.steps // 10)
        distance = [round(sum(x) / len(x), 6) for x in (learned.losses[:tenth], learned.losses[-tenth:])]
        seconds = round(time.perf_counter() - started, 1)
        outcome = {"tokens": learned.tokens, "distance": distance, "seconds": seconds}
        return Profile(
            self.id, fingerprint(shape), {"gates": learned.gates}, settings | outcome | made_with(probe.model)
        )
