"""Run a conversion stage by stage, and measure after each one what it did to the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.convert.base import Calibration, Conversion, Stage
from foveate.convert.subject import Questions, Rung, subject_of
from foveate.errors import BadArgument, FoveateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""How far what a model returns may move, as relative root mean square, in a stage that says it is exact."""


class NotExact(FoveateError):
    """A stage that should have kept the function has changed it: the conversion does not fit this model."""


@dataclass
class Converted:
    """A model with other attention, and how it got there.

    Args:
        model: of the converted type; `save_pretrained` keeps it, `foveate.load` opens it again.
        ladder: one rung per stage, the original first.
        conversion: what was run.
    """

    model: PreTrainedModel
    ladder: list[Any]
    conversion: Conversion


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    conversion: Conversion,
    calibration: Calibration,
    probe: Tensor,
    *,
    questions: Questions | None = None,
    watch: Callable[[str], None] = lambda words: None,
    measured: Callable[[Rung], None] = lambda rung: None,
) -> Converted:
    """Convert a copy of the model; the model itself is not touched.

    Args:
        model: of the kind that the conversion takes.
        calibration: text that the conversion may look at.
        probe: [S, N] token ids of other text, on which each rung is measured, 4 sequences at a time.
        questions: what each rung's model is asked beside that.
        watch: told in words what is being done.
        measured: given each rung as soon as it is known.

    Raises:
        Refused, BadArgument: the model or a number does not fit; nothing was run.
        NotExact: a stage that promises to keep the function has not.
    """
    if probe.ndim != 2 or probe.shape[1] < 2:
        raise BadArgument("probe", tuple(probe.shape), "give token ids [S, N] with at least two tokens each")
    subject = subject_of(conversion)

    def rung_of(stage: Stage, seconds: float) -> Rung:
        watch(f"measuring after: {stage.name}")
        rung = subject.measure(made, stage, model, probe, seconds)
        if ladder:
            _check(rung, made.dtype, ladder[-1])
        rung = answered(rung, made, questions)
        ladder.append(rung)
        measured(rung)
        return rung

    was_training = model.training
    model.eval()
    try:
        subject.check(conversion, model)
        made = subject.container(model)
        ladder: list[Any] = []
        rung_of(Stage("original", True), 0.0)
        stages = iter(_with_grad(conversion.stages(made, calibration)))
        while True:
            begin = time.perf_counter()
            stage = next(stages, None)
            if stage is None:
                break
            seconds = time.perf_counter() - begin
            made.eval()
            rung_of(stage, seconds)
        return Converted(made, ladder, conversion)
    finally:
        model.train(was_training)


def answered(rung: Any, made: PreTrainedModel, questions: Questions | None) -> Any:
    """The rung with the model's answer to the questions."""
    return rung if questions is None else replace(rung, **{questions.name: questions.ask(made)})


def _with_grad(stages: Iterator[Stage]) -> Iterator[Stage]:
    """Each stage may train; what is measured between them may not."""
    while True:
        with torch.enable_grad():
            stage = next(stages, None)
        if stage is None:
            return
        yield stage


def _check(rung: Rung, dtype: torch.dtype, before: Rung) -> None:
    """Hold an exact stage to its word: it may add to the error so far only what rounding does."""
    bound = TOLERANCE.get(dtype)
    added = rung.error - before.error
    if rung.exact and (math.isnan(rung.error) or (bound is not None and added > bound)):
        raise NotExact(
            f"{rung.stage!r} should keep the function, but moved what the model returns by {rung.error:.2e} (relative "
            f"RMS; {before.error:.2e} before it): this conversion does not fit this model"
        )
