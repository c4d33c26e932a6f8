"""Associative recall in text: as many pairs as the length holds, several of which are asked for at once.

The form of MQAR (Zoology, arXiv 2312.04927, section 3) for models that are trained already: nothing but pairs of a key
and a value stands in the prompt. `association` makes the token-level original, for layers that are trained on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import Haystack, lines
from foveate.tasks.prompt import Draft, Insert
from foveate.tasks.words import draw_keys

_TOKENS_PER_PAIR = 7  # no tokenizer writes a line with fewer


@dataclass(frozen=True)
class Pairs:
    """Lines "key: value"; `queries` of the keys are asked for.

    Keys are words joined by a hyphen, values numbers of six digits; both are different in every line.
    """

    queries: int = 4

    def draft(self, request: Request) -> Draft:
        """The pairs that are asked for, at random places, and the question for their keys in random order."""
        rng = request.rng
        keys = draw_keys(rng, self.queries, self._number(request))
        values = [str(value) for value in rng.sample(range(100_000, 1_000_000), self.queries)]
        names = f"{', '.join(keys[:-1])}, and {keys[-1]}"
        return Draft(
            intro=INTRO,
            inserts=tuple(
                Insert(pair_line(key, value), rng.random(), True) for key, value in zip(keys, values, strict=True)
            ),
            question=f"Question: Which numbers stand behind {names}, in this order?",
            prefix=f"Answer: The numbers behind {names} are:",
            references=tuple(values),
            reserve=48,
        )

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """All the other pairs."""
        rng, number = request.rng, self._number(request)
        asked = dict(insert.text.split(": ") for insert in draft.inserts)
        keys = _others(draw_keys(rng, number), asked)
        values = rng.sample(range(100_000, 1_000_000), number)
        kept = _others([str(value) for value in values], asked.values())
        return lines(pair_line(key, value) for key, value in zip(keys, kept, strict=False))

    def _number(self, request: Request) -> int:
        """At least as many pairs as one prompt can hold."""
        return request.length // _TOKENS_PER_PAIR + 64


INTRO = "Each line of the following list holds a key and its number. Memorize them: you will be asked for some."


def pair_line(key: str, value: str) -> str:
    """One line of the list."""
    return f"{key}: {value}"


def _others(drawn: Sequence[str], asked: Iterable[str]) -> list[str]:
    taken = set(asked)
    return [each for each in drawn if each not in taken]


PAIR_RECALL = GenerationTask(
    "mqar",
    "recall",
    "the numbers of four keys, in a list of pairs that fills the prompt",
    Pairs(),
    "MQAR, Zoology, arXiv 2312.04927; as text",
    metric="share of the values found",
)
"""Multi-query associative recall for models that read text."""
