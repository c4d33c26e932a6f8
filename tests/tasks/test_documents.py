"""LongBench and InfiniteBench from files: metrics on cases worked by hand, cut middles, wrong files."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from foveate.errors import BadArgument
from foveate.tasks import expand_tasks, metrics, task
from foveate.tasks.suites import INFINITEBENCH, LONGBENCH

TEXT = " ".join(f"Sentence number {n} tells of the ship." for n in range(300))


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def bench(dataset: str, **fields):
    record = {"input": "Who sailed?", "context": TEXT, "answers": ["Ada Byron"], "length": 5000, "dataset": dataset}
    return {**record, "all_classes": None, "language": "en", "_id": "x", **fields}


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "text", "reference", "value"),
    [
        ("token_f1", "The cat sat.", "a cat sat", 1.0),
        ("token_f1", "cat cat dog", "cat dog dog", 2 / 3),
        ("token_f1", "", "cat", 0.0),
        ("token_f1", "北京大学", "北京", 2 / 3),
        ("rouge_l", "police killed the gunman", "police kill the gunman", 3 / 4),
        ("rouge_l", "the gunman police killed", "police killed the gunman", 2 / 4),
        ("rouge_l", "", "police", 0.0),
        ("code_similarity", "\n```python\n# no\nx = 1\ny = 2", "x = 1", 1.0),
        ("code_similarity", "abcd", "abxd", 3 / 4),
        ("code_similarity", "", "x", 0.0),
        ("share_of_numbers", "Paragraph 12, or 3", "Paragraph 12", 1 / 2),
        ("share_of_numbers", "none", "Paragraph 12", 0.0),
        ("share_of_numbers", "7", "7", 1.0),
        ("first_number", "It is 42. Not 7", "42", 1.0),
        ("first_number", "7, then 42", "42", 0.0),
        ("first_number", "-3", "-3", 1.0),
        ("first_number", "45.50", "45.5", 1.0),
        ("first_number", "no", "1", 0.0),
        ("whole_word", 'the key is "ab-12"', "AB-12", 1.0),
        ("whole_word", "ab-123", "ab-12", 0.0),
        ("choice_letter", "The correct answer is (B), not A", "B", 1.0),
        ("choice_letter", "C. because of A", "C", 1.0),
        ("choice_letter", "D'Artagnan: B", "B", 1.0),
        ("choice_letter", "", "A", 0.0),
        ("running_values", "1 2 4", "1 2 3 4", 2 / 4),
        ("running_values", "2", "1 2", 0.0),
    ],
)
def test_metrics_on_cases_by_hand(metric, text, reference, value):
    assert getattr(metrics, metric)(text, reference) == pytest.approx(value)


def test_classes_share_the_point_and_parts_of_the_right_name_do_not_count():
    classes = ["city", "Other city", "state"]
    assert metrics.one_class("Other city", "Other city", classes) == 1.0
    assert metrics.one_class("Other city, state", "Other city", classes) == 1 / 2
    assert metrics.one_class("state", "Other city", classes) == 0.0
    assert metrics.one_class("city state", "city", classes) == 1 / 2


def test_the_longest_common_subsequence_is_that_of_the_table(seed):
    rng = random.Random(seed)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(12))) for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
        assert metrics.common_length(a, b) == table[-1][-1], (a, b)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", LONGBENCH)
def test_every_data_set_of_longbench_is_read_and_its_reference_scores_one(bpe, tmp_path, dataset):
    answer = {"passage_count": "12", "lcc": "x = y", "repobench-p": "x = y"}.get(dataset, "Paragraph 3")
    record = bench(f"{dataset}_e", answers=["nothing 1", answer], all_classes=["Paragraph 3", "Other", "nothing 1"])
    (each,) = expand_tasks(f"longbench:{lines(tmp_path / 'data.jsonl', record)}")
    (sample,) = each.generate(bpe, 2000, 1)
    assert each.score(f"{answer}\n", sample) == 1.0
    assert each.score("zzz", sample) == 0.0
    assert sample.bucket == "4-8k"
    assert each.family == "document" and each.description.startswith(dataset)
    used = len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens
    assert used == 2000, "the text is longer"
    assert sample.max_new_tokens == LONGBENCH[dataset].reserve
    first_line = dataset in ("trec", "lsht", "triviaqa", "samsum")
    assert each.done(f"\n{answer}\nmore", sample) == first_line
    assert not each.done(answer, sample)
    prompt = bpe.decode(sample.context_ids + sample.question_ids)
    assert prompt.startswith("<|start|>user") != (first_line or dataset in ("lcc", "repobench-p"))


@pytest.mark.parametrize("name", INFINITEBENCH)
def test_every_data_set_of_infinitebench_is_read(bpe, tmp_path, name):
    options = ["Anna", "Bert", "Carl", "Dora"] if INFINITEBENCH[name].chance else []
    answer = {"math_calc": [3, -4, 5], "code_run": -7}.get(name, ["Carl"] if options else ["71432"])
    record = {"id": 0, "context": TEXT, "input": "Which?", "answer": answer, "options": options}
    each = task(f"infinitebench:{lines(tmp_path / f'{name}.jsonl', record)}")
    (sample,) = each.generate(bpe, 3000, 1)
    said = {"math_calc": "3 -4 5", "code_run": "-7"}.get(name, "C" if options else "71432")
    assert sample.references == (said,)
    assert each.score(f" {said} ", sample) == 1.0
    assert each.score("zzz", sample) == 0.0
    assert each.chance == (0.25 if options else 0.0)
    if options:
        assert "C. Carl" in bpe.decode(sample.question_ids)


def test_long_texts_lose_their_middle_and_short_ones_nothing(bpe, tmp_path):
    short = bench("hotpotqa", context="A short <|end|>text.", answers=["short"])
    each = task(f"longbench:{lines(tmp_path / 'data.jsonl', bench('hotpotqa'), short)}")
    for sample in each.generate(bpe, 900, 2):
        context = bpe.decode(sample.context_ids)
        used = len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens
        if sample.references == ("short",):
            assert context.endswith("A short text.")
            assert used < 900
        else:
            assert used == 900
            assert "Sentence number 0 tells" in context and context.endswith("number 299 tells of the ship.")
            body = bpe(TEXT)["input_ids"]
            kept = len(sample.context_ids) - sample.intro
            first = list(sample.context_ids[sample.intro :][: kept - kept // 2])
            assert first == body[: len(first)]
            assert list(sample.context_ids[-(kept // 2) :]) == body[-(kept // 2) :]
        assert "Who sailed?" in bpe.decode(sample.question_ids)
        assert "Who sailed?" not in context


def test_version_two_has_four_choices(bpe, tmp_path, seed):
    records = [
        {
            "question": f"Why {n}?",
            "choice_A": "a",
            "choice_B": "b",
            "choice_C": "c",
            "choice_D": "d",
            "answer": "ABCD"[n % 4],
        }
        | {"context": TEXT, "length": "short"}
        for n in range(60)
    ]
    each = task(f"longbench:{lines(tmp_path / 'v2.jsonl', *records)}")
    samples = each.generate(bpe, 700, 60, seed)
    assert len({sample.question_ids for sample in samples}) == 60
    rng = random.Random(seed)
    score = sum(each.score(rng.choice("ABCD"), sample) for sample in samples) / 60
    assert each.chance == 0.25
    assert abs(score - 0.25) < 4 * (0.25 * 0.75 / 60) ** 0.5
    assert all(each.score(f"The answer is ({sample.references[0]})", sample) == 1.0 for sample in samples)
    assert each.generate(bpe, 700, 5, seed) == samples[:5]
    assert [s.references for s in each.generate(bpe, 700, 60, seed + 1)] != [s.references for s in samples]


def test_the_least_length_works_and_less_is_refused(bpe, tmp_path):
    each = task(f"longbench:{lines(tmp_path / 'data.jsonl', bench('gov_report'), bench('gov_report'))}")
    least = each.minimum(bpe)
    assert len(each.generate(bpe, least, 2)) == 2
    with pytest.raises(BadArgument, match=f"length={least - 1}: longbench.* needs at least {least} tokens"):
        each.generate(bpe, least - 1, 1)
    with pytest.raises(BadArgument, match=r"samples=3: .*holds 2; give at most that"):
        each.generate(bpe, 900, 3)
    with pytest.raises(BadArgument, match="scores the generated text"):
        each.score([0.1], each.generate(bpe, 900, 1)[0])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("longbench:data.jsonl", "", "is empty"),
        ("longbench:data.jsonl", "{oops", "line 1 is not JSON"),
        ("longbench:data.jsonl", "3\n", "record 1 is a int; give one object per line"),
        ("longbench:data.jsonl", '{"context": "x"}', "record 1 has no text 'dataset', only context"),
        ("longbench:data.jsonl", '{"dataset": "mine"}', "dataset 'mine' is none of LongBench's"),
        (
            "longbench:data.jsonl",
            '{"dataset": "qasper"}\n{"dataset": "trec"}',
            "holds several data sets (qasper, trec)",
        ),
        ("longbench:data.jsonl", '{"dataset": "qasper", "context": "x", "input": "y"}', "record 1 has no 'answers'"),
        (
            "longbench:data.jsonl",
            '{"dataset": "trec", "context": "x", "input": "y", "answers": ["z"]}',
            "the records have no list 'all_classes'",
        ),
        ("longbench:data.jsonl", '{"choice_A": "x", "context": "c", "question": "q"}', "no text 'choice_B'"),
        ("infinitebench:data.jsonl", "{}", "must be named as InfiniteBench's: passkey"),
        ("infinitebench:passkey.jsonl", '{"context": "x", "input": "y"}', "record 1 has no 'answer'"),
        (
            "infinitebench:code_debug.jsonl",
            '{"context": "x", "input": "y", "answer": ["q"], "options": ["a", "b"]}',
            "record 1 has not four 'options'",
        ),
    ],
)
def test_other_files_are_refused_with_what_is_wrong(tmp_path, name, content, says):
    reader, file = name.split(":")
    (tmp_path / file).write_text(content)
    with pytest.raises(BadArgument) as refusal:
        task(f"{reader}:{tmp_path / file}")
    assert says in str(refusal.value)
    assert file in str(refusal.value)


def test_missing_files_and_missing_paths_are_refused(tmp_path):
    with pytest.raises(BadArgument, match=r"cannot be read \(No such file"):
        task(f"longbench:{tmp_path / 'none.jsonl'}")
    with pytest.raises(BadArgument, match=r"there are .*longbench:FILE, infinitebench:FILE"):
        task("longbench")
    (tmp_path / "latin.jsonl").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(BadArgument, match="is not UTF-8 text"):
        task(f"longbench:{tmp_path / 'latin.jsonl'}")
