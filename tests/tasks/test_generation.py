"""What needles and variables promise: exact lengths, evidence where it is said to be, answers only there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys

import pytest

from foveate.errors import BadArgument, Refused
from foveate.tasks import GROUPS, TASKS, Sample, expand_tasks, generation
from foveate.tasks.generation import GenerationTask

GENERATED = [
    task
    for task in TASKS.values()
    if isinstance(task, GenerationTask) and task.family in ("needle", "tracing") and task.name not in GROUPS["turns"]
]
NEEDLES = expand_tasks("needles")


@pytest.fixture(params=GENERATED, ids=lambda task: task.name)
def task(request: pytest.FixtureRequest) -> GenerationTask:
    return request.param


def context_of(sample: Sample, tokenizer) -> str:
    return tokenizer.decode(sample.context_ids, clean_up_tokenization_spaces=False)


def question_of(sample: Sample, tokenizer) -> str:
    return tokenizer.decode(sample.question_ids, clean_up_tokenization_spaces=False)


def prompt_of(sample: Sample, tokenizer) -> str:
    return tokenizer.decode(sample.context_ids + sample.question_ids, clean_up_tokenization_spaces=False)


def solve(context: str, question: str) -> str:
    """Reads the answer off the prompt with regular expressions, as a model that knows the rules would."""
    value = re.search(r"value (\d{5})", question)
    if value is None:
        needles = re.findall(r"special magic \w+ for (\S+) is: (\S+)\.", context)
        return "\n".join(value for key, value in needles if re.search(rf"(?<![\w-]){key}(?![\w-])", question))
    holders = set(re.findall(rf"VAR (\w+) = {value[1]}\b", context))
    assignments = re.findall(r"VAR (\w+) = VAR (\w+)\b", context)
    while new := {left for left, right in assignments if right in holders} - holders:
        holders |= new
    return " ".join(sorted(holders))


def test_a_solver_that_reads_the_prompt_gets_everything(task, tokenizer, made, seed):
    shortest = task.generate(tokenizer, task.minimum(tokenizer), 2, seed)
    longer = task.generate(tokenizer, 5000, 1, seed)
    for sample in (*shortest, *made(task, tokenizer), *longer):
        answer = solve(context_of(sample, tokenizer), question_of(sample, tokenizer))
        assert task.score(answer, sample) == 1.0
        assert task.done(answer, sample)


def test_a_solver_without_the_evidence_gets_nothing(task, tokenizer, made):
    for sample in made(task, tokenizer):
        kept = list(sample.context_ids)
        for start, stop in sorted(sample.evidence, reverse=True):
            del kept[start:stop]
        without = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        question = question_of(sample, tokenizer)
        assert task.score(solve(without, question), sample) == 0.0
        assert task.score(without + question, sample) == 0.0


def test_lengths_are_exact(task, tokenizer, seed):
    minimum = task.minimum(tokenizer)
    rng = random.Random(seed)
    for length in (minimum, minimum + 1, *(minimum + rng.randrange(2, 3000) for _ in range(3))):
        for sample in task.generate(tokenizer, length, 1, seed):
            assert len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens == length
            assert sample.target_ids == ()


def test_the_ids_are_what_the_tokenizer_gives_for_the_text(task, tokenizer, made):
    for sample in made(task, tokenizer):
        text = tokenizer.decode(
            sample.context_ids + sample.question_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        bos = tokenizer.bos_token if not tokenizer.chat_template else None
        again = tokenizer(text.removeprefix(bos or "").lstrip(" "), add_special_tokens=False)["input_ids"]
        assert [*([tokenizer.bos_token_id] if bos else []), *again] == [*sample.context_ids, *sample.question_ids]


@pytest.mark.parametrize("name", ["bpe", "smollm2"])
def test_the_prompt_is_one_user_turn_and_the_first_words_of_the_answer(task, name, request, made):
    tokenizer = request.getfixturevalue(name)
    sample = made(task, tokenizer)[0]
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
    )
    head, tail = frame.split("\0")
    whole = tokenizer.decode(sample.context_ids + sample.question_ids, clean_up_tokenization_spaces=False)
    content, prefix = whole.removeprefix(head).split(tail)
    assert whole.startswith(head)
    assert prefix[-1] != " "
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert rendered + prefix == whole
    assert question_of(sample, tokenizer).endswith(tail + prefix)


def test_plain_tokenizers_get_their_bos_and_nothing_behind(characters, seed):
    (sample,) = TASKS["niah_single_1"].generate(characters, 1500, 1, seed)
    ids = sample.context_ids + sample.question_ids
    assert ids[0] == characters.bos_token_id
    assert characters.bos_token_id not in ids[1:]
    assert characters.eos_token_id not in ids


def test_evidence_is_where_the_spans_say(task, tokenizer, made):
    for sample in made(task, tokenizer):
        assert len(sample.evidence) == len(sample.depths) == len(sample.references)
        for reference, depth, (start, stop) in zip(sample.references, sample.depths, sample.evidence, strict=True):
            sentence = tokenizer.decode(sample.context_ids[start:stop], clean_up_tokenization_spaces=False).strip()
            assert reference in sentence
            assert re.fullmatch(r"One of the special magic \w+ for \S+ is: \S+\.|VAR \w+ = (VAR )?\w+", sentence)
            assert 0.0 <= depth <= 1.0


@pytest.mark.parametrize("needles", NEEDLES, ids=lambda task: task.name)
def test_answers_and_asked_keys_stand_in_the_needles_alone(needles, tokenizer, made):
    for sample in made(needles, tokenizer):
        context, question = context_of(sample, tokenizer), question_of(sample, tokenizer)
        assert len(set(sample.references)) == len(sample.references)
        for reference in sample.references:
            assert context.count(reference) == 1
            assert reference not in question
        spans = [tokenizer.decode(sample.context_ids[start:stop]) for start, stop in sample.evidence]
        keys = [re.search(r" for (\S+) is: ", span)[1] for span in spans]  # pyright: ignore[reportOptionalSubscript]
        for key in set(keys):
            assert key in question
            assert context.count(key) == keys.count(key)
        placed = re.findall(r" for (\S+) is: (\S+)\.", context)
        assert len({value for _, value in placed}) == len(placed)
        if needles.name != "niah_multivalue":
            assert len({key for key, _ in placed}) == len(placed)


@pytest.mark.parametrize(
    ("name", "keys", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 1, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_the_number_of_keys_and_answers_is_rulers(name, keys, answers, bpe, seed):
    (sample,) = TASKS[name].generate(bpe, 1024, 1, seed)
    placed = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", context_of(sample, bpe))
    assert len({key for _, key, _ in placed}) == keys
    assert len(sample.references) == answers
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    form = uuid if name == "niah_single_3" else r"[1-9]\d{6}"
    assert all(re.fullmatch(form, value) for _, _, value in placed)
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", key) for _, key, _ in placed)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_needle_haystacks_hold_nothing_but_needles_up_to_their_last_line(name, bpe, seed):
    (sample,) = TASKS[name].generate(bpe, 4096, 1, seed)
    lines = context_of(sample, bpe).strip().split("\n\n")[1].split("\n")
    assert len(lines) > 40
    others = [line for line in lines if not line.startswith("One of the special magic ")]
    assert len(others) <= 1
    assert all(line.startswith("The grass is green.") or len(line) < 60 for line in others)


def test_variables_form_one_chain_in_order(bpe, seed):
    for sample in TASKS["vt"].generate(bpe, 1024, 5, seed):
        example, context = context_of(sample, bpe).rsplit("Follow the chain", 1)
        statements = re.findall(r"VAR (\w{5}) = (\w+)(?: (\w+))?", context)
        assert [left for left, _, _ in statements] == list(sample.references)
        assert [right or value for _, value, right in statements][1:] == list(sample.references[:-1])
        value = statements[0][1]
        assert value in question_of(sample, bpe)
        assert value not in example
        assert solve(*example.split("Question:")) in " ".join(sorted(re.findall(r"VAR (\w{3}) =", example)))
        assert list(sample.depths) == sorted(sample.depths)


def test_same_seed_same_bytes_in_every_process(bpe, tmp_path, seed):
    bpe.save_pretrained(tmp_path)
    program = (
        "import hashlib, json, sys\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "from foveate.tasks import TASKS\n"
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])\n"
        "seed = int(sys.argv[2])\n"
        "made = [repr(each) for task in TASKS.values() for each in task.generate(tokenizer, 1600, 2, seed)]\n"
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())\n"
    )
    made = [repr(sample) for task in TASKS.values() for sample in task.generate(bpe, 1600, 2, seed)]
    digests = {hashlib.sha256(json.dumps(made).encode()).hexdigest()}
    for hash_seed in ("0", "4711"):
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(seed)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_a_sample_depends_on_its_index_and_seed_and_on_nothing_else(task, bpe, seed):
    many, few = task.generate(bpe, 1024, 4, seed), task.generate(bpe, 1024, 2, seed)
    assert many[:2] == few
    assert len({sample.references for sample in many}) == 4
    assert task.generate(bpe, 1024, 1, seed + 1)[0].references != many[0].references


def test_depths_cover_the_haystack_evenly(bpe, seed):
    for name, count in (("niah_single_1", 160), ("niah_single_2", 160), ("niah_multivalue", 40)):
        task = TASKS[name]
        depths = [depth for sample in task.generate(bpe, 1200, count, seed) for depth in sample.depths]
        assert len(depths) == 160
        fifths = [sum(low / 5 <= depth < (low + 1) / 5 + (low == 4) for depth in depths) for low in range(5)]
        # 32 are expected in each, with a standard deviation of 5.1; sentences of unequal length add a little.
        assert all(6 <= fifth <= 58 for fifth in fifths), fifths
        assert min(depths) < 0.1
        assert max(depths) > 0.9


def test_scores_follow_rulers_rule(bpe, seed):
    task = TASKS["niah_multiquery"]
    (sample,) = task.generate(bpe, 1024, 1, seed)
    first, second, third, fourth = sample.references
    assert task.score("", sample) == 0.0
    assert task.score("no idea", sample) == 0.0
    assert task.score(f"{first}, {third}", sample) == 0.5
    assert task.score(f"\x00{fourth}\x1f{third}x{second}\n{first}", sample) == 1.0
    uuids = TASKS["niah_single_3"]
    (sample,) = uuids.generate(bpe, 1024, 1, seed)
    assert uuids.score(sample.references[0].upper(), sample) == 1.0
    assert uuids.score(sample.references[0][:-1], sample) == 0.0
    with pytest.raises(BadArgument, match="scores the generated text"):
        uuids.score([0.5], sample)


def test_stopping_early_never_changes_a_score(task, bpe, made, seed):
    rng = random.Random(seed)
    for sample in made(task, bpe):
        words = [*sample.references, *sample.references, "and", "1234567", "\n", "none", "-", "\x07"] * 2
        for _ in range(20):
            rng.shuffle(words)
            text = rng.choice(["", " "]).join(words)
            stops = [cut for cut in range(len(text) + 1) if task.done(text[:cut], sample)]
            assert stops, "the text holds all answers"
            assert task.score(text[: stops[0]], sample) == task.score(text, sample)
            assert not task.done(text[: stops[0] - 1], sample)


def test_the_reserve_holds_the_answer(task, tokenizer, made):
    for sample in made(task, tokenizer):
        answer = tokenizer(" " + ", ".join(sample.references), add_special_tokens=False)["input_ids"]
        assert len(answer) < sample.max_new_tokens
        assert sample.max_new_tokens >= (30 if task.name == "vt" else 128)


def test_lengths_below_the_least_are_refused_and_the_least_works(task, tokenizer, seed):
    with pytest.raises(BadArgument, match=rf"length=100: {task.name} needs at least (\d+) tokens") as refusal:
        task.generate(tokenizer, 100, 1, seed)
    least = int(re.search(r"at least (\d+)", str(refusal.value))[1])  # pyright: ignore[reportOptionalSubscript]
    assert len(task.generate(tokenizer, least, 6, seed)) == 6
    with pytest.raises(BadArgument, match="at least"):
        task.generate(tokenizer, least - 1, 1, seed)


def test_no_sample_is_no_request(task, bpe):
    with pytest.raises(BadArgument, match="samples=0: give at least 1"):
        task.generate(bpe, 1024, 0)


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['role'] }}", "{{ messages[0]['content'] * 2 }}", "{{ raise_exception('no') }}"]
)
def test_chat_templates_that_hide_the_turn_are_refused(bpe, template, monkeypatch):
    monkeypatch.setattr(bpe, "chat_template", template)
    with pytest.raises(BadArgument, match=r"tokenizer=.*chat template must show the text of a single user turn once"):
        TASKS["niah_single_1"].generate(bpe, 1024, 1)


def test_tokenizers_without_offsets_are_refused(bpe, monkeypatch):
    monkeypatch.setattr(type(bpe), "is_fast", False)
    with pytest.raises(Refused, match="character offsets"):
        TASKS["niah_single_1"].generate(bpe, 1024, 1)


def test_templates_are_asked_for_an_answer_without_thought_on_a_fixed_day(bpe, monkeypatch, seed):
    template = (
        "{{ date_string }}\n{{ messages[0]['content'] }}\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}\n"
    )
    monkeypatch.setattr(bpe, "chat_template", template)
    (sample,) = TASKS["niah_single_1"].generate(bpe, 1024, 1, seed)
    assert context_of(sample, bpe).startswith("01 Jan 2025\n")
    assert "<think></think>" in question_of(sample, bpe)


def test_a_draft_that_is_too_long_is_drawn_anew(bpe, seed, monkeypatch):
    """The least length is measured on a few drafts: others may need more."""
    task, fit, drawn = TASKS["cwe"], generation.fit, []

    def refusing(tokenizer, draft, haystack, length):
        drawn.append(draft)
        if len(drawn) < 3:
            raise BadArgument("length", length, "too long")
        return fit(tokenizer, draft, haystack, length)

    monkeypatch.setattr(generation, "fit", refusing)
    (sample,) = task.generate(bpe, 2048, 1, seed)
    assert sample.references == drawn[2].asks[0].references != drawn[0].asks[0].references
    monkeypatch.setattr(generation, "fit", lambda *args: fit(*args[:3], 8))
    with pytest.raises(BadArgument, match="length=8"):
        task.generate(bpe, 2048, 1, seed)
