"""State tracking in text: what is in a cup after the contents of cups were moved, whether a lamp is on.

Word problems of groups (The Illusion of State, arXiv 2404.08819) told in sentences that stand in running text, in
order: every sentence counts, and none gives the answer away. `groups` makes the token-level originals.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import Haystack, running_text
from foveate.tasks.prompt import Draft, Insert
from foveate.tasks.scoring import SOLE_CHOICE

SOURCE = "group word problems, arXiv 2404.08819; as text"
_RESERVE = 24
_THINGS: tuple[str, ...] = ("coin", "ring", "bean", "shell", "dice")


@dataclass(frozen=True)
class Lamp:
    """Parity: a switch is pressed or left alone `steps` times; is the lamp on?"""

    steps: int = 8

    def draft(self, request: Request) -> Draft:
        """The lamp's first state, then the steps."""
        rng = request.rng
        start = rng.random() < 0.5
        pressed = [rng.random() < 0.5 for _ in range(self.steps)]
        told = [f"At first, the lamp is {_lit(start)}."]
        told += ["Someone presses the switch of the lamp." if each else _LEFT_ALONE for each in pressed]
        return Draft(
            intro=_INTRO.format(what="a lamp; each press of its switch turns it on or off"),
            inserts=in_order(rng, told, range(len(told))),
            question="Question: Is the lamp on or off after all that is told in the text above? Answer with one word.",
            prefix="Answer: In the end, the lamp is",
            references=(_lit((start + sum(pressed)) % 2 == 1),),
            reserve=_RESERVE,
            choices=("on", "off"),
        )

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """Running text that speaks of no lamp."""
        return running_text(request.tokenizer, request.corpus, request.rng, _LAMPS)


@dataclass(frozen=True)
class Cups:
    """Permutations: what lies in cups is moved among them `steps` times.

    Attributes:
        cups: how many there are.
        move: "swap": two cups change their contents, which generates the whole symmetric group; "turn": three cups
            pass them on in a ring, which generates the even permutations.
    """

    cups: int
    move: Literal["swap", "turn"] = "swap"
    steps: int = 8

    def draft(self, request: Request) -> Draft:
        """What lies where at first, then the moves."""
        rng = request.rng
        held = rng.sample(_THINGS[: self.cups], self.cups)
        first = [f"the {thing} is in cup {number}" for number, thing in enumerate(held, start=1)]
        told = [f"At first, {', '.join(first[:-1])}, and {first[-1]}."]
        for _ in range(self.steps):
            some = rng.sample(range(self.cups), 2 if self.move == "swap" else 3)
            told.append(_move(some))
            contents = [held[cup] for cup in some]
            for cup, thing in zip([*some[1:], some[0]], contents, strict=True):
                held[cup] = thing
        asked = rng.randrange(self.cups)
        return Draft(
            intro=_INTRO.format(what=f"{self.cups} cups, and of what is in them"),
            inserts=in_order(rng, told, range(len(told))),
            question=f"Question: What is in cup {asked + 1} after all that is told in the text above? "
            "Answer with one word.",
            prefix=f"Answer: In the end, what is in cup {asked + 1} is the",
            references=(held[asked],),
            reserve=_RESERVE,
            choices=_THINGS[: self.cups],
        )

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """Running text that speaks of no cup."""
        return running_text(request.tokenizer, request.corpus, request.rng, _CUPS)


_INTRO = "Hidden in the following text, sentences tell of {what}. They stand in the order in which things happen."
_LEFT_ALONE = "Someone looks at the switch of the lamp and leaves it alone."
_LAMPS = re.compile(r"\b(lamp|switch)", re.IGNORECASE)
_CUPS = re.compile(rf"\b(cup|{'|'.join(_THINGS)})s?\b", re.IGNORECASE)


def _lit(on: bool) -> str:
    return "on" if on else "off"


def _move(some: Sequence[int]) -> str:
    """What happens to the contents of some cups, each going to the next and the last one's to the first."""
    numbers = [cup + 1 for cup in some]
    if len(numbers) == 2:
        return f"The contents of cup {numbers[0]} and cup {numbers[1]} are swapped."
    a, b, c = numbers
    return f"The contents go around: from cup {a} to cup {b}, from cup {b} to cup {c}, from cup {c} to cup {a}."


def in_order(rng: random.Random, told: Sequence[str], evidence: Sequence[int]) -> tuple[Insert, ...]:
    """Sentences at random places, in order; those of the given numbers are evidence."""
    places = sorted(rng.random() for _ in told)
    needed = set(evidence)
    return tuple(Insert(text, place, n in needed) for n, (text, place) in enumerate(zip(told, places, strict=True)))


def _task(name: str, description: str, recipe: Lamp | Cups, choices: int) -> GenerationTask:
    metric = "share of the questions answered"
    return GenerationTask(name, "state", description, recipe, SOURCE, SOLE_CHOICE, metric, 1 / choices)


STATE_TASKS = (
    _task("state_parity", "a lamp whose switch is pressed again and again", Lamp(), 2),
    _task("state_s3", "three cups whose contents are swapped", Cups(3), 3),
    _task("state_s5", "five cups whose contents are swapped", Cups(5), 5),
    _task("state_a5", "five cups, three of which pass their contents around", Cups(5, "turn"), 5),
)
