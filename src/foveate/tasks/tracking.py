"""RULER's variable tracking (arXiv 2404.06654, section 3): one chain of assignments, hidden in noise.

One chain of four hops, its statements in order at random places, one solved example before it, 30 tokens for the
answer and RULER's scoring; wording and the example's size are our own.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.tasks.chat import count_tokens
from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import NOISE, Haystack, noise
from foveate.tasks.needles import SOURCE
from foveate.tasks.prompt import Draft, Insert

_RESERVE = 30
_EXAMPLE_TOKENS = 500  # RULER's example; here it also stays below a quarter of the length


@dataclass(frozen=True)
class Tracking:
    """How the prompts are made: VAR A = 12345, VAR B = VAR A, ...: which variables have the value?

    Attributes:
        hops: assignments that hand the value on; `hops + 1` names are asked for.
    """

    hops: int = 4

    def draft(self, request: Request) -> Draft:
        """A solved example, then the statements of one chain at random places, in order."""
        rng = request.rng
        shown, asked = (str(value) for value in rng.sample(range(10_000, 100_000), 2))
        example = self._example(request, shown)
        names = _names(rng, self.hops + 1, 5)
        places = sorted(rng.random() for _ in names)
        question, prefix = _ask(asked, len(names))
        return Draft(
            intro=f"{example}\n\n{_INTRO}",
            inserts=tuple(
                Insert(text, place, True) for text, place in zip(_statements(names, asked), places, strict=True)
            ),
            question=question,
            prefix=prefix,
            references=tuple(names),
            reserve=_RESERVE,
        )

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """The noise."""
        return noise()

    def _example(self, request: Request, value: str) -> str:
        """A solved task with names of three letters, with as much noise as the length leaves room for."""
        names = _names(request.rng, self.hops + 1, 3)
        places = sorted(request.rng.random() for _ in names)
        question, prefix = _ask(value, len(names))
        text = ""
        for size in itertools.count():
            hidden = [NOISE] * size
            for statement, place in reversed(list(zip(_statements(names, value), places, strict=True))):
                hidden.insert(round(place * size), statement)
            longer = "\n".join([_INTRO, "", *hidden, "", question, f"{prefix} {', '.join(names)}."])
            if text and count_tokens(request.tokenizer, longer) > min(_EXAMPLE_TOKENS, request.length // 4):
                return text
            text = longer
        raise AssertionError("the loop ends when the example outgrows its room")


_INTRO = "Follow the chain of variable assignments that is hidden in the following text."


def _ask(value: str, number: int) -> tuple[str, str]:
    """The question and the first words of its answer."""
    return (
        f"Question: Which variables are assigned the value {value} in the text above?",
        f"Answer: By the chain of assignments in the text above, {number} variables have the value {value}:",
    )


def _statements(names: Sequence[str], value: str) -> list[str]:
    """VAR A = value, VAR B = VAR A, ..."""
    return [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names))]


def _names(rng: random.Random, count: int, letters: int) -> list[str]:
    """Different names in capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names.setdefault("".join(rng.choices(string.ascii_uppercase, k=letters)))
    return list(names)


VARIABLE_TRACKING = GenerationTask(
    "vt",
    "tracing",
    "the five variables of one chain of assignments, in repeated noise sentences",
    Tracking(),
    SOURCE,
    metric="share of the variables found",
)
