"""Pairs in text, and the grid of needle depths."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest
from tests.tasks.solving import SAMPLES, check_blind, check_nothing_without_evidence, check_oracle, parts, pieces

from foveate.tasks import TASKS, Corpus, Sample

MQAR, GRID = TASKS["mqar"], TASKS["niah_grid"]


def look_up(context: str, question: str) -> str:
    pairs = dict(re.findall(r"^(\S+): (\d{6})$", context, re.MULTILINE))
    asked = re.search(r"behind (.*), in this order", question)
    assert asked is not None
    return " ".join(pairs.get(key, "") for key in re.findall(r"[a-z-]+-[a-z]+", asked[1]))


def find_needle(context: str, question: str) -> str:
    key = re.search(r"number for (\S+) in", question)
    assert key is not None
    found = re.search(rf"One of the special magic numbers for {key[1]} is: (\d+)\.", context)
    return found[1] if found else ""


@pytest.fixture(scope="module")
def recalled(bpe) -> list[Sample]:
    return MQAR.generate(bpe, 640, SAMPLES, random.SystemRandom().randrange(1 << 40))


@pytest.fixture(scope="module")
def grid(bpe) -> list[Sample]:
    return GRID.generate(bpe, 900, 66, random.SystemRandom().randrange(1 << 40))


def test_looking_up_gets_everything(recalled, bpe):
    check_oracle(MQAR, bpe, recalled, look_up)


def test_guessing_gets_nothing(recalled, bpe, seed):
    check_blind(MQAR, bpe, recalled, lambda rng, *_: " ".join(f"{rng.randrange(10**6):06}" for _ in range(6)), seed)
    check_nothing_without_evidence(bpe, recalled, look_up, MQAR)


def test_nothing_but_pairs_fills_the_prompt(recalled, bpe):
    for sample in recalled[:20]:
        context, question = parts(bpe, sample)
        lines = context.strip().split("\n\n")[1].split("\n")
        pairs = [line.split(": ") for line in lines if re.fullmatch(r"\S+: \d{6}", line)]
        assert len(lines) - len(pairs) <= 1, "the last line brings the length"
        assert len(pairs) > 15
        assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == len(pairs)
        assert len(sample.references) == 4
        assert pieces(bpe, sample) == [
            f"{key}: {value}"
            for key, value in zip(
                re.findall(r"[a-z-]+-[a-z]+", question.split(", in this")[0]), sample.references, strict=True
            )
        ]


def test_a_needle_at_every_depth_gets_found(grid, bpe):
    check_oracle(GRID, bpe, grid, find_needle)


def test_a_needle_is_not_guessed(grid, bpe, seed):
    check_blind(GRID, bpe, grid, lambda rng, *_: str(rng.randrange(10**6, 10**7)), seed)
    check_nothing_without_evidence(bpe, grid, find_needle, GRID)


def test_the_needle_stands_at_its_depth_to_within_a_sentence(bpe, grid, seed):
    (longer,) = (GRID.generate(bpe, 6000, 3, seed)[2:],)
    for sample in [*grid, *longer]:
        found = re.fullmatch(r"depth (\d+)%", sample.bucket)
        assert found is not None
        context = parts(bpe, sample)[0]
        text = context.split("\n\n", 1)[1]
        (needle,) = pieces(bpe, sample)
        assert context.count(needle) == 1
        before, after = text.split(needle)
        sentence = max(len(bpe(each)["input_ids"]) for each in Corpus("", f"{before} {after}").sentences)
        (start, stop), tokens = sample.evidence[0], len(bpe(text.strip())["input_ids"])
        first = len(sample.context_ids) - len(bpe(text)["input_ids"])
        error = abs((start - first) - int(found[1]) / 100 * (tokens - (stop - start)))
        assert error <= sentence, (sample.bucket, error, sentence, tokens)
        assert abs(sample.depths[0] - int(found[1]) / 100) <= sentence / (tokens - (stop - start))


def test_depths_come_in_turn_and_any_number_of_samples_covers_the_text(grid):
    depths = [int(sample.bucket[6:-1]) for sample in grid]
    assert depths[:11] == depths[11:22] == depths[55:66]
    assert sorted(depths[:11]) == list(range(0, 101, 10))
    for number in range(2, 12):
        covered = sorted(depths[:number])
        assert covered[0] == 0 and covered[-1] == 100
        # At most twice the even gap, in whole steps of the grid.
        assert max(b - a for a, b in itertools.pairwise(covered)) <= 10 * math.ceil(20 / (number - 1))
    assert grid[0].depths[0] == 0.0
    assert grid[1].depths[0] == 1.0
