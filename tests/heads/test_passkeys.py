"""Texts with passkeys: exact lengths, labels over the whole tail, everything that is asked for is in the text."""

from __future__ import annotations

from itertools import islice

import pytest
from tests.heads.words import WordTokenizer

from foveate.errors import BadArgument
from foveate.heads.passkeys import ALPHABET, Example, evenly, passkey_examples, shortest
from foveate.tasks.corpora import Corpus

FILLER = Corpus("numbers", " ".join(f"Sentence {i} says nothing of interest. " for i in range(400)))
TOKENIZER = WordTokenizer(vocab=1 << 30)  # no two words share an id


def some(lengths: tuple[int, ...], count: int, seed: int = 0, bos: bool = False) -> list[Example]:
    tokenizer = WordTokenizer(vocab=1 << 30, bos=bos)
    return list(islice(passkey_examples(tokenizer, lengths, seed, FILLER), count))


def encoded(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def runs(ids: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Where passkeys stand, and their words: maximal runs of words of the alphabet behind "is:" or "It is:"."""
    words, colon = {encoded(word)[0] for word in ALPHABET}, encoded(":")[0]
    found = []
    for i, token in enumerate(ids):
        if token == colon and i + 1 < len(ids) and ids[i + 1] in words:
            stop = next(j for j in range(i + 1, len(ids) + 1) if j == len(ids) or ids[j] not in words)
            found.append((i + 1, ids[i + 1 : stop]))
    return found


def test_the_alphabet_has_26_words() -> None:
    assert len(set(ALPHABET)) == 26


@pytest.mark.parametrize("bos", [False, True])
def test_lengths_are_exact(bos: bool, seed: int) -> None:
    for length in (shortest(WordTokenizer(bos=bos)), 201, 512, 1999):
        for example in some((length,), 3, seed, bos):
            assert len(example.ids) == length
            assert (example.ids[0] == 1) == bos


def test_the_papers_size_where_there_is_room(seed: int) -> None:
    """Ten passkeys of 32 words, asked for in order, each answer a copy of what the text holds."""
    for example in some((2000,), 5, seed):
        placed = [key for at, key in runs(example.ids) if at < example.labels]
        asked = [key for at, key in runs(example.ids) if at >= example.labels]
        assert len(placed) == len(asked) == 10
        assert all(len(key) == 32 for key in asked)
        assert sorted(placed) == sorted(asked)
        ordinals = [encoded(word)[0] for word in ("first", "second", "third", "tenth")]
        at = [example.ids.index(word, example.labels) for word in ordinals]
        assert at == sorted(at)


def test_every_size_asks_for_what_it_holds(seed: int) -> None:
    for length in (shortest(TOKENIZER), 150, 300, 500, 700, 1100):
        for example in some((length,), 3, seed):
            placed = sorted(key for at, key in runs(example.ids) if at < example.labels)
            asked = sorted(key for at, key in runs(example.ids) if at >= example.labels)
            assert placed == asked
            assert placed
            filler = length - sum(map(len, placed)) - (length - example.labels)
            assert filler >= 0.3 * length


def test_labels_are_the_questions_and_answers(seed: int) -> None:
    (example,) = some((800,), 1, seed)
    tail = example.ids[example.labels :]
    assert tail[:4] == tuple(encoded("\n\nNow the"))
    assert encoded("What")[0] in tail
    assert encoded("What")[0] not in example.ids[: example.labels]


def test_depths_lie_between_5_and_95_percent(seed: int) -> None:
    spots = []
    for example in some((3000,), 30, seed):
        body = [at for at, _ in runs(example.ids) if at < example.labels]
        used = 10 * (32 + len(encoded("\nThe first passkey is:.\n")))
        room = example.labels - used
        for number, at in enumerate(sorted(body)):
            spots.append((at - number * used / 10) / room)
    assert min(spots) > 0.045
    assert max(spots) < 0.965
    assert min(spots) < 0.1
    assert max(spots) > 0.9


def test_equal_seeds_equal_texts() -> None:
    lengths = evenly(300, 900)
    assert some(lengths, 5, seed=1) == some(lengths, 5, seed=1)
    assert some(lengths, 5, seed=1) != some(lengths, 5, seed=2)


def test_lengths_are_drawn_from_all(seed: int) -> None:
    lengths = evenly(200, 1000, 5)
    assert lengths == (200, 400, 600, 800, 1000)
    assert {len(example.ids) for example in some(lengths, 60, seed)} == set(lengths)
    assert len(evenly(1000, 32000)) == 50
    assert evenly(7, 7) == (7,)


def test_too_short_a_length_is_refused() -> None:
    least = shortest(TOKENIZER)
    with pytest.raises(BadArgument, match=f"lengths={least - 1}.*at least {least} tokens"):
        next(passkey_examples(TOKENIZER, (400, least - 1), 0, FILLER))
