"""Run a conversion stage by stage, and measure after each one what it did to the model."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.convert.base import Calibration, Conversion, Stage
from foveate.errors import BadArgument, FoveateError
from foveate.models.converted import container
from foveate.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""How far logits may move, as relative root mean square, in a stage that says it is exact."""


class NotExact(FoveateError):
    """A stage that should have kept the function has changed it: the conversion does not fit this model."""


@dataclass(frozen=True)
class Rung:
    """The model after one stage.

    Args:
        stage: its name; "original" is the model as it came.
        exact: whether the stage had to keep the function.
        error: relative root mean square by which logits differ from the original's on the probe text.
        kl: mean over tokens of KL(original ‖ this), nats.
        perplexity: on the probe text.
        kv_bytes: that one token of context costs in the cache, all layers, in the model's dtype.
        share: of the original's `kv_bytes`.
        parameters: numbers in the model.
        seconds: that the stage took, without measuring it.
        facts: what the conversion said of it.
    """

    stage: str
    exact: bool
    error: float
    kl: float
    perplexity: float
    kv_bytes: int
    share: float
    parameters: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass
class Converted:
    """A model with other attention, and how it got there.

    Args:
        model: of the converted type; `save_pretrained` keeps it, `foveate.load` opens it again.
        ladder: one rung per stage, the original first.
        conversion: what was run.
    """

    model: PreTrainedModel
    ladder: list[Rung]
    conversion: Conversion


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    conversion: Conversion,
    calibration: Calibration,
    probe: Tensor,
    *,
    watch: Callable[[str], None] = lambda words: None,
    measured: Callable[[Rung], None] = lambda rung: None,
) -> Converted:
    """Convert a copy of the model; the model itself is not touched.

    Args:
        calibration: text that the conversion may look at.
        probe: [S, N] token ids of other text, on which each rung is measured, 4 sequences at a time.
        watch: told in words what is being done.
        measured: given each rung as soon as it is known.

    Raises:
        Refused, BadArgument: the model or a number does not fit; nothing was run.
        NotExact: a stage that promises to keep the function has not.
    """
    if probe.ndim != 2 or probe.shape[1] < 2:
        raise BadArgument("probe", tuple(probe.shape), "give token ids [S, N] with at least two tokens each")
    was_training = model.training
    model.eval()
    try:
        shape = ModelShape.of(model)
        conversion.check(model, shape)
        made = container(model)
        ladder = [measure(made, Stage("original", True), model, shape, probe, 0.0)]
        measured(ladder[0])
        stages = iter(_with_grad(conversion.stages(made, calibration)))
        while True:
            begin = time.perf_counter()
            stage = next(stages, None)
            if stage is None:
                break
            seconds = time.perf_counter() - begin
            watch(f"measuring after: {stage.name}")
            made.eval()
            rung = measure(made, stage, model, shape, probe, seconds)
            _check(rung, made.dtype, ladder[-1])
            ladder.append(rung)
            measured(rung)
        return Converted(made, ladder, conversion)
    finally:
        model.train(was_training)


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
            f"{rung.stage!r} should keep the function, but moved the logits by {rung.error:.2e} (relative RMS; "
            f"{before.error:.2e} before it): this conversion does not fit this model"
        )


@torch.no_grad()
def measure(made: Any, stage: Stage, model: Any, shape: ModelShape, probe: Tensor, seconds: float) -> Rung:
    """The rung of a converted model after a stage.

    Args:
        model: the original, and its shape.
        probe: [S, N] token ids, read 4 sequences at a time.
        seconds: that the stage took.
    """
    error = norm = kl = loss = 0.0
    count = 0
    for batch in probe.to(model.device).split(4):
        ours, theirs = made(batch, use_cache=False).logits, model(batch, use_cache=False).logits
        # In float64: errors of 1e-10 are measured, and float32 would round a KL near 0 below it.
        for x, y, ids in zip(ours, theirs, batch, strict=True):
            x, y = x.double(), y.double()
            error += float((x - y).square().sum())
            norm += float(y.square().sum())
            log_p, log_q = y.log_softmax(-1), x.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            loss -= float(log_q[:-1].gather(-1, ids[1:, None]).sum())
            count += len(ids)
    held = ModelShape.of(made).kv_bytes_per_token
    return Rung(
        stage=stage.name,
        exact=stage.exact,
        error=math.sqrt(error / norm),
        kl=kl / count,
        perplexity=math.exp(min(loss / (count - len(probe)), 700.0)),
        kv_bytes=held,
        share=held / shape.kv_bytes_per_token,
        parameters=sum(p.numel() for p in made.parameters()),
        seconds=seconds,
        facts=copy.deepcopy(stage.facts),
    )
