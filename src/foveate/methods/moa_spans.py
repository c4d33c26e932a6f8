"""MoA: each kv head sees a window of its own, whose width follows from the prompt's length by a rule of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foveate.attention import Span
from foveate.cache import UNBOUNDED
from foveate.errors import BadArgument, Infeasible
from foveate.heads.gates import gated_layers, made_with
from foveate.heads.influence import window_losses
from foveate.heads.passkeys import Example, passkey_examples
from foveate.methods.base import Method, Probe, Profile, Role, register
from foveate.methods.budget import PAIR_BYTES, Budget
from foveate.methods.policies.choice import choose
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape

POSITION = 4
"""Bytes that a held token costs where others were dropped."""


@register
@dataclass(frozen=True, kw_only=True)
class MoASpans(Method):
    """Every kv head holds the first block of tokens and the most recent alpha + beta · N, for a prompt of N tokens. The
    rules are chosen together. A calibration measures, at a few lengths, how far the loss depends on what lies outside
    each window (first order, with the row renormalised); the plan has the least such loss of those whose heads hold, on
    average, the budget's share at every profiled length and at the prompt's own.

    Windows are whole blocks, at least one, the current token included; while text is generated they stay as wide as the
    prompt made them, as the released cache does. There is one rule per kv head, on the summed influence of its query
    heads, where the released runtime gives grouped keys up. Losses of several lengths are added, each as a share of
    what the narrowest windows would lose there; the paper scans the Pareto front and keeps the plan that does best at
    an unseen length. Kernels' wish for at most two rules in a layer is not followed, and no least density asked.

    Args:
        density: share that is held when no budget is given.

    Source: 2406.14909, section 4; the grid of rules as released.
    """

    id = "moa-spans"
    name = "MoA"
    paper = "2406.14909"
    slots = frozenset({"keep"})
    calibrated = True

    density: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise BadArgument("density", self.density, "give a share above 0 and at most 1")

    def stand_in(self, shape: ModelShape) -> Profile:
        """Losses that fall with the window, faster in each head than in the one before it."""
        lengths, block = (2048, 8192), 64

        def falling(head: int, n: int) -> list[float]:
            return [(1 - w / (n // block)) ** (head + 1) for w in range(1, n // block + 1)]

        loss = [[[falling(h, n) for h in range(layer.num_kv_heads)] for layer in shape.layers] for n in lengths]
        return made_up(self.id, shape, {"block": block, "lengths": list(lengths), "loss": loss})

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        block, table = self._table(shape, profile)
        budget = Budget.of(self.budget) or Budget.ratio(self.density)
        if budget.whole:
            return [Role("spans")] * len(shape.layers)
        profiled = sorted(table)
        bands = np.array([[blocks(*rule, block, n) for n in (*profiled, length)] for rule in rules(block, profiled)])
        bands = np.unique(bands, axis=0)  # [options, lengths]
        heads = [(layer.index, head) for layer in gated_layers(shape) for head in range(layer.num_kv_heads)]
        loss = np.zeros((len(heads), len(bands)))
        for i, n in enumerate(profiled):
            lost = np.array([table[n][layer][head] for layer, head in heads], dtype=float)
            loss += lost[:, bands[:, i] - 1] / max(lost[:, 0].sum(), 1e-30)
        held = np.minimum(block + block * bands, (*profiled, length)).astype(float)
        cost = np.repeat(held[None], len(heads), axis=0)
        for i, (layer, _) in enumerate(heads):
            slot = shape.kv_bytes_per_slot(layer) / shape.layers[layer].num_kv_heads
            cost[i, :, -1] = np.minimum(held[:, -1] * (slot + POSITION) + PAIR_BYTES, length * slot)
        granted, managed = self._granted(shape, budget, length)
        least = cost.min(1).sum(0)
        # Where two blocks are more than the share (a short profiled text), there is nothing to choose at that length.
        share = [granted / managed * n * len(heads) for n in profiled]
        taken = choose(loss, cost, np.array([*np.maximum(share, least[:-1]), granted]))
        if taken is None:
            floor = (shape.dense_kv_bytes(length) - managed + least[-1]) / shape.dense_kv_bytes(length)
            raise Infeasible(
                f"budget={budget}: {self.id} cannot hold less than {floor:.3f} of the dense cache at {length} tokens "
                f"(every head holds two blocks of {block}); raise the budget",
                floor,
            )
        whole = -(-length // block)
        windows = [UNBOUNDED if n >= whole else int(n) * block for n in bands[taken, -1]]
        widths = dict(zip(heads, windows, strict=True))
        return [_role([widths.get((layer.index, h), UNBOUNDED) for h in range(layer.num_kv_heads)], block)
                for layer in shape.layers]  # fmt: skip

    def total(self, shape: ModelShape, length: int) -> None:
        """Nothing is evicted by score: `plan` spends the budget on windows."""
        return None

    def _granted(self, shape: ModelShape, budget: Budget, length: int) -> tuple[float, float]:
        """Bytes that the layers with windows may hold, and what they hold without."""
        dense = shape.dense_kv_bytes(length)
        managed = length * sum(shape.kv_bytes_per_slot(layer.index) for layer in gated_layers(shape))
        if budget.kind == "tokens":
            return managed * min(1.0, budget.value / length), managed
        total = budget.value * dense if budget.kind == "ratio" else budget.value
        return min(managed, total - (dense - managed)), managed

    def _table(self, shape: ModelShape, profile: Profile | None) -> tuple[int, dict[int, list]]:
        """Block, and by length, layer and kv head the loss by window in blocks, minus one."""
        try:
            data = {} if profile is None else profile.data
            block = int(data["block"])
            table = {int(n): rows for n, rows in zip(data["lengths"], data["loss"], strict=True)}
            for n, rows in table.items():
                for layer in gated_layers(shape):
                    found = np.array(rows[layer.index], dtype=float)
                    if found.shape != (layer.num_kv_heads, -(-n // block)) or not table or block < 1:
                        raise ValueError
        except (KeyError, IndexError, TypeError, ValueError):
            mend = f"{self.id} needs the losses of windows on this model: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        return block, table

    def calibrate(
        self,
        probe: Probe,
        data: Iterable[Example] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        samples: int | None = None,
        block: int = 64,
    ) -> Profile:
        """Measure on texts with passkeys how far the model's loss depends on what lies outside each window.

        The loss is the model's own: cross-entropy on the tokens that it holds most likely at questions and answers.
        The paper lets the model write the answers first and takes texts of 2, 4 and 8 thousand tokens.

        Args:
            probe: the model, its tokenizer, a seed.
            data: examples instead of the synthetic ones; their lengths must be among `lengths`.
            lengths: of the texts; on a CPU 512 and 1024 tokens unless stated.
            samples: texts per length; on a CPU 3 unless stated, else 20.
            block: tokens per block of windows and of the sink.
        """
        shape = ModelShape.of(probe.model)
        gated_layers(shape)
        on_cpu = next(probe.model.parameters()).device.type == "cpu"
        asked = tuple(lengths or ((512, 1024) if on_cpu else (2048, 4096, 8192)))
        if block < 1 or any(n < 2 * block for n in asked):
            raise BadArgument("block", block, f"give at least 1 token, and texts ({asked}) of two blocks or more")
        if max(asked) > shape.max_positions:
            raise BadArgument("lengths", max(asked), f"the model has {shape.max_positions} positions")
        samples = samples or (3 if on_cpu else 20)
        report = probe.progress(samples * len(asked), f"{self.id}: influence")
        started, given = time.perf_counter(), None if data is None else list(data)
        loss: list[list] = []
        for n in asked:
            texts = passkey_examples(probe.tokenizer, [n], probe.seed)
            own = (next(texts) for _ in range(samples)) if given is None else (e for e in given if len(e.ids) == n)
            found = window_losses(probe.model, own, block, report)
            loss.append([found[i].tolist() if i in found else None for i in range(len(shape.layers))])
        made = {"samples": samples, "seed": probe.seed, "seconds": round(time.perf_counter() - started, 1)}
        values = {"block": block, "lengths": list(asked), "loss": _short(loss)}
        return Profile(self.id, fingerprint(shape), values, made | made_with(probe.model))


def rules(block: int, profiled: Sequence[int]) -> list[tuple[float, float]]:
    """(alpha, beta): one block (ours); windows above 0 at the shortest profiled length and within the longest."""
    low, high = profiled[0], profiled[-1]
    alphas = range(-low, high + 1, max(block, low // 2))
    grid = [(float(a), b / 8) for a in alphas for b in range(9) if a + b / 8 * low > 0 and a + b / 8 * high <= high]
    return [(float(block), 0.0), *grid]


def blocks(alpha: float, beta: float, block: int, length: int) -> int:
    """Blocks of the window at a length, the current one included."""
    return min(-(-length // block), max(1, int(np.floor(alpha / block + beta * -(-length // block) + 1e-9))))


def _role(windows: list[int], block: int) -> Role:
    if all(w >= UNBOUNDED for w in windows):
        return Role("spans")
    return Role("spans", Span(block, torch.tensor(windows)), extra={"windows": tuple(windows)})


def _short(x: object) -> object:
    """Numbers with six digits, in lists of any depth."""
    return [_short(y) for y in x] if isinstance(x, list) else float(f"{x:.6g}") if isinstance(x, float) else x
