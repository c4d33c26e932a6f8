"""Words for lists, and adjectives and nouns for keys of needles, taken from Python's documentation by their forms."""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Callable

from foveate.errors import BadArgument
from foveate.tasks.corpora import corpus

_ADJECTIVE = re.compile(r"[a-z]{2,7}(?:able|ible|ive|ous|al|ic|ful|less|ing|ed)")
_BEFORE_WORD = re.compile(r"\b(?:the|an?|this|each|every|any|some|its|another) ([a-z]{4,11}) (?=[a-z]{3,})")
_CLOSES_PHRASE = re.compile(
    r"\b(?:the|an?|this|each|every|any|its|another) (?:[a-z]{3,} )?([a-z]{4,10})"
    r"(?=[.,;:)]| (?:of|is|are|was|has|have|to|in|for|from|with|that|which|will|must|can|and|or)\b)"
)
_NO_NOUN = re.compile(r"(?:able|ible|ive|ous|al|ic|ful|less|ing|ed|ly|[^s]s)$")
_PLAIN = re.compile(r"(?<![\w.'-])[a-z]{4,11}(?![\w'-])")
# Words of the needle sentence itself, and words that are no nouns although they stand where nouns do.
_LEFT_OUT = """
special magic number word string from that which they instead itself left mean other http above below there otherwise
once found similar latter will with
"""


@functools.cache
def adjectives() -> tuple[str, ...]:
    """Words with an adjective's ending that stand between a determiner and another word; most frequent first.

    None ends in another, so that no key is the end of another key.
    """
    seen = Counter(match[1] for match in _BEFORE_WORD.finditer(corpus().text))
    kept: list[str] = []
    for word in _frequent(seen, lambda word: bool(_ADJECTIVE.fullmatch(word))):
        if not any(word.endswith(other) or other.endswith(word) for other in kept):
            kept.append(word)
    return tuple(kept)


@functools.cache
def nouns() -> tuple[str, ...]:
    """Words that close a phrase which a determiner opened; most frequent first. Plurals are left out.

    None begins with another, so that no key is the beginning of another key.
    """
    text = corpus().text
    seen = Counter(match[1] for match in _CLOSES_PHRASE.finditer(text))
    before = Counter(match[1] for match in _BEFORE_WORD.finditer(text))
    kept: list[str] = []
    for word in _frequent(seen, lambda word: before[word] < 3 * seen[word] and not _NO_NOUN.search(word)):
        if not any(word.startswith(other) or other.startswith(word) for other in kept):
            kept.append(word)
    return tuple(kept)


@functools.cache
def plain_words() -> tuple[str, ...]:
    """Words of four to eleven small letters that the documentation has at least twice, in alphabetical order."""
    seen = Counter(_PLAIN.findall(corpus().text))
    return tuple(sorted(word for word, count in seen.items() if count >= 2))


def draw_words(rng: random.Random, count: int) -> list[str]:
    """`count` different plain words in random order; keys of two words follow where there are too few."""
    known = plain_words()
    few = rng.sample(known, min(count, len(known)))
    return few + (draw_keys(rng, count - len(few)) if count > len(few) else [])


def draw_keys(rng: random.Random, count: int, among: int = 0) -> list[str]:
    """`count` different keys, "adjective-noun"; none is part of another.

    Args:
        among: how many keys the prompt will hold in all, if more than `count`. Where that is over half of the pairs
            there are, every key is "adjective-adjective-noun".

    Raises:
        BadArgument: so many keys cannot be made.
    """
    first, last = adjectives(), nouns()
    among = max(count, among)
    extra = 1 if 2 * among > len(first) * len(last) else 0
    most = len(first) ** (1 + extra) * len(last) // 2
    if among > most:
        raise BadArgument("keys", among, f"at most {most} different keys can be made; ask for a smaller length")
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys.setdefault("-".join([*(rng.choice(first) for _ in range(1 + extra)), rng.choice(last)]))
    return list(keys)


def _frequent(counts: Counter[str], wanted: Callable[[str], bool]) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in ranked if count >= 2 and word not in _LEFT_OUT.split() and wanted(word)]
