"""BABILong (arXiv 2406.10149): the facts of a short story, scattered in order through running text.

Facts and answers are simulated (`world`), places are drawn as in the original, and an answer counts if it names the
right label and no other; wording is our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from foveate.tasks import world
from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import Haystack, running_text
from foveate.tasks.prompt import Draft
from foveate.tasks.scoring import SOLE_CHOICE
from foveate.tasks.states import in_order

_RESERVE = 24


@dataclass(frozen=True)
class Scattered:
    """A story's facts in running text."""

    tell: Callable[..., world.Story]

    def draft(self, request: Request) -> Draft:
        """The facts at random places in order; those that the answer follows from are the evidence."""
        story = self.tell(request.rng)
        return Draft(
            intro=_INTRO,
            inserts=in_order(request.rng, story.facts, story.support),
            question=f"Question: {story.question} {_BRIEFLY}",
            prefix="Answer:",
            references=(story.answer,),
            reserve=_RESERVE,
            choices=story.choices,
        )

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """Running text that names nobody and nothing of the story."""
        return running_text(request.tokenizer, request.corpus, request.rng, _LABELS)


_INTRO = (
    "Facts about persons, places and things are hidden in the following text, in the order in which they happened. "
    "The last that is told of something holds."
)
_BRIEFLY = "Answer from the facts with one word."
_LABELS = re.compile(
    rf"\b({'|'.join(dict.fromkeys((*world.PERSONS, *world.GIVERS, *world.PLACES, *world.THINGS)))})\b", re.IGNORECASE
)


def _task(number: int, description: str, tell: Callable[..., world.Story], chance: float) -> GenerationTask:
    name, source = f"babilong_qa{number}", "BABILong, arXiv 2406.10149"
    metric = "share of the questions answered"
    return GenerationTask(name, "reasoning", description, Scattered(tell), source, SOLE_CHOICE, metric, chance)


BABILONG_TASKS = (
    _task(1, "where a person is, from one fact", world.one_fact, 1 / 6),
    _task(2, "where a thing is, from two facts", world.two_facts, 1 / 6),
    _task(3, "where a thing was before, from three facts", world.three_facts, 1 / 5),
    _task(4, "which place lies north, south, east or west of another", world.two_places, 1 / 5),
    _task(5, "who gave what to whom", world.three_arguments, 1 / 3),
)
