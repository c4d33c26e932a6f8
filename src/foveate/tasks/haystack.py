"""What needles are hidden in."""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveate.errors import BadArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foveate.tasks.corpora import Corpus

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Haystack:
    """An endless stream of sentences or lines.

    Attributes:
        units: the sentences or lines, in order.
        separator: what stands between two of them.
        tail: words for the last, shortened sentence; empty: those of the units that did not fit.
    """

    units: Iterator[str]
    separator: str
    tail: tuple[str, ...] = ()


def noise() -> Haystack:
    """The five sentences that RULER repeats, on a line each time."""
    return Haystack(itertools.repeat(NOISE), "\n")


def clean_sentences(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, without: re.Pattern[str] | None = None
) -> tuple[str, ...]:
    """The sentences of the corpus that spell no special token of the tokenizer and hold nothing of `without`.

    Raises:
        BadArgument: there are none.
    """
    return _clean(corpus, tuple(tokenizer.all_special_tokens), without)


@functools.lru_cache(maxsize=16)
def _clean(corpus: Corpus, special: tuple[str, ...], without: re.Pattern[str] | None) -> tuple[str, ...]:
    sentences = [text for text in corpus.sentences if not any(token in text for token in special)]
    if not sentences:
        raise BadArgument("corpus", corpus.name, "every sentence spells a special token of the tokenizer; give another")
    if without is not None:
        sentences = [text for text in sentences if not without.search(text)]
        if not sentences:
            raise BadArgument("corpus", corpus.name, "every sentence holds words that the task asks for; give another")
    return tuple(sentences)


def running_text(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, rng: random.Random, without: re.Pattern[str] | None = None
) -> Haystack:
    """The sentences of the corpus from a random one on, again from the first after the last.

    Args:
        without: sentences in which this is found are left out.

    Raises:
        BadArgument: no sentence is left.
    """
    sentences = clean_sentences(tokenizer, corpus, without)
    start = rng.randrange(len(sentences))
    return Haystack(itertools.islice(itertools.cycle(sentences), start, None), " ")


def lines(units: Iterator[str]) -> Haystack:
    """The given lines; what they leave open at the end is filled with the beginning of the noise."""
    return Haystack(units, "\n", tuple(NOISE.split()) * 4)
