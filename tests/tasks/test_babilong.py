"""BABILong: stories told again from their facts, labels, and what counts as an answer."""

from __future__ import annotations

import random
import re

import pytest
from tests.tasks.solving import SAMPLES, check_blind, check_nothing_without_evidence, check_oracle, parts, pieces

from foveate.tasks import TASKS, Sample
from foveate.tasks.world import DIRECTIONS, PLACES, three_arguments, three_facts, two_places

NAMES = [f"babilong_qa{number}" for number in range(1, 6)]
PLACE = rf"the ({'|'.join(PLACES)})"
THING = "the (apple|football|milk)"
WHO = "(Mary|John|Daniel|Sandra|Bill|Fred|Jeff)"
FACT = re.compile(
    rf"{WHO} (?:moved to|went to|travelled to|journeyed to|went back to) {PLACE}\."
    rf"|{WHO} (?:got|took|picked up|grabbed) {THING}(?: there)?\."
    rf"|{WHO} (?:dropped|left|put down|discarded) {THING}(?: there)?\."
    rf"|{WHO} (?:gave|handed|passed) {THING} to {WHO}\."
    rf"|The ({'|'.join(PLACES)}) is (north|south|east|west) of {PLACE}\."
)


def solve(context: str, question: str) -> str:
    """Plays the facts of a story again and answers from what it then knows."""
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    gifts: list[tuple[str, str, str]] = []
    lies: dict[tuple[str, str], str] = {}
    for found in FACT.finditer(context):
        mover, to, taker, taken, dropper, dropped, giver, given, receiver, one, direction, other = found.groups()
        if mover:
            place[mover] = to
            for thing in [thing for thing, who in holder.items() if who == mover]:
                trail[thing].append(to)
        elif taker:
            holder[taken] = taker
            if taken not in trail and taker in place:
                trail[taken] = [place[taker]]
            trail.setdefault(taken, [])
        elif dropper:
            holder.pop(dropped, None)
        elif giver:
            gifts.append((giver, given, receiver))
        else:
            lies[one, direction] = other
    asked = question.split("Question: ")[1].split("?")[0]
    if found := re.fullmatch(rf"Where is {WHO}", asked):
        return place.get(found[1], "nowhere")
    if found := re.fullmatch(rf"Where is {THING}", asked):
        return (trail.get(found[1]) or ["nowhere"])[-1]
    if found := re.fullmatch(rf"Where was {THING} before {PLACE}", asked):
        places = trail.get(found[1], [])
        last = max((i for i, each in enumerate(places) if each == found[2]), default=0)
        return places[last - 1] if last else "nowhere"
    if found := re.fullmatch(rf"What is (\w+) of {PLACE}", asked):
        return next((one for (one, way), other in lies.items() if (way, other) == (found[1], found[2])), "nothing")
    if found := re.fullmatch(rf"What is {PLACE} (\w+) of", asked):
        return lies.get((found[1], found[2]), "nothing")
    if found := re.fullmatch(rf"Who gave {THING} to {WHO} last", asked):
        return ([a for a, thing, c in gifts if (thing, c) == (found[1], found[2])] or ["nobody"])[-1]
    if found := re.fullmatch(rf"Who did {WHO} give {THING} to last", asked):
        return ([c for a, thing, c in gifts if (a, thing) == (found[1], found[2])] or ["nobody"])[-1]
    found = re.fullmatch(rf"What did {WHO} give to {WHO} last", asked)
    assert found is not None, asked
    return ([thing for a, thing, c in gifts if (a, c) == (found[1], found[2])] or ["nothing"])[-1]


def guess(rng: random.Random, question: str, sample: Sample) -> str:
    """A label of the kind that is asked for."""
    kind = r"[A-Z]" if "Who" in question else r"[a-z]"
    things = ["apple", "football", "milk"] if "What did" in question else sample.choices
    return rng.choice([each for each in things if re.match(kind, each)])


@pytest.fixture(scope="module", params=NAMES)
def made(request, bpe) -> tuple[str, list[Sample]]:
    seed = random.SystemRandom().randrange(1 << 40)
    task = TASKS[request.param]
    return request.param, task.generate(bpe, task.minimum(bpe) + 128, SAMPLES, seed)


def test_playing_the_facts_again_gets_everything(made, bpe):
    name, samples = made
    check_oracle(TASKS[name], bpe, samples, solve)


def test_guessing_is_chance(made, bpe, seed):
    name, samples = made
    check_blind(TASKS[name], bpe, samples, guess, seed)
    check_nothing_without_evidence(bpe, samples, solve, TASKS[name])


def test_evidence_is_the_facts_that_the_answer_follows_from(made, bpe):
    name, samples = made
    for sample in samples:
        found = pieces(bpe, sample)
        context, question = parts(bpe, sample)
        assert all(FACT.fullmatch(fact) for fact in found)
        assert [context.rindex(fact) for fact in found if context.count(fact) == 1] == sorted(
            context.rindex(fact) for fact in found if context.count(fact) == 1
        ), "in the order of the text"
        assert len(found) == {"1": 1, "4": 1, "5": 1}.get(name[-1], len(found))
        if name[-1] != "3":
            assert solve(" ".join(found), question) == sample.references[0], "they are enough"


def test_labels_stand_in_the_facts_alone(made, bpe):
    for sample in made[1][:20]:
        context = parts(bpe, sample)[0]
        story = " ".join(found[0] for found in FACT.finditer(context))
        for label in (*PLACES, "Mary", "apple", "milk"):
            assert len(re.findall(rf"\b{label}\b", context)) == len(re.findall(rf"\b{label}\b", story))


def test_one_label_and_no_other_counts(bpe, seed):
    task = TASKS["babilong_qa3"]
    (sample,) = task.generate(bpe, 2048, 1, seed)
    right, wrong = sample.references[0], next(each for each in sample.choices if each != sample.references[0])
    (asked,) = set(PLACES) - set(sample.choices)
    for text, score in (
        (f" The {right.upper()}.", 1.0),
        (f"{right}", 1.0),
        (f"{right}, before the {asked}", 1.0),
        (f"{right}. It was in the {wrong} then.", 1.0),
        (f"{right} or {wrong}", 0.0),
        (f"the {wrong}.\nNo, the {right}", 0.0),
        (f"{right}s", 0.0),
        ("", 0.0),
    ):
        assert task.score(text, sample) == score, text
    assert not task.done(right, sample)
    assert task.done(f"{right}. It", sample)


def test_places_lie_in_one_direction_only(seed):
    rng = random.Random(seed)
    for _ in range(300):
        story = two_places(rng)
        found = [re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact) for fact in story.facts]
        relations = {(each[1], each[2], each[3]) for each in found if each}
        relations |= {(b, DIRECTIONS[way], a) for a, way, b in relations}
        way = re.search("north|south|east|west", story.question)
        place = re.search(rf"the ({'|'.join(PLACES)})", story.question)
        assert way and place
        if story.question.endswith("of?"):
            assert story.answer in {b for a, w, b in relations if (a, w) == (place[1], way[0])}
        else:
            assert [a for a, w, b in relations if (w, b) == (way[0], place[1])] == [story.answer]


def test_stories_vary(seed):
    rng = random.Random(seed)
    questions = [three_arguments(rng).question.split()[0:2] for _ in range(200)]
    assert {tuple(each) for each in questions} == {("Who", "gave"), ("Who", "did"), ("What", "did")}
    supports = [len(three_facts(rng).support) for _ in range(100)]
    assert min(supports) >= 2
    assert max(supports) >= 3
