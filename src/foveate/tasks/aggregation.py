"""RULER's aggregation tasks (arXiv 2404.06654, section 3): which words of a list are the most frequent?

Numbers of words, frequencies, examples, reserves and scoring are RULER's; wording and word lists are our own. What the
list leaves open of the length is one line of noise behind it.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import NOISE, Haystack, noise
from foveate.tasks.needles import SOURCE
from foveate.tasks.prompt import Draft, Insert
from foveate.tasks.sizing import grow
from foveate.tasks.words import draw_words

_SHORT_LENGTH = 4096  # tokens: below, common words repeat less often
_TOKENS_PER_WORD = 4  # no tokenizer writes a numbered word with fewer


@dataclass(frozen=True)
class CommonWords:
    """A numbered list of words in random order, ten of which occur far more often than the others.

    Attributes:
        common: how many words are asked for.
        repeats: how often each common word and each other word occurs; `short_repeats`: below 4096 tokens.
        example, short_example: different words of the solved example, and repeats in it.
    """

    common: int = 10
    repeats: tuple[int, int] = (30, 3)
    short_repeats: tuple[int, int] = (6, 1)
    example: tuple[int, tuple[int, int]] = (40, (10, 3))
    short_example: tuple[int, tuple[int, int]] = (20, (3, 1))

    def draft(self, request: Request) -> Draft:
        """A solved example, and the longest list that fits."""
        short = request.length < _SHORT_LENGTH
        often, seldom = self.short_repeats if short else self.repeats
        shown, (shown_often, shown_seldom) = self.short_example if short else self.example
        rng = request.rng
        drawn = draw_words(rng, shown + self.common + max(64, request.length // (_TOKENS_PER_WORD * seldom)))
        example, pool = drawn[:shown], drawn[shown:]
        fixed = " ".join([*drawn, _INTRO, _QUESTION, _PREFIX, NOISE])
        common = list(itertools.islice((word for word in pool if fixed.count(word) == 1), self.common))
        others = [word for word in pool if word not in set(common)]
        answer = ", ".join(example[: self.common])
        listed, _ = _numbered(example[: self.common], example[self.common :], shown_often, shown_seldom, rng)
        intro = f"{_INTRO}\n\n{listed}\n\n{_QUESTION}\n{_PREFIX} {answer}.\n\n{_INTRO}"
        order = rng.getrandbits(64)

        def build(size: int) -> Draft:
            text, marks = _numbered(common, others[:size], often, seldom, random.Random(order))
            return Draft(
                intro=intro,
                inserts=(Insert(text, 0.0, True, marks),),
                question=_QUESTION,
                prefix=_PREFIX,
                references=tuple(common),
                reserve=120,
            )

        return grow(request, build, self.common)

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """The noise, for the rest of the length."""
        return noise()


_INTRO = "Below is a numbered list of words. Some of them occur again and again. Memorize those that occur most often."
_QUESTION = "Question: Which are the 10 words that occur most often in the list above?"
_PREFIX = "Answer: The 10 words that occur most often in the list are:"


def _numbered(
    common: Sequence[str], others: Sequence[str], often: int, seldom: int, rng: random.Random
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The list "1. word 2. word ..." in random order, and where the common words stand in it."""
    order = [*(each for each in common for _ in range(often)), *(each for each in others for _ in range(seldom))]
    rng.shuffle(order)
    return joined([(f"{number}. ", word) for number, word in enumerate(order, start=1)], set(common))


def joined(pieces: Sequence[tuple[str, str]], wanted: set[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Pieces (what stands before a word, the word) with blanks between them, and where the wanted words stand."""
    texts: list[str] = []
    marks: list[tuple[int, int]] = []
    position = 0
    for before, word in pieces:
        start = position + len(before)
        if word in wanted:
            marks.append((start, start + len(word)))
        texts.append(before + word)
        position = start + len(word) + 1
    return " ".join(texts), tuple(marks)


@dataclass(frozen=True)
class FrequentWords:
    """A text of invented words whose frequencies fall with the square of their rank; the first rank is dots.

    The word of rank r occurs floor(N r^-alpha / zeta(alpha)) times; ranks 2 to 4 are asked for.

    Attributes:
        alpha: how fast frequencies fall.
        letters: of a word.
        tokens_per_word: the vocabulary has one word per so many tokens of the length.
    """

    alpha: float = 2.0
    letters: int = 6
    tokens_per_word: int = 50

    def draft(self, request: Request) -> Draft:
        """The longest text that fits."""
        rng = request.rng
        vocabulary = self._vocabulary(rng, max(12, request.length // self.tokens_per_word))
        zeta = _zeta(self.alpha)
        order = rng.getrandbits(64)

        def build(size: int) -> Draft:
            counts = [int(size * rank**-self.alpha / zeta) for rank in range(1, len(vocabulary) + 1)]
            words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
            random.Random(order).shuffle(words)
            text, marks = joined([("", word) for word in words], set(vocabulary[1:4]))
            return Draft(
                intro=_CODED_INTRO,
                inserts=(Insert(text, 0.0, True, marks),),
                question=_CODED_QUESTION,
                prefix=_CODED_PREFIX,
                references=tuple(vocabulary[1:4]),
                reserve=50,
            )

        return grow(request, build, _LEAST_CODED)

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """The noise, for the rest of the length."""
        return noise()

    def _vocabulary(self, rng: random.Random, count: int) -> list[str]:
        words: dict[str, None] = {"...": None}
        while len(words) < count:
            words.setdefault("".join(rng.choices(string.ascii_lowercase, k=self.letters)))
        return list(words)


_LEAST_CODED = 53  # from here on, rank 4 is always more frequent than rank 5
_CODED_INTRO = "Below is a text of coded words. Keep track of how often each of them occurs. Dots are no word."
_CODED_QUESTION = "Question: Leave the dots aside. Which three coded words occur most often in the text above?"
_CODED_PREFIX = "Answer: The three coded words that occur most often are:"


def _zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta function for alpha > 1, by a sum and its Euler-Maclaurin remainder."""
    head = math.fsum(n**-alpha for n in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12


AGGREGATION_TASKS = (
    GenerationTask(
        "cwe",
        "aggregation",
        "the ten words that occur most often in a numbered list",
        CommonWords(),
        SOURCE,
        metric="share of the words found",
    ),
    GenerationTask(
        "fwe",
        "aggregation",
        "the three most frequent of invented words with Zipf's frequencies",
        FrequentWords(),
        SOURCE,
        metric="share of the words found",
    ),
)
