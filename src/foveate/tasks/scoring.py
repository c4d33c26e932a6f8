"""Rules that score a generated answer, and say when more text cannot change the score."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.tasks.base import Sample

_CONTROL = re.compile(r"[\x00-\x1f]")
_SENTENCE = re.compile(r"[.!?\n]")


@dataclass(frozen=True)
class Rule:
    """How an answer is scored.

    Attributes:
        score: (text, sample) -> 0..1.
        settled: (text, sample) -> whether every continuation of the text has the same score.
    """

    score: Callable[[str, Sample], float]
    settled: Callable[[str, Sample], bool]


def plain(text: str) -> str:
    """The text as RULER compares it: control characters are line ends, case does not count."""
    return _CONTROL.sub("\n", text).strip().lower()


def found_share(text: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the text, case ignored: RULER's `string_match_all`, 0..1.

    Control characters count as line ends. As in RULER, a number inside a longer number is found.
    """
    text = plain(text)
    return sum(reference.lower() in text for reference in references) / len(references)


def found_any(text: str, references: Sequence[str]) -> float:
    """1 if one of the references occurs in the text, case ignored, else 0: RULER's `string_match_part`."""
    text = plain(text)
    return float(any(reference.lower() in text for reference in references))


def first_sentence(text: str) -> tuple[str, bool]:
    """The text up to its first full stop, question mark, exclamation mark or line end, and whether there is one."""
    text = text.lstrip()
    end = _SENTENCE.search(text)
    return (text[: end.start()], True) if end else (text, False)


def named(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that stand in the text as whole words, case ignored."""
    return {each for each in choices if re.search(rf"(?<!\w){re.escape(each)}(?!\w)", text, re.IGNORECASE)}


def sole_choice(text: str, sample: Sample) -> float:
    """1 if the first sentence names the reference and no other of the choices, else 0: BABILong's rule."""
    return float(named(first_sentence(text)[0], sample.choices) == set(sample.references))


# Functions and no lambdas: a task travels to the processes that measure it.


def _share(text: str, sample: Sample) -> float:
    return found_share(text, sample.references)


def _all(text: str, sample: Sample) -> bool:
    return _share(text, sample) == 1.0


def _any(text: str, sample: Sample) -> float:
    return found_any(text, sample.references)


def _one(text: str, sample: Sample) -> bool:
    return _any(text, sample) == 1.0


def _over(text: str, sample: Sample) -> bool:
    return first_sentence(text)[1]


ALL = Rule(_share, _all)
"""RULER's rule for lists: more text can only add what is missing."""

ANY = Rule(_any, _one)
"""RULER's rule for questions with several right answers."""

SOLE_CHOICE = Rule(sole_choice, _over)
"""A closed question: settled when the first sentence is over."""
