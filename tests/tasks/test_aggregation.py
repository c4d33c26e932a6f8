"""RULER's aggregation tasks: frequencies, examples, and where the counted words stand."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest
from tests.tasks.solving import SAMPLES, check_blind, check_nothing_without_evidence, check_oracle, parts, pieces

from foveate.tasks import TASKS, Sample
from foveate.tasks.aggregation import _zeta
from foveate.tasks.words import plain_words

CWE, FWE = TASKS["cwe"], TASKS["fwe"]


def listed(context: str) -> list[str]:
    """The words of the list that is asked about."""
    return re.findall(r"\d+\. (\S+)", context.rsplit("Below is", 1)[1])


def coded(context: str) -> list[str]:
    """The words of the coded text."""
    return context.split("\n\n")[1].split("\n")[0].split()


def common_words(context: str, question: str) -> str:
    assert "10 words that occur most often" in question
    return ", ".join(word for word, _ in Counter(listed(context)).most_common(10))


def frequent_words(context: str, question: str) -> str:
    counts = Counter(word for word in coded(context) if word != "...")
    return " ".join(word for word, _ in counts.most_common(3))


ORACLES = {"cwe": common_words, "fwe": frequent_words}


@pytest.fixture(scope="module", params=["cwe", "fwe"])
def made(request, bpe) -> tuple[str, list[Sample]]:
    seed = random.SystemRandom().randrange(1 << 40)
    task = TASKS[request.param]
    return request.param, task.generate(bpe, task.minimum(bpe) + 200, SAMPLES, seed)


def test_counting_gets_everything(made, bpe):
    name, samples = made
    check_oracle(TASKS[name], bpe, samples, ORACLES[name])


def test_guessing_gets_nothing(made, bpe, seed):
    name, samples = made
    invented = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(500)]
    known = plain_words() if name == "cwe" else invented
    # Ten of 2,754 words meet one of ten now and then: the mean of 60 samples may exceed a hundredth by chance, that of
    # 1,200 may not.
    many = samples * 20 if name == "cwe" else samples
    check_blind(TASKS[name], bpe, many, lambda rng, question, sample: " ".join(rng.sample(known, 10)), seed)
    check_nothing_without_evidence(bpe, samples, ORACLES[name], TASKS[name])


def test_evidence_is_every_occurrence_of_the_counted_words(made, bpe):
    name, samples = made
    for sample in samples[:20]:
        found = Counter(pieces(bpe, sample))
        context = parts(bpe, sample)[0]
        words = listed(context) if name == "cwe" else coded(context)
        assert found == {word: words.count(word) for word in sample.references}
        assert sample.depths == ()


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(2048, 6, 1, (3, 1)), (4608, 30, 3, (10, 3))])
def test_common_words_repeat_as_rulers_do(smollm2, seed, length, often, seldom, shown):
    (sample,) = CWE.generate(smollm2, length, 1, seed)
    context = parts(smollm2, sample)[0]
    words = listed(context)
    counts = Counter(words)
    assert [count for _, count in counts.most_common(10)] == [often] * 10
    assert set(counts.values()) == {often, seldom}
    assert len(words) == 10 * often + seldom * (len(counts) - 10)
    assert [int(n) for n in re.findall(r"(\d+)\. \S+", context.rsplit("Below is", 1)[1])] == list(
        range(1, len(words) + 1)
    )
    example, answer = context.rsplit("Below is", 1)[0].split("Answer:")
    counted = Counter(re.findall(r"\d+\. (\S+)", example))
    assert sorted(set(counted.values())) == sorted(set(shown))
    assert len(counted) == (20 if length < 4096 else 40)
    assert all(word in answer for word, _ in counted.most_common(10))
    assert not set(counted) & set(counts)
    room = length - len(sample.context_ids) - len(sample.question_ids)
    assert room == sample.max_new_tokens >= 120


def test_common_words_hide_in_no_other_word(bpe, seed):
    for sample in CWE.generate(bpe, 1500, 10, seed):
        said = parts(bpe, sample)[0].removeprefix("<|start|>user\n")  # "start" is a word that may be asked for
        for word in sample.references:
            assert said.count(word) == 6


def test_frequencies_follow_zetas_law(smollm2, seed):
    (sample,) = FWE.generate(smollm2, 4096, 1, seed)
    counts = Counter(coded(parts(smollm2, sample)[0]))
    ranked = counts.most_common()
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == list(sample.references)
    zeta = math.pi**2 / 6
    found = [count for _, count in ranked]

    def expected(words: int) -> list[int]:
        counts = [int(words / rank**2 / zeta) for rank in range(1, 4096 // 50 + 1)]
        return [count for count in counts if count]

    assert any(expected(words) == found for words in range(1, 4096))
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    assert sample.max_new_tokens >= 50


def test_the_third_word_is_never_tied_with_the_fourth():
    zeta = math.pi**2 / 6
    assert all(int(n / 16 / zeta) > int(n / 25 / zeta) for n in range(53, 20_000))
    assert _zeta(2.0) == pytest.approx(zeta, abs=1e-12)
    assert _zeta(3.0) == pytest.approx(1.2020569031595942, abs=1e-12)


def test_lists_fill_the_length_but_for_a_line(bpe, seed):
    for task, count in ((CWE, listed), (FWE, coded)):
        (sample,) = task.generate(bpe, 3000, 1, seed)
        context = parts(bpe, sample)[0]
        tail = context.rstrip().rsplit("\n", 1)[1]
        assert len(bpe(tail)["input_ids"]) < 80, task.name
        assert count(context)
