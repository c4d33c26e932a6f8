"""RULER's question answering (arXiv 2404.06654, section 3): the passages of the answer among many others.

Form, reserve and scoring are RULER's. Its questions are from data sets that are not shipped here (`squad` reads them
where the user has the files); these are made: passages of running text, each with one sentence about invented names,
so that no model knows an answer without reading. What the passages leave open of the length is one more, cut to fit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from foveate.errors import BadArgument
from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import Haystack, clean_sentences, running_text
from foveate.tasks.invention import invent
from foveate.tasks.needles import SOURCE
from foveate.tasks.prompt import Draft, Insert, room
from foveate.tasks.scoring import ANY
from foveate.tasks.sizing import grow

_PASSAGE_CHARS = 300
_TOKENS_PER_PASSAGE = 40  # no passage has fewer: how many can be asked for
_RESERVE = 32
_TRIES = 16


@dataclass(frozen=True)
class Passage:
    """A text, and the characters [start, stop) of what answers the question in it."""

    text: str
    marks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Asked:
    """A question with its answers, the passages that hold them, and others to hide these among, in order of use."""

    question: str
    answers: tuple[str, ...]
    gold: tuple[Passage, ...]
    others: tuple[Passage, ...]


class Questions(Protocol):
    """Where questions are from."""

    @property
    def name(self) -> str: ...

    def ask(self, request: Request) -> Asked:
        """The question of one sample."""
        ...

    def rest(self, request: Request) -> Haystack:
        """Sentences for the last passage, which is cut to fit."""
        ...


@dataclass(frozen=True)
class Reading:
    """Numbered passages in random order, and a question on one or two of them."""

    questions: Questions

    def draft(self, request: Request) -> Draft:
        """As many passages as fit.

        Raises:
            BadArgument: there are too few passages for the length.
        """
        for _ in range(_TRIES):
            asked = self.questions.ask(request)
            draft = grow(request, _builder(asked, request.rng.getrandbits(64)), 1)
            if not request.length:
                break
            left = room(request.tokenizer, draft, request.length)
            number = len(asked.gold) + len(asked.others)
            if left > request.length // 4 and draft.inserts[0].text.endswith(_header(number + 1)):
                held = f"holds {number} passages, too few for length={request.length}"
                raise BadArgument("passages", self.questions.name, f"{held}; give more, or a smaller length")
            if left >= 0:
                break  # else its passages are too long for the length: another question
        return draft

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """The text of the last passage."""
        return self.questions.rest(request)


_ASK = "Answer the question from the documents. Give the answer alone, without any other words."


def _header(number: int) -> str:
    return f"Document {number}:"


def _builder(asked: Asked, order: int) -> Callable[[int], Draft]:
    """Drafts by how many of the other passages are in them."""

    def build(size: int) -> Draft:
        passages = [*asked.gold, *asked.others[:size]]
        random.Random(order).shuffle(passages)
        text = ""
        marks: list[tuple[int, int]] = []
        for number, passage in enumerate(passages, start=1):
            text += f"{_header(number)}\n"
            marks += [(start + len(text), stop + len(text)) for start, stop in passage.marks]
            text += f"{passage.text}\n\n"
        text += _header(len(passages) + 1)
        return Draft(
            intro=f"{_ASK} These are the documents.",
            inserts=(Insert(text, 0.0, True, tuple(marks)),),
            question=f"{_ASK}\n\nQuestion: {asked.question}",
            prefix="Answer:",
            references=asked.answers,
            reserve=_RESERVE,
        )

    return build


# What is said about invented names a, b (and c), and what is asked: the answer is the last name.
_ONE_HOP = (
    ("{a} was born in {b}.", "In which town did {a} come into the world?"),
    ("{a} is married to {b}.", "Who is the spouse of {a}?"),
    ("{a} always travels on the ship {b}.", "What is the name of the vessel that {a} sails with?"),
)
_TWO_HOPS = (
    ("{a} works for {b}.", "{b} has its seat in {c}.", "In which town is the seat of the company that employs {a}?"),
    ("{a} was taught by {b}.", "{b} is at home in {c}.", "In which town does the teacher of {a} live?"),
    ("{a} is a child of {b}.", "{b} was painted by {c}.", "Who made the portrait of the parent of {a}?"),
)


@dataclass(frozen=True)
class Invented:
    """Questions about invented names; the others' sentences say the same of other names.

    Attributes:
        hops: passages that have to be read together: "a ... b" in one, "b ... c" in the other.
    """

    hops: int
    name: str = "invented"

    def ask(self, request: Request) -> Asked:
        """A relation, the sentences of one answer and those of all the others."""
        rng = request.rng
        *forms, question = rng.choice(_ONE_HOP if self.hops == 1 else _TWO_HOPS)
        names = self.hops + 1
        asked = invent(rng, names, request.corpus.text)
        sentences = clean_sentences(request.tokenizer, request.corpus)
        gold = tuple(_passage(rng, sentences, fact) for fact in _facts(forms, asked))
        groups = (request.length // _TOKENS_PER_PASSAGE + 8) // self.hops + 1
        drawn = invent(rng, groups * names, " ".join(asked))
        others = tuple(
            Passage(_passage(rng, sentences, fact).text)
            for first in range(0, len(drawn), names)
            for fact in _facts(forms, drawn[first : first + names])
        )
        return Asked(question.format(a=asked[0]), (asked[-1],), gold, others)

    def rest(self, request: Request) -> Haystack:
        """Running text of the corpus."""
        return running_text(request.tokenizer, request.corpus, request.rng)


def _facts(forms: list[str], names: list[str]) -> list[str]:
    """The sentences of one chain of names."""
    return [form.format(**dict(zip("abc", names, strict=False))) for form in forms]


def _passage(rng: random.Random, sentences: Sequence[str], fact: str) -> Passage:
    """A few successive sentences with the fact somewhere between them."""
    number = rng.randrange(len(sentences))
    around: list[str] = []
    while sum(map(len, around)) < _PASSAGE_CHARS:
        around.append(sentences[number % len(sentences)])
        number += 1
    border = rng.randrange(len(around) + 1)
    before = "".join(f"{sentence} " for sentence in around[:border])
    return Passage(
        before + " ".join([fact, *around[border:]]),
        ((len(before), len(before) + len(fact)),),
    )


def reading_task(name: str, description: str, questions: Questions, source: str = SOURCE) -> GenerationTask:
    """A question answering task."""
    metric = "share of the questions answered"
    return GenerationTask(name, "qa", description, Reading(questions), source, ANY, metric)


QUESTION_TASKS = (
    reading_task("qa_1", "a question on one of many passages", Invented(1)),
    reading_task("qa_2", "a question on two of many passages together", Invented(2)),
)
