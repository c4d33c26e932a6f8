"""What other tasks that generate promise, on tokenizers of all kinds; needles and turns have files of their own."""

from __future__ import annotations

import random
import re

import pytest
from tests.tasks.solving import parts, pieces

from foveate.errors import BadArgument
from foveate.tasks import GROUPS, TASKS
from foveate.tasks.generation import GenerationTask

TASKS_HERE = [
    task
    for task in TASKS.values()
    if isinstance(task, GenerationTask)
    and task.family not in ("needle", "tracing")
    and task.name not in GROUPS["turns"]
]
KINDS = ["bpe", "sentence_pieces", "characters", "smollm2"]
# Each task on two tokenizers, all tokenizers in turn.
PAIRS = [(task, KINDS[(number + turn) % 4]) for number, task in enumerate(TASKS_HERE) for turn in (0, 2)]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0].name}-{pair[1]}")
def pair(request):
    task, kind = request.param
    return task, request.getfixturevalue(kind)


def test_lengths_are_exact_from_the_least_on(pair, seed):
    task, tokenizer = pair
    least = task.minimum(tokenizer)
    rng = random.Random(seed)
    for length in (least, least + 1, least + rng.randrange(2, 900)):
        for sample in task.generate(tokenizer, length, 2, seed):
            assert len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens == length
            assert 0 < sample.intro < len(sample.context_ids)
            answer = tokenizer(" " + ", ".join(sample.references), add_special_tokens=False)["input_ids"]
            assert len(answer) < sample.max_new_tokens
    with pytest.raises(BadArgument, match=rf"{task.name} needs at least {least} tokens"):
        task.generate(tokenizer, least - 1, 1, seed)


def test_ids_are_the_tokenizers_and_evidence_reads_as_text_of_the_prompt(pair, seed):
    task, tokenizer = pair
    for sample in task.generate(tokenizer, task.minimum(tokenizer) + 100, 2, seed):
        ids = sample.context_ids + sample.question_ids
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        bos = tokenizer.bos_token if not tokenizer.chat_template else None
        again = tokenizer(text.removeprefix(bos or "").lstrip(" "), add_special_tokens=False)["input_ids"]
        assert [*([tokenizer.bos_token_id] if bos else []), *again] == [*ids]
        context = parts(tokenizer, sample)[0]
        found = pieces(tokenizer, sample)
        assert found
        assert all(piece and piece in context for piece in found)
        assert all(0 <= a < b <= len(sample.context_ids) for a, b in sample.evidence)
        if task.family in ("aggregation", "qa", "recall"):
            joint = " ".join(found)
            assert all(reference in joint for reference in sample.references)


def test_samples_depend_on_index_and_seed_alone_and_settled_scores_stay(pair, seed):
    task, tokenizer = pair
    length = task.minimum(tokenizer) + 64
    many, few = task.generate(tokenizer, length, 3, seed), task.generate(tokenizer, length, 2, seed)
    assert many[:2] == few
    assert task.generate(tokenizer, length, 1, seed + 1)[0] != many[0]
    rng = random.Random(seed)
    for sample in many:
        said = [*sample.references, *sample.references, *sample.choices, ".", "\n", "none", "is"] * 2
        for _ in range(10):
            rng.shuffle(said)
            text = " ".join(said)
            stops = [cut for cut in range(len(text) + 1) if task.done(text[:cut], sample)]
            assert stops
            assert task.score(text[: stops[0]], sample) == task.score(text, sample)
        assert task.score("", sample) == 0.0
        assert re.fullmatch(r"[a-z0-9_]+", sample.task)
