"""Tasks that ask one context several times: the evidence of each turn, its tokens, what a chat template makes of it."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re

import pytest
from tests.tasks.solving import SAMPLES, check_blind, check_nothing_without_evidence, parts, pieces, text
from tests.tasks.test_generation import solve

from foveate.errors import BadArgument
from foveate.tasks import GROUPS, TASKS, Sample
from foveate.tasks.turns import NeedleTurns, PairTurns

TURN_TASKS = [TASKS[name] for name in GROUPS["turns"]]
LENGTH = 800


def read_off(context: str, question: str) -> str:
    key = re.search(r"behind (\S+) in the list above\?", question)
    if key is None:
        return solve(context, question)
    return dict(re.findall(r"^(\S+): (\d{6})$", context, re.MULTILINE)).get(key[1], "")


@pytest.fixture(params=TURN_TASKS, ids=lambda task: task.name)
def task(request):
    return request.param


@pytest.fixture
def many(task, bpe, made_turns) -> list[Sample]:
    return made_turns(task.name)


@pytest.fixture(scope="module")
def made_turns(bpe):
    drawn = random.SystemRandom().randrange(1 << 40)
    return functools.cache(lambda name: TASKS[name].generate(bpe, LENGTH, SAMPLES, drawn))


def asked(samples: list[Sample]) -> list[Sample]:
    """Each turn as a sample of its own."""
    return [sample.at(turn) for sample in samples for turn in range(len(sample.turns))]


def test_a_reader_gets_every_turn_and_a_guess_none(task, many, bpe, seed):
    turns = asked(many)
    assert len(turns) == 4 * SAMPLES
    for one in turns:
        context, question = parts(bpe, one)
        assert task.score(read_off(context, question), one) == 1.0
        assert task.done(read_off(context, question), one)
        (reference,) = one.references
        assert context.count(reference) == 1
        assert [reference in piece for piece in pieces(bpe, one)] == [True]
    check_blind(task, bpe, turns, lambda rng, *_: str(rng.randrange(10**5, 10**7)), seed)
    check_nothing_without_evidence(bpe, turns, read_off, task)


def test_the_sample_is_its_first_question_with_room_for_the_others(task, many, bpe):
    for sample in many:
        assert sample.question_ids == sample.turns[0].question_ids
        assert sample.turns[0].later_ids == ()
        assert sample.references == tuple(r for turn in sample.turns for r in turn.references)
        assert sample.evidence == tuple(e for turn in sample.turns for e in turn.evidence)
        assert sample.depths == tuple(d for turn in sample.turns for d in turn.depths)
        assert sample.conversation == task.name.startswith("turns_")
        assert sample.at(2).turns == () and sample.at(2).context_ids == sample.context_ids
        answers = [read_off(*parts(bpe, sample.at(turn))) for turn in range(4)]
        assert task.score(" ".join(answers), sample) == 1.0
        assert task.score(answers[1], sample) == 0.25


def test_lengths_are_exact_from_the_least_on(task, tokenizer, seed):
    least = task.minimum(tokenizer)
    for length in (least, least + 1, least + random.Random(seed).randrange(2, 900)):
        (sample,) = task.generate(tokenizer, length, 1, seed)
        assert len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens == length
        for turn in sample.turns:
            answer = tokenizer(" " + ", ".join(turn.references), add_special_tokens=False)["input_ids"]
            assert len(answer) < turn.max_new_tokens
        if sample.conversation:
            spent = sum(len(turn.question_ids) + turn.max_new_tokens for turn in sample.turns)
            assert len(sample.context_ids) + spent == length
        else:
            for turn in sample.turns[1:]:
                spent = len(sample.question_ids) + len(turn.later_ids) + turn.max_new_tokens
                assert len(sample.context_ids) + spent <= length
    with pytest.raises(BadArgument, match=rf"{task.name} needs at least {least} tokens"):
        task.generate(tokenizer, least - 1, 1, seed)


@pytest.mark.parametrize("name", ["ask_many_needles", "ask_many_pairs"])
def test_each_question_is_tokenised_as_the_only_one_would_be(name, tokenizer, seed):
    (sample,) = TASKS[name].generate(tokenizer, TASKS[name].minimum(tokenizer) + 50, 1, seed)
    for turn in range(4):
        one = sample.at(turn)
        ids = one.context_ids + one.question_ids
        whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        bos = tokenizer.bos_token if not tokenizer.chat_template else None
        again = tokenizer(whole.removeprefix(bos or "").lstrip(" "), add_special_tokens=False)["input_ids"]
        assert [*([tokenizer.bos_token_id] if bos else []), *again] == [*ids]


def chat(tokenizer, sample: Sample, answers: list[str]) -> list[int]:
    """The conversation up to the next answer's first words, as the template renders it and the tokenizer reads it."""
    first, *later = (text(tokenizer, turn.question_ids) for turn in sample.turns)
    context = text(tokenizer, sample.context_ids)
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
    )
    head, tail = frame.split("\0")
    messages = [{"role": "user", "content": (context + first.split(tail)[0]).removeprefix(head)}]
    prefix = first.split(tail)[1]
    questions = [re.search(r"((?:What is|Question:)[^?]*\?)", each) for each in later]
    prefixes = [each.split(tail)[1] for each in later]
    for answer, question, following in zip(answers, questions, prefixes, strict=False):
        assert question is not None
        messages += [{"role": "assistant", "content": prefix + answer}, {"role": "user", "content": question[1]}]
        prefix = following
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered + prefix, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["bpe", "smollm2"])
@pytest.mark.parametrize("name", ["turns_needles", "turns_pairs"])
def test_a_conversation_is_what_the_chat_template_renders(name, kind, request, seed):
    """Whatever the model answered: right, wrong or nothing."""
    tokenizer = request.getfixturevalue(kind)
    (sample,) = TASKS[name].generate(tokenizer, TASKS[name].minimum(tokenizer) + 50, 1, seed)
    answers = [" " + sample.turns[0].references[0], " not there. I looked!", ""]
    read = [*sample.context_ids, *sample.turns[0].question_ids]
    for turn, answer in enumerate(answers, start=1):
        read += [*tokenizer(answer, add_special_tokens=False)["input_ids"], *sample.turns[turn].question_ids]
        assert read == chat(tokenizer, sample, answers[:turn])


@pytest.mark.parametrize("kind", ["bpe", "smollm2"])
def test_a_later_question_follows_the_first_one_and_its_right_answer(kind, request, seed):
    tokenizer = request.getfixturevalue(kind)
    (sample,) = TASKS["ask_many_needles"].generate(tokenizer, 1000, 1, seed)
    for turn in sample.turns[1:]:
        two = Sample(**{**vars(sample), "turns": (sample.turns[0], turn)})
        read = [*sample.context_ids, *sample.question_ids, *turn.later_ids]
        assert read == chat(tokenizer, two, [" " + sample.turns[0].references[0]])


def test_tokenizers_without_a_template_end_a_paragraph_between_turns(characters, sentence_pieces, seed):
    for tokenizer in (characters, sentence_pieces):
        (sample,) = TASKS["turns_needles"].generate(tokenizer, TASKS["turns_needles"].minimum(tokenizer), 1, seed)
        for turn in sample.turns[1:]:
            assert text(tokenizer, turn.question_ids).startswith("\n\nWhat is the special magic number for ")
            assert tokenizer.bos_token_id not in turn.question_ids


def test_a_template_that_shows_no_answers_is_refused(bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = "<|start|>{{ messages[0]['content'] }}<|end|>"
    with pytest.raises(BadArgument, match="must show question, answer and next question"):
        TASKS["turns_needles"].minimum(tokenizer)


def test_a_turns_number_says_nothing_about_its_depth(many):
    depths = [[turn.depths[0] for turn in sample.turns] for sample in many]
    for turn in range(4):
        mine = sorted(each[turn] for each in depths)
        assert mine[0] < 0.15 and mine[-1] > 0.85
        assert 0.3 < mine[len(mine) // 2] < 0.7
    for early in range(4):
        for late in range(early + 1, 4):
            share = sum(each[early] < each[late] for each in depths) / len(depths)
            assert 0.5 - 4 / 2 / SAMPLES**0.5 < share < 0.5 + 4 / 2 / SAMPLES**0.5
    # each needle has a quarter of the text to itself, wherever the quarters begin
    gaps = [(b - a) % 1 for each in depths for a, b in itertools.pairwise(sorted(each))]
    assert min(gaps) > 0.05


@pytest.mark.parametrize("recipe", [lambda: NeedleTurns(turns=1), lambda: PairTurns(queries=41)])
def test_numbers_of_turns_that_cannot_be_had_are_refused(recipe):
    with pytest.raises(BadArgument, match="give 2 to 40 questions"):
        recipe()
