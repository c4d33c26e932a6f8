"""RULER's needle family (arXiv 2404.06654, section 3 and appendix B): sentences with a key and a value, hidden in text.

Structure, needle sentence, depths, reserve and scoring are RULER's; the wording around the needles, the text of the
haystack and the word lists are our own, so scores compare within this library only.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import Haystack, lines, noise, running_text
from foveate.tasks.prompt import Draft, Insert
from foveate.tasks.words import draw_keys

_DEPTHS = 40  # needles in running text stand at 40 equally spaced depths, each at most once
_GOLDEN = (5**0.5 - 1) / 2
_TOKENS_PER_NEEDLE = 12  # no tokenizer writes a needle with fewer: how many distractors can be asked for
_RESERVE = 128

SOURCE = "RULER, arXiv 2404.06654"

Hay = Literal["noise", "text", "needles"]
Item = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    """How the prompts of one task of the family are made.

    Attributes:
        hay: "noise": five fixed sentences, repeated; "text": running text of the corpus; "needles": sentences of
            the needle's own form with other keys.
        key, value: what keys and values look like: "adjective-noun" words, 7-digit numbers, version-4 UUIDs.
        keys, values: needles are placed for `keys` keys with `values` values each.
        queries: how many of the keys are asked for, all their values being wanted.
    """

    hay: Hay
    key: Item = "words"
    value: Item = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def draft(self, request: Request) -> Draft:
        """Intro, needles at their depths, and the question for the first `queries` keys."""
        rng = request.rng
        taken = request.corpus.text if self.hay == "text" else ""
        keys = draw(rng, self.key, self.keys, taken, self._needles(request))
        values = draw(rng, self.value, self.keys * self.values, taken)
        needles = [(keys[number // self.values], value) for number, value in enumerate(values)]
        asked = keys[: self.queries]
        references = tuple(value for key, value in needles if key in asked)
        places = self._places(request, len(needles))
        question, prefix = ask(self.value, asked, len(references) > 1)
        return Draft(
            intro=INTRO.format(kind=self.value),
            inserts=tuple(
                Insert(needle_sentence(self.value, key, value), place, key in asked)
                for (key, value), place in zip(needles, places, strict=True)
            ),
            question=question,
            prefix=prefix,
            references=references,
            reserve=_RESERVE,
        )

    def _places(self, request: Request, count: int) -> list[float]:
        """Depths of the needles. What is asked for first moves through the haystack from sample to sample in steps of
        the golden ratio, so that few samples already cover all depths; each sample's depth is uniform over seeds."""
        start = random.Random(f"{self!r} {request.length} {request.seed}").random()
        first = (start + request.index * _GOLDEN) % 1
        if self.hay != "text":
            return [first, *(request.rng.random() for _ in range(count - 1))]
        step = int(first * _DEPTHS)
        others = request.rng.sample([s for s in range(_DEPTHS) if s != step], count - 1)
        return [s / (_DEPTHS - 1) for s in (step, *others)]

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """The hay; distractor needles share no key and no value with those of the draft."""
        if self.hay == "noise":
            return noise()
        if self.hay == "text":
            return running_text(request.tokenizer, request.corpus, request.rng)
        taken = " ".join(insert.text for insert in draft.inserts)
        number = self._needles(request)
        keys = draw(request.rng, self.key, number, taken)
        values = draw(request.rng, self.value, number, taken)
        return lines(needle_sentence(self.value, key, value) for key, value in zip(keys, values, strict=True))

    def _needles(self, request: Request) -> int:
        """At least as many as one prompt can hold."""
        return request.length // _TOKENS_PER_NEEDLE + 128 if self.hay == "needles" else self.keys


def needle_sentence(kind: Item, key: str, value: str) -> str:
    """RULER's needle, word for word: models are evaluated on this form."""
    return f"One of the special magic {kind} for {key} is: {value}."


INTRO = (
    "Several special magic {kind} are hidden in the following text. Memorize them: "
    "afterwards you will be quizzed about these {kind}."
)


def ask(kind: Item, keys: Sequence[str], several: bool) -> tuple[str, str]:
    """The question and the first words of its answer."""
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if several:
        about = f"special magic {kind} for {names}"
        return f"What are all the {about} in the text above?", f"The {about} are:"
    about = f"special magic {kind[:-1]} for {names}"
    return f"What is the {about} in the text above?", f"The {about} is"


def draw(rng: random.Random, kind: Item, count: int, absent_from: str, among: int = 0) -> list[str]:
    """`count` different keys or values of a kind, none of which occurs in `absent_from` or is part of another.

    among: how many there will be in the prompt; all keys of a prompt have equally many words.
    """
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        if kind == "words":
            fresh = draw_keys(rng, count, among)
        elif kind == "numbers":
            fresh = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
        else:
            fresh = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
        drawn.update(dict.fromkeys(text for text in fresh if text not in absent_from))
    return list(drawn)[:count]


def _task(name: str, description: str, recipe: Needles) -> GenerationTask:
    return GenerationTask(name, "needle", description, recipe, SOURCE, metric="share of the values found")


NEEDLE_TASKS = (
    _task("niah_single_1", "one number, in repeated noise sentences", Needles("noise")),
    _task("niah_single_2", "one number, in running text", Needles("text")),
    _task("niah_single_3", "one UUID, in running text", Needles("text", value="uuids")),
    _task("niah_multikey_1", "one number of four keys, in running text", Needles("text", keys=4)),
    _task("niah_multikey_2", "one number among needles with other keys", Needles("needles")),
    _task("niah_multikey_3", "one UUID of a UUID, among needles with other keys", Needles("needles", "uuids", "uuids")),
    _task("niah_multivalue", "four numbers of one key, in running text", Needles("text", values=4)),
    _task("niah_multiquery", "the numbers of four keys, in running text", Needles("text", keys=4, queries=4)),
)
