"""One context, several questions: asked each for itself, or one after the other in a chat.

What serves one question need not serve the next. A method that chooses what to keep by the first question shows here
what it threw away. After SCBench (arXiv 2412.10319), which asks a shared context several times in both ways; contexts
are those of this library's needles and pairs. Depths are drawn apart from the order of the questions, so that a later
turn is not a deeper needle.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import BadArgument
from foveate.tasks.base import Family
from foveate.tasks.generation import GenerationTask, Recipe, Request
from foveate.tasks.haystack import Haystack, running_text
from foveate.tasks.needles import INTRO, ask, draw, needle_sentence
from foveate.tasks.prompt import Ask, Draft, Insert
from foveate.tasks.recall import INTRO as PAIRS_INTRO
from foveate.tasks.recall import Pairs, pair_line
from foveate.tasks.words import draw_keys

TURNS = 4
_RESERVE = 24
_GOLDEN = (5**0.5 - 1) / 2
_DEPTHS = 40  # as in the single tasks, needles stand at equally spaced depths, each at most once


@dataclass(frozen=True)
class NeedleTurns:
    """As many needles in running text as there are questions, each of which asks for one.

    Attributes:
        turns: how many.
        conversation: whether the questions follow one another in one chat.
    """

    turns: int = TURNS
    conversation: bool = False

    def __post_init__(self) -> None:
        _check(self.turns)

    def draft(self, request: Request) -> Draft:
        """Needles, each in a part of the text of its own, and their questions in an order drawn apart from that."""
        keys = draw(request.rng, "words", self.turns, request.corpus.text)
        values = draw(request.rng, "numbers", self.turns, request.corpus.text)
        asks = []
        for key, value in zip(keys, values, strict=True):
            question, prefix = ask("numbers", [key], False)
            asks.append(Ask(question, prefix, (value,), _RESERVE))
        texts = [needle_sentence("numbers", key, value) for key, value in zip(keys, values, strict=True)]
        return _drafted(INTRO.format(kind="numbers"), texts, asks, request, self.conversation)

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """Running text of the corpus."""
        return running_text(request.tokenizer, request.corpus, request.rng)


@dataclass(frozen=True)
class PairTurns(Pairs):
    """Lines "key: value" that fill the prompt; each question asks for the value of one key.

    Attributes:
        queries: how many questions.
        conversation: whether they follow one another in one chat.
    """

    conversation: bool = False

    def __post_init__(self) -> None:
        _check(self.queries)

    def draft(self, request: Request) -> Draft:
        """The pairs that are asked for, each in a part of the list of its own, and their questions."""
        rng = request.rng
        keys = draw_keys(rng, self.queries, self._number(request))
        values = [str(value) for value in rng.sample(range(100_000, 1_000_000), self.queries)]
        asks = [
            Ask(
                f"Question: Which number stands behind {key} in the list above?",
                f"Answer: The number behind {key} is:",
                (value,),
                _RESERVE,
            )
            for key, value in zip(keys, values, strict=True)
        ]
        texts = [pair_line(key, value) for key, value in zip(keys, values, strict=True)]
        return _drafted(PAIRS_INTRO, texts, asks, request, self.conversation)


def _drafted(intro: str, texts: Sequence[str], asks: Sequence[Ask], request: Request, conversation: bool) -> Draft:
    """Text i is the evidence of question i."""
    places = _places(request, len(texts))
    first, *later = asks
    return Draft(
        intro=intro,
        inserts=tuple(
            Insert(text, place, True, turn=turn) for turn, (text, place) in enumerate(zip(texts, places, strict=True))
        ),
        question=first.question,
        prefix=first.prefix,
        references=first.references,
        reserve=first.reserve,
        later=tuple(later),
        conversation=conversation,
    )


def _places(request: Request, turns: int) -> list[float]:
    """Depths by turn, one in each of as many equal parts of the text, the parts in random order. All of them move on
    from sample to sample in steps of the golden ratio, so that few samples already cover all depths in each turn."""
    start = random.Random(f"turns {request.length} {request.seed}").random()
    first = start + request.index * _GOLDEN
    parts = [0, *request.rng.sample(range(1, turns), turns - 1)]
    return [int((first + part / turns) % 1 * _DEPTHS) / (_DEPTHS - 1) for part in parts]


def _check(turns: int) -> None:
    if not 2 <= turns <= _DEPTHS:
        raise BadArgument("turns", turns, f"give 2 to {_DEPTHS} questions")


def _task(name: str, family: Family, description: str, recipe: Recipe) -> GenerationTask:
    source = "SCBench, arXiv 2412.10319; contexts of our own"
    return GenerationTask(name, family, description, recipe, source, metric="share of the values found")


TURN_TASKS = (
    _task("ask_many_needles", "needle", "four numbers in running text, each asked for by itself", NeedleTurns()),
    _task("ask_many_pairs", "recall", "four numbers of a list of pairs, each asked for by itself", PairTurns()),
    _task(
        "turns_needles", "needle", "four numbers in running text, asked for in one chat", NeedleTurns(conversation=True)
    ),
    _task(
        "turns_pairs", "recall", "four numbers of a list of pairs, asked for in one chat", PairTurns(conversation=True)
    ),
)
