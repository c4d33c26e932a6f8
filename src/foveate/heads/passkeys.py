"""Synthetic texts in which the past matters: passkeys of random words hidden in filler and asked for at the end."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.errors import BadArgument
from foveate.tasks.corpora import Corpus, corpus

_WORDS = """
apple bridge castle dragon engine forest garden harbor island jungle kitchen ladder mountain needle ocean paper queen
river silver table uncle valley window winter yellow zebra
"""
ALPHABET = tuple(_WORDS.split())
"""The 26 words that passkeys are made of."""

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

_SIZES = ((10, 32), (10, 24), (10, 16), (10, 12), (10, 8), (8, 8), (6, 8), (4, 8), (3, 6), (2, 4), (1, 4))
"""(passkeys, words in each), the paper's first; short texts take the first that leaves them enough filler."""

_FILLER = 0.3
"""Least share of filler in a text."""


@dataclass(frozen=True)
class Recall:
    """One thing that a text holds and asks for: places [start, stop) of the sentence and of the answer."""

    needle: tuple[int, int]
    answer: tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids, of which those from `labels` on (questions and answers) are what a model is judged by."""

    ids: tuple[int, ...]
    labels: int
    recalls: tuple[Recall, ...] = ()


def evenly(low: int, high: int, count: int = 50) -> tuple[int, ...]:
    """`count` evenly spaced lengths from low to high, without repetition."""
    return tuple(sorted({round(low + (high - low) * i / max(1, count - 1)) for i in range(count)}))


def shortest(tokenizer: Any) -> int:
    """Tokens of the smallest text that can carry a passkey."""
    return _need(tokenizer, *_SIZES[-1])


def passkey_examples(
    tokenizer: Any, lengths: Sequence[int], seed: int = 0, filler: Corpus | None = None
) -> Iterator[Example]:
    """Endless examples, each of a length drawn from `lengths` (tokens, exactly).

    Ten passkeys of 32 words stand at random depths (5-95 %) of running text; the text ends with a question and the
    answer for each of them, in order. Texts too short for that have shorter and fewer passkeys.

    Args:
        tokenizer: of the model.
        seed: equal seeds give equal examples.
        filler: text around the passkeys; None: the documentation that Python carries.

    Raises:
        BadArgument: a length is too small for even one short passkey.

    Source: synthetic data of DuoAttention (2410.10819, section 2.3); the wording is our own.
    """
    filler = corpus() if filler is None else filler
    rng = random.Random(f"passkeys/{seed}")
    sizes = {length: _size(tokenizer, length) for length in sorted(set(lengths))}
    while True:
        length = rng.choice(lengths)
        yield _example(tokenizer, length, sizes[length], rng, filler)


def _example(tokenizer: Any, length: int, size: tuple[int, int], rng: random.Random, filler: Corpus) -> Example:
    start, (count, words) = _leading(tokenizer), size
    keys = [[rng.choice(ALPHABET) for _ in range(words)] for _ in range(count)]
    needles, tail = [_encode(tokenizer, text) for text in _needles(keys)], _encode(tokenizer, _tail(keys))
    room = length - len(start) - len(tail) - sum(map(len, needles))
    text = _running(tokenizer, room, rng, filler)
    places = [round(room * rng.uniform(0.05, 0.95)) for _ in needles]
    ids, done = list(start), 0
    stands: dict[int, tuple[int, int]] = {}
    for place, needle, number in sorted(zip(places, needles, range(count), strict=True)):
        ids += text[done:place]
        stands[number] = (len(ids), len(ids) + len(needle))
        ids += needle
        done = place
    ids += text[done:]
    answers = _places([_encode(tokenizer, " " + " ".join(key)) for key in keys], tail, len(ids))
    recalls = tuple(Recall(stands[number], answer) for number, answer in enumerate(answers) if answer is not None)
    return Example((*ids, *tail), len(ids), recalls)


def _places(parts: Sequence[Sequence[int]], tail: Sequence[int], start: int) -> list[tuple[int, int] | None]:
    """Where each part stands in the tail, in order; None for one that the tokenizer splits otherwise there."""
    found: list[tuple[int, int] | None] = []
    at = 0
    for part in parts:
        here = next((i for i in range(at, len(tail) - len(part) + 1) if list(tail[i : i + len(part)]) == [*part]), None)
        found.append(None if here is None else (start + here, start + here + len(part)))
        at = at if here is None else here + len(part)
    return found


def running_examples(
    tokenizer: Any, lengths: Sequence[int], seed: int = 0, filler: Corpus | None = None
) -> Iterator[Example]:
    """Endless examples of plain text, each of a length drawn from `lengths` (tokens, exactly); the last eighth of each,
    at most 64 tokens, is what a model is judged by."""
    filler = corpus() if filler is None else filler
    rng = random.Random(f"running/{seed}")
    start = _leading(tokenizer)
    while True:
        length = rng.choice(lengths)
        text = _running(tokenizer, length - len(start), rng, filler)
        yield Example((*start, *text), length - max(1, min(64, length // 8)))


def _needles(keys: Sequence[Sequence[str]]) -> list[str]:
    return [f"\nThe {name} passkey is: {' '.join(key)}.\n" for name, key in zip(_ORDINALS, keys, strict=False)]


def _tail(keys: Sequence[Sequence[str]]) -> str:
    asked = [
        f"What is the {name} passkey?\nIt is: {' '.join(key)}.\n" for name, key in zip(_ORDINALS, keys, strict=False)
    ]
    return "\n\nNow the passkeys that are hidden in the text above.\n" + "".join(asked)


def _size(tokenizer: Any, length: int) -> tuple[int, int]:
    """How many passkeys of how many words a text of this length carries."""
    for count, words in _SIZES:
        if _need(tokenizer, count, words) <= length:
            return count, words
    raise BadArgument("lengths", length, f"texts with a passkey need at least {shortest(tokenizer)} tokens")


def _need(tokenizer: Any, count: int, words: int) -> int:
    """Length of a text with so many passkeys and enough filler, whatever words are drawn."""
    longest = max(ALPHABET, key=lambda word: len(_encode(tokenizer, f" {word}")))
    keys = [[longest] * words] * count
    used = len(_encode(tokenizer, _tail(keys))) + sum(len(_encode(tokenizer, text)) for text in _needles(keys))
    return math.ceil((used + len(_leading(tokenizer))) / (1 - _FILLER))


def _running(tokenizer: Any, tokens: int, rng: random.Random, filler: Corpus) -> list[int]:
    """`tokens` tokens of running text from a random sentence on."""
    first = rng.randrange(len(filler.sentences))
    out: list[int] = []
    while len(out) < tokens:
        piece = [filler.sentences[(first + i) % len(filler.sentences)] for i in range(32)]
        out += _encode(tokenizer, " " + " ".join(piece))
        first += 32
    return out[:tokens]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _leading(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (BOS)."""
    plain, whole = (list(tokenizer("a", add_special_tokens=flag)["input_ids"]) for flag in (False, True))
    return whole[: whole.index(plain[0])] if plain[0] in whole else []
