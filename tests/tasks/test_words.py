"""Words for keys: enough of them, and no key that hides in another."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from foveate.errors import BadArgument
from foveate.tasks import TASKS, words


def test_the_lists_are_long_and_plain():
    for listed in (words.adjectives(), words.nouns()):
        assert len(listed) >= 80
        assert len(set(listed)) == len(listed)
        assert all(re.fullmatch("[a-z]{4,11}", word) for word in listed)
    assert {"value", "sequence", "directory"} <= set(words.nouns())
    assert {"optional", "internal", "original"} <= set(words.adjectives())
    assert not {"special", "magic", "number"} & {*words.nouns(), *words.adjectives()}


def test_no_key_is_part_of_another(seed):
    keys = words.draw_keys(random.Random(seed), 600)
    assert len(set(keys)) == 600
    assert not [pair for pair in itertools.permutations(keys, 2) if pair[0] in pair[1]]


def test_many_keys_have_a_word_more(seed):
    half = len(words.adjectives()) * len(words.nouns()) // 2
    few = words.draw_keys(random.Random(seed), 5, among=half)
    many = words.draw_keys(random.Random(seed), 5, among=half + 1)
    assert all(key.count("-") == 1 for key in few)
    assert all(key.count("-") == 2 for key in many)
    assert len(set(words.draw_keys(random.Random(seed), half + 1))) == half + 1


def test_keys_of_one_prompt_have_equally_many_words(monkeypatch, bpe, seed):
    first, last = words.adjectives()[:20], words.nouns()[:20]
    monkeypatch.setattr(words, "adjectives", lambda: first)
    monkeypatch.setattr(words, "nouns", lambda: last)
    for length, dashes in ((512, 1), (4096, 2)):
        (sample,) = TASKS["niah_multikey_2"].generate(bpe, length, 1, seed)
        keys = re.findall(r"numbers? for (\S+) (?:is|in)\b", bpe.decode(sample.context_ids + sample.question_ids))
        assert {key.count("-") for key in keys} == {dashes}


def test_more_keys_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(words, "adjectives", lambda: ("mute", "loud"))
    monkeypatch.setattr(words, "nouns", lambda: ("bell", "drum"))
    with pytest.raises(BadArgument, match="keys=5: at most 4 different keys"):
        words.draw_keys(random.Random(0), 5)
