"""What is asked of a run, and the samples that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.record import Cell
from foveate.models.shape import ModelShape
from foveate.tasks import Corpus, Sample, Task

if TYPE_CHECKING:
    from foveate.evaluate.setting import Setting

Watch = Callable[[float, float, str], None]
"""Told (work done, work in all, what is at work) as a run goes on; the unit is about one prompt token."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is run besides the settings: everything that decides about the samples.

    Args:
        model: its name in records.
        lengths: context lengths in tokens, answers counted in.
        samples: per length and task; every setting gets the same ones.
        question_seen: whether methods see the question while they compress the context.
        repeats: of each timing.
        command: what repeats the run.
    """

    model: str
    lengths: tuple[int, ...]
    tasks: tuple[Task, ...]
    samples: int
    seed: int = 0
    question_seen: bool = False
    repeats: int = 3
    corpus: Corpus
    command: str = ""

    def cells(self, settings: Sequence[Setting]) -> list[Cell]:
        """All cells, in the order in which one process runs them."""
        return [
            self.cell(setting, length, task) for length in self.lengths for task in self.tasks for setting in settings
        ]

    def cell(self, setting: Setting, length: int, task: Task) -> Cell:
        """One cell."""
        return Cell(
            model=self.model,
            method=setting.method,
            settings=setting.settings,
            budget=setting.budget,
            length=length,
            task=task.name,
            seed=self.seed,
            question_seen=self.question_seen,
        )

    def shared(self, model: Any) -> dict[str, Any]:
        """What all cells have in common and no cell key holds; a run in the same folder must agree with it."""
        return {
            "samples": self.samples,
            "repeats": self.repeats,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "corpus": self.corpus.name,
            "corpus_digest": self.corpus.digest,
        }


def check_lengths(request: Request, shape: ModelShape, tokenizer: Any) -> None:
    """Raise BadArgument for a length that the model or a task cannot have."""
    for length in request.lengths:
        if length > shape.max_positions:
            raise BadArgument(
                "lengths", length, f"{request.model} has {shape.max_positions} positions; give at most that"
            )
        for task in request.tasks:
            minimum = task.minimum(tokenizer)
            if length < minimum:
                mend = f"{task.name} needs at least {minimum} tokens with this tokenizer"
                raise BadArgument("lengths", length, mend)


def make_samples(request: Request, tokenizer: Any, watch: Watch) -> dict[tuple[int, str], list[Sample]]:
    """The samples of every length and task; all settings of a run get these."""
    made = {}
    for length in request.lengths:
        for task in request.tasks:
            watch(0, 0, f"writing samples of {task.name}, {length} tokens")
            samples = task.generate(tokenizer, length, request.samples, request.seed, request.corpus)
            for sample in samples:
                tokens = (
                    len(sample.context_ids) + len(sample.question_ids) + len(sample.target_ids) + sample.max_new_tokens
                )
                if tokens > length:
                    raise FoveateError(f"{task.name} made a prompt of {tokens} tokens where {length} were asked for")
            made[length, task.name] = samples
    return made
