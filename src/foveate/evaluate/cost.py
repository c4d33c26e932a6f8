"""What a method costs: seconds for the prompt, milliseconds per new token, and the most bytes held on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from foveate import compat
from foveate.engine.binding import Binding
from foveate.errors import FoveateError
from foveate.evaluate.answer import read_prompts
from foveate.evaluate.batch import Batch
from foveate.evaluate.reader import Read, same
from foveate.evaluate.setting import Bound
from foveate.models.shape import ModelShape
from foveate.tasks import Sample

STEPS = 12
"""Decode steps that are timed in each repeat, after two that are not."""

_UNTIMED = 2
_WARM_UP = 256  # tokens of the prompt that every method reads once before anything is timed


@dataclass
class Cost:
    """Measured costs of one setting at one length; lists hold one value per repeat (decode: per step)."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    decode_dense: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def prefill_s(self) -> float:
        return median(self.prefill)

    @property
    def decode_ms(self) -> float:
        return 1e3 * median(self.decode)

    @property
    def decode_dense_ms(self) -> float:
        return 1e3 * median(self.decode_dense)


@dataclass
class Costs:
    """Costs of several settings at one length, measured in one loop.

    Attributes:
        found: by the key of the setting.
        dense: of the dense baseline.
        refused: settings that failed on the way, by key.
    """

    found: dict[tuple[str, str, str | None], Cost]
    dense: Cost
    refused: dict[tuple[str, str, str | None], FoveateError]


def measure(
    shape: ModelShape,
    dense: Binding,
    bounds: Sequence[Bound],
    sample: Sample,
    *,
    question_seen: bool,
    repeats: int,
    done: Callable[[], None],
) -> Costs:
    """Time every setting beside dense: one row, a prompt of its own for each, the order turned from repeat to repeat.

    Decode steps of dense and of the method take turns one by one, at the same length, so that a machine that slows down
    slows both. Peaks are those of these runs: prompts that methods share would hold more than each needs.

    Args:
        sample: whose prompt is read; the answer's tokens do not matter and are taken from the prompt.
        done: called after each prompt that was timed.
    """
    costs = Costs({b.setting.key: Cost() for b in bounds}, Cost(), {})
    short = _cut(sample, _WARM_UP)
    for binding, read in [(dense, same), *((b.binding, b.read) for b in bounds if b.binding is not None)]:
        try:
            batch, _ = _prompt(shape, binding, read, short, question_seen)
            batch.step(short.context_ids[:1])
        except FoveateError:
            continue  # said below, at the length that counts
    for repeat in range(repeats):
        base, seconds = _prompt(shape, dense, same, sample, question_seen)
        costs.dense.prefill.append(seconds)
        costs.dense.peak = max(costs.dense.peak, base.cache.peak_nbytes)
        done()
        turn = repeat * len(bounds) // max(1, repeats)
        for bound in [*bounds[turn:], *bounds[:turn]]:
            key = bound.setting.key
            if bound.binding is None or key in costs.refused:
                continue
            cost = costs.found[key]
            try:
                batch, seconds = _prompt(shape, bound.binding, bound.read, sample, question_seen)
                mine, theirs = _take_turns(batch, base, sample)
            except FoveateError as error:
                costs.refused[key] = error
                continue
            cost.prefill.append(seconds)
            cost.decode += mine
            cost.decode_dense += theirs
            cost.peak = max(cost.peak, batch.cache.peak_nbytes)
            done()
        costs.dense.decode += [value for cost in costs.found.values() for value in cost.decode_dense] or (
            _steps(base, sample)
        )
    costs.dense.decode_dense = costs.dense.decode
    return costs


def _prompt(
    shape: ModelShape, binding: Binding, read: Read, sample: Sample, question_seen: bool
) -> tuple[Batch, float]:
    batch = Batch(binding.model, binding.cache(), 1, shape)
    _settle(binding.model)
    start = time.perf_counter()
    read_prompts(batch, [read(sample)], question_seen)
    _settle(binding.model)
    return batch, time.perf_counter() - start


def _take_turns(batch: Batch, base: Batch, sample: Sample) -> tuple[list[float], list[float]]:
    """Seconds of the method's steps and of as many dense ones; the dense cache is as it was afterwards."""
    mine: list[float] = []
    theirs: list[float] = []
    for i in range(_UNTIMED + STEPS):
        token = sample.context_ids[i % len(sample.context_ids)]
        for side, seconds in ((base, theirs), (batch, mine)) if i % 2 else ((batch, mine), (base, theirs)):
            seconds.append(_step(side, token))
    base.rewind(_UNTIMED + STEPS)
    return mine[_UNTIMED:], theirs[_UNTIMED:]


def _steps(batch: Batch, sample: Sample) -> list[float]:
    taken = [_step(batch, sample.context_ids[i % len(sample.context_ids)]) for i in range(_UNTIMED + STEPS)]
    batch.rewind(_UNTIMED + STEPS)
    return taken[_UNTIMED:]


def _step(batch: Batch, token: int) -> float:
    start = time.perf_counter()
    batch.step([token])
    _settle(batch.model)
    return time.perf_counter() - start


def _settle(model: Any) -> None:
    """Wait until the devices of a model have done what they were given."""
    for device in compat.devices(model):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _cut(sample: Sample, tokens: int) -> Sample:
    from dataclasses import replace

    return replace(sample, context_ids=sample.context_ids[:tokens])
