"""Lamps and cups: states that every sentence changes."""

from __future__ import annotations

import random
import re

import pytest
from tests.tasks.solving import SAMPLES, check_blind, check_oracle, parts, pieces

from foveate.tasks import TASKS, Sample

NAMES = ["state_parity", "state_s3", "state_s5", "state_a5"]


def solve(context: str, question: str) -> str:
    """Goes through the sentences one by one."""
    if "lamp" in question:
        start = re.search(r"At first, the lamp is (on|off)\.", context)
        presses = len(re.findall(r"Someone presses the switch of the lamp\.", context))
        return ("on", "off")[(presses + (start is not None and start[1] == "off")) % 2]
    told = re.search(r"At first, (the .*? in cup 1.*?)\.", context)
    assert told is not None
    held = {int(cup): thing for thing, cup in re.findall(r"the (\w+) is in cup (\d)", told[1])}
    for found in re.finditer(r"The contents (?:of cup (\d) and cup (\d) are|go around: (.*?)\.)", context):
        if found[1]:
            ways = [(int(found[1]), int(found[2])), (int(found[2]), int(found[1]))]
        else:
            ways = [(int(a), int(b)) for a, b in re.findall(r"from cup (\d) to cup (\d)", found[3])]
        held |= {b: held[a] for a, b in ways}
    asked = re.search(r"in cup (\d) after", question)
    assert asked is not None
    return held[int(asked[1])]


@pytest.fixture(scope="module", params=NAMES)
def made(request, bpe) -> tuple[str, list[Sample]]:
    seed = random.SystemRandom().randrange(1 << 40)
    return request.param, TASKS[request.param].generate(bpe, 900, SAMPLES, seed)


def test_going_through_every_sentence_gets_everything(made, bpe):
    name, samples = made
    check_oracle(TASKS[name], bpe, samples, solve)


def test_guessing_is_chance(made, bpe, seed):
    name, samples = made
    check_blind(TASKS[name], bpe, samples, lambda rng, question, sample: rng.choice(sample.choices), seed)
    assert TASKS[name].chance == 1 / len(samples[0].choices)
    answers = [sample.references[0] for sample in samples]
    assert set(answers) == set(samples[0].choices), "every answer comes up"


def test_all_sentences_of_the_story_are_evidence_in_order(made, bpe):
    for sample in made[1][:20]:
        found = pieces(bpe, sample)
        assert len(found) == 9 == len(sample.depths)
        assert found[0].startswith("At first, ")
        assert list(sample.depths) == sorted(sample.depths)
        assert solve(" ".join(found), parts(bpe, sample)[1]) == sample.references[0]


def test_one_sentence_less_is_noticed(bpe, seed):
    """A sentence left out changes what some cup holds, so none can be skipped."""
    changed = 0
    for sample in TASKS["state_s5"].generate(bpe, 900, SAMPLES, seed):
        found, question = pieces(bpe, sample), parts(bpe, sample)[1]
        changed += any(
            solve(" ".join(found[:i] + found[i + 1 :]), question) != sample.references[0] for i in range(1, 9)
        )
    assert changed > 0.8 * SAMPLES


def test_turns_are_even_permutations(bpe, seed):
    (sample,) = TASKS["state_a5"].generate(bpe, 900, 1, seed)
    for sentence in pieces(bpe, sample)[1:]:
        a, b, c = re.findall(r"from cup (\d)", sentence)
        assert len({a, b, c}) == 3
        assert re.findall(r"to cup (\d)", sentence) == [b, c, a]
