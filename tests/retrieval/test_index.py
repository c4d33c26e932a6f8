"""Ranking: BM25 against its formula, trees against the flat search, questions and their parts."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from tests.evaluate.small import byte_tokenizer

from foveate.retrieval.bm25 import BM25, words
from foveate.retrieval.index import in_turn, parts, search
from foveate.retrieval.passages import cut, sentence_ends

VOCABULARY = [f"w{i}" for i in range(30)]


def texts_of(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=rng.randint(1, 25))) for _ in range(number)]


def slow_bm25(texts: list[str], query: str, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """The formula, word by word and passage by passage."""
    split = [words(text) for text in texts]
    mean = sum(map(len, split)) / len(split)
    found = []
    for passage in split:
        total = 0.0
        for word in words(query):
            holders = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - holders + 0.5) / (holders + 0.5))
            count = passage.count(word)
            total += idf * count * (k1 + 1) / (count + k1 * (1 - b + b * len(passage) / mean))
        found.append(total)
    return found


def test_bm25_is_its_formula(seed: int) -> None:
    texts = texts_of(seed, 23)
    for query in ["w1", "w3 w3 w7", "nothing of this", "W1, w2; w29?", ""]:
        np.testing.assert_allclose(BM25.of(texts).scores(query), slow_bm25(texts, query), atol=1e-12)


def test_a_section_is_scored_as_the_text_of_its_passages(seed: int) -> None:
    texts = texts_of(seed, 9)
    groups = [range(4), range(4, 8), range(8, 9)]
    joined = [" ".join(texts[i] for i in group) for group in groups]
    np.testing.assert_allclose(BM25.of(texts).grouped(groups).scores("w1 w2"), slow_bm25(joined, "w1 w2"), atol=1e-12)


def test_equal_scores_keep_the_order_of_the_text() -> None:
    assert search(BM25.of(["a", "b", "a", "c"]), 4, "a") == [0, 2, 1, 3]
    assert search(BM25.of(["a", "b", "c"]), 3, "x") == [0, 1, 2]


@pytest.mark.parametrize("fanout", [2, 3, 7])
def test_a_beam_of_all_sections_is_the_flat_search(seed: int, fanout: int) -> None:
    index = BM25.of(texts_of(seed, 29))
    assert search(index, 29, "w4 w5", fanout=fanout, beam=29) == search(index, 29, "w4 w5")


def test_a_narrow_beam_opens_the_best_sections_only(seed: int) -> None:
    texts = texts_of(seed, 27)
    found = search(BM25.of(texts), 27, "w4 w5", fanout=3, beam=1)

    def best(level: list[str], among: list[int]) -> int:
        scores = slow_bm25(level, "w4 w5")
        return max(among, key=lambda i: (scores[i], -i))

    nines = [" ".join(texts[i : i + 9]) for i in range(0, 27, 9)]
    threes = [" ".join(texts[i : i + 3]) for i in range(0, 27, 3)]
    nine = best(nines, [0, 1, 2])
    three = best(threes, [3 * nine, 3 * nine + 1, 3 * nine + 2])
    assert sorted(found) == [3 * three, 3 * three + 1, 3 * three + 2]
    scores = slow_bm25(texts, "w4 w5")
    assert found == sorted(sorted(found), key=lambda i: -scores[i])


def test_a_clean_question_is_not_changed() -> None:
    assert parts("What is the number for amber?") == ["What is the number for amber?"]
    assert parts(" and? ") == [" and? "]


def test_a_question_of_several_parts_is_their_union_without_doubles() -> None:
    assert parts("Who is Ann, where is Bob; and what is 3.14?") == ["Who is Ann", "where is Bob", "what is 3.14"]
    assert in_turn([[3, 1, 2], [1, 0], []]) == [3, 1, 0, 2]
    orders = [[2, 0, 1], [0, 2, 1]]
    assert sorted(in_turn(orders)) == [0, 1, 2]


def test_passages_cover_the_text_and_end_with_sentences(seed: int) -> None:
    tokenizer = byte_tokenizer()
    rng = random.Random(seed)
    text = "".join(
        rng.choice(["Pi is 3.14 or so. ", "One more!\n", "“Really?” ", "a word ", "z" * 50]) for _ in range(60)
    )
    ids = tokenizer(text)["input_ids"]
    for size in (7, 32, 200, 10_000):
        spans = cut(tokenizer, ids, size)
        assert [a for a, _ in spans] == [0, *[b for _, b in spans[:-1]]]
        assert spans[-1][1] == len(ids)
        assert all(0 < b - a <= size for a, b in spans)
        ends = sentence_ends(tokenizer, ids)
        for a, b in spans[:-1]:
            assert ends[b - 1] or not any(ends[a : min(a + size, len(ids))])


def test_a_sentence_ends_before_a_blank_only() -> None:
    tokenizer = byte_tokenizer()

    def marked(text: str) -> str:
        ends = sentence_ends(tokenizer, tokenizer(text)["input_ids"])
        return "".join("_^|"[end] for end in ends)

    assert marked("3.14 is pi. So?") == "__________^___^"
    assert marked('He said "no." Then\nleft') == "____________^_____|____"
    assert marked("a.b.c") == "_____"
