"""What needles are hidden in."""

from __future__ import annotations

import itertools
import random
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


def running_text(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, rng: random.Random) -> Haystack:
    """The sentences of the corpus from a random one on, again from the first after the last.

    Raises:
        BadArgument: every sentence spells out a special token of the tokenizer.
    """
    special = tuple(tokenizer.all_special_tokens)
    sentences = [text for text in corpus.sentences if not any(token in text for token in special)]
    if not sentences:
        raise BadArgument("corpus", corpus.name, "every sentence spells a special token of the tokenizer; give another")
    start = rng.randrange(len(sentences))
    return Haystack(itertools.islice(itertools.cycle(sentences), start, None), " ")


def lines(units: Iterator[str]) -> Haystack:
    """The given lines; what they leave open at the end is filled with the beginning of the noise."""
    return Haystack(units, "\n", tuple(NOISE.split()) * 4)
