"""Several questions about one context: of copies of a cache, and one after the other on one cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.small import Brief, small

from foveate.engine.apply import apply
from foveate.evaluate.answer import Answer, answer, read_prompts
from foveate.evaluate.batch import Batch
from foveate.evaluate.record import RECORDS, Record
from foveate.evaluate.request import Request
from foveate.evaluate.retention import retention
from foveate.evaluate.runner import run
from foveate.evaluate.setting import parse_budgets, parse_methods, settings_of
from foveate.models import Loaded
from foveate.models.shape import ModelShape
from foveate.tasks import Sample, corpus, task
from foveate.tasks.turns import PairTurns

LENGTH = 704
METHODS = [("dense", None), ("snapkv", 200), ("kivi", 0.5), ("quest", 400), ("h2o", 200), ("streaming-llm", 200)]
"""One that evicts once, one that packs, one that selects, one that evicts at each step, one that acts in the prompt;
with budgets in tokens, where shares would be those of the longest row."""


@pytest.fixture(scope="module")
def opened() -> Loaded:
    return small()


class Several(Brief):
    """Three questions of a list of pairs; answers end at different tokens, as a model's own do."""

    def __init__(self, name: str, tokens: int = 8) -> None:
        super().__init__(name, tokens)
        recipe = PairTurns(queries=3, conversation=name.startswith("turns"))
        self.task = replace(task(name), recipe=recipe)  # type: ignore[type-var]

    def done(self, text: str, sample: Sample) -> bool:
        return len(text) >= 2 and text[-1] > "q"


def samples(opened: Loaded, name: str, count: int = 3) -> list[Sample]:
    """Of different lengths: the questions of a batch are padded, and its contexts too."""
    made = Several(name).generate(opened.tokenizer, LENGTH, count, seed=3)
    return [replace(each, context_ids=each.context_ids[: len(each.context_ids) - 5 * i]) for i, each in enumerate(made)]


@torch.inference_mode()
def ask(
    opened: Loaded, some: list[Sample], question_seen: bool, method: str = "dense", budget: float | None = None
) -> tuple[list[Answer], Batch]:
    model, tokenizer = opened
    with apply(model, method, budget=budget) as handle:
        batch = Batch(model, handle.cache(), len(some), ModelShape.of(model))
        batch.cache.meter = {}
        logits = read_prompts(batch, some, question_seen, part="context")
        assert logits is not None
        answers = answer(batch, logits, some, Several(some[0].task), tokenizer, None, not question_seen)
        return answers, batch


@pytest.mark.parametrize(("method", "budget"), METHODS)
def test_each_copy_answers_as_if_its_question_were_the_only_one(opened: Loaded, method: str, budget) -> None:
    some = samples(opened, "ask_many_pairs")
    got, _ = ask(opened, some, False, method, budget)
    for turn in range(3):
        want, _ = ask(opened, [sample.at(turn) for sample in some], False, method, budget)
        assert [one.turns[turn] for one in got] == want
    assert len({one.prediction for each in got for one in each.turns}) > 3


@pytest.mark.parametrize(("method", "budget"), METHODS[:3])
def test_only_the_first_question_is_seen(opened: Loaded, method: str, budget) -> None:
    """What is held is chosen with the first question in view, whichever is asked then."""
    some = samples(opened, "ask_many_pairs")
    got, _ = ask(opened, some, True, method, budget)
    for turn in range(3):
        first = [replace(sample.at(turn), question_ids=sample.question_ids) for sample in some]
        if turn:
            model, tokenizer = opened
            with apply(model, method, budget=budget) as handle, torch.inference_mode():
                batch = Batch(model, handle.cache(), 3, ModelShape.of(model))
                batch.prompt([s.context_ids + s.question_ids for s in some])
                logits = batch.prompt([s.turns[turn].later_ids for s in some])
                want = answer(batch, logits, first, Several("ask_many_pairs"), tokenizer)
        else:
            want, _ = ask(opened, first, True, method, budget)
        mine = [one.turns[turn] for one in got]
        # a forward leaves a few integers per layer behind, which copies do without
        assert all(abs(a.kv_bytes_prompt - b.kv_bytes_prompt) < 64 for a, b in zip(mine, want, strict=True))
        assert [replace(one, kv_bytes_prompt=0) for one in mine] == [replace(one, kv_bytes_prompt=0) for one in want]


@pytest.mark.parametrize(
    ("method", "budget", "question_seen"), [(*each, turn % 2 == 1) for turn, each in enumerate(METHODS)]
)
def test_a_conversation_in_a_batch_is_the_conversation_alone(
    opened: Loaded, method: str, budget, question_seen: bool
) -> None:
    some = samples(opened, "turns_pairs")
    together, _ = ask(opened, some, question_seen, method, budget)
    for sample, got in zip(some, together, strict=True):
        (want,), _ = ask(opened, [sample], question_seen, method, budget)
        assert got.prediction == want.prediction
        assert [(a.score, a.tokens, a.evidence_read) for a in got.turns] == [
            (a.score, a.tokens, a.evidence_read) for a in want.turns
        ]
        assert got.evidence_held == want.evidence_held
    lengths = {tuple(turn.tokens for turn in one.turns) for one in together}
    assert len(lengths) > 1  # rows ended at different tokens


@pytest.mark.parametrize("question_seen", [False, True])
def test_a_dense_conversation_is_what_the_model_itself_would_hold(opened: Loaded, question_seen: bool) -> None:
    """Context, question, own answer, question, ... as one text: each answer is the greedy continuation of all of it."""
    model, tokenizer = opened
    some = samples(opened, "turns_pairs")
    answers, _ = ask(opened, some, question_seen)
    done = Several("turns_pairs").done
    for sample, got in zip(some, answers, strict=True):
        ids = list(sample.context_ids)
        for number, turn in enumerate(sample.turns):
            ids += turn.question_ids
            said: list[int] = []
            with torch.inference_mode():
                while len(said) < turn.max_new_tokens and not done(tokenizer.decode(said), sample):
                    said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
            assert got.turns[number].prediction == tokenizer.decode(said, skip_special_tokens=True)
            ids += said
        assert len(ids) <= LENGTH


def test_a_token_that_ends_an_answer_is_not_read_again(opened: Loaded, monkeypatch) -> None:
    """It stands in the next question where the chat has one."""
    some = samples(opened, "turns_pairs", 1)
    read: list[list[int]] = []
    original = Batch._read

    def watched(self, rows, phase):
        logits = original(self, rows, phase)
        read.extend(list(row) for row in rows)
        return logits.index_fill(1, torch.tensor([opened.tokenizer.eos_token_id]), 1e4)

    monkeypatch.setattr(Batch, "_read", watched)
    (one,), _ = ask(opened, some, False)
    assert one.tokens == 0
    assert one.prediction == ["", "", ""]
    assert read == [list(ids) for ids in (some[0].context_ids, *(turn.question_ids for turn in some[0].turns))]


def test_the_bytes_of_a_conversation_grow_and_those_of_copies_do_not(opened: Loaded) -> None:
    shape = ModelShape.of(opened.model)
    talked, _ = ask(opened, samples(opened, "turns_pairs", 1), False)
    held = [turn.kv_bytes for turn in talked[0].turns]
    assert held == sorted(held) and held[2] - held[0] > shape.dense_kv_bytes(100)
    assert talked[0].kv_bytes == held[0]
    assert talked[0].kv_bytes_end == max(turn.kv_bytes_end for turn in talked[0].turns) >= held[2]
    copies, _ = ask(opened, samples(opened, "ask_many_pairs", 1), False)
    held = [turn.kv_bytes for turn in copies[0].turns]
    assert max(held) - min(held) < shape.dense_kv_bytes(40)


@pytest.mark.parametrize("name", ["turns_pairs", "ask_many_pairs"])
@pytest.mark.parametrize("question_seen", [False, True])
def test_dense_reads_exactly_the_pairs_of_all_turns(opened: Loaded, name: str, question_seen: bool) -> None:
    _, batch = ask(opened, samples(opened, name), question_seen)
    assert batch.cache.meter == {"prompt_read": batch.dense["prompt"], "decode_read": batch.dense["decode"]}


def request(**changes: Any) -> Request:
    base = Request(
        model="small",
        lengths=(LENGTH,),
        tasks=(Several("ask_many_pairs"), Several("turns_pairs"), Brief("mqar")),
        samples=2,
        seed=1,
        repeats=0,
        corpus=corpus(),
    )
    return replace(base, **changes)


def start(
    opened: Loaded, out: Path, methods: str = "snapkv, flexprefill, retrieval(k=2, passage=40, budget=None)"
) -> list[Record]:
    settings = settings_of(parse_methods(methods), parse_budgets("0.6"))
    return run(opened.model, opened.tokenizer, request(), settings, out)


def test_a_run_records_every_turn_and_goes_on_where_it_was_cut(opened: Loaded, tmp_path: Path) -> None:
    whole = start(opened, tmp_path / "whole")
    assert [record.refused for record in whole] == [None] * len(whole)
    dense = {record.cell.task: record for record in whole if record.cell.method == "dense"}
    for record in whole:
        several = record.cell.task != "mqar"
        for outcome, score in zip(record.outcomes, record.scores, strict=True):
            assert ("turns" in outcome) == ("turns_held" in outcome) == several
            if several:
                assert len(outcome["turns"]) == len(outcome["prediction"]) == len(outcome["references"]) == 3
                assert outcome["score"] == score == pytest.approx(sum(outcome["turns"]) / 3)
                held = outcome["turns_held"]
                assert outcome["evidence_held"] == pytest.approx(sum(held) / 3, abs=1e-6)
                assert record.cell.method != "dense" or held == [1.0] * 3
                assert len(outcome["turns_read"]) == len(outcome["turns_kv_bytes"]) == 3
        points = retention(record, dense[record.cell.task])
        assert [point.turn for point in points] == ([1, 2, 3] if several else [])
    assert {r.cell.method: r.pairs_read for r in dense.values()} == {"dense": 1.0}

    lines = (tmp_path / "whole" / RECORDS).read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / RECORDS).write_bytes(b"".join(lines[:4]) + lines[4][:100])
    (tmp_path / "cut" / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
    again = start(opened, tmp_path / "cut")
    assert [(r.cell, r.scores, r.outcomes) for r in again] == [(r.cell, r.scores, r.outcomes) for r in whole]
    assert json.loads(lines[0])["outcomes"][0]["turns"] == whole[0].outcomes[0]["turns"]


def test_retrieval_reads_for_the_first_question_and_knows_what_it_left_out(opened: Loaded, tmp_path: Path) -> None:
    records = {
        r.cell.task: r
        for r in start(opened, tmp_path, "retrieval(k=2, passage=40, budget=None)")
        if r.cell.method == "retrieval"
    }
    held = [outcome["turns_held"] for outcome in records["ask_many_pairs"].outcomes]
    assert all(each[0] == 1.0 for each in held)
    assert any(share < 1.0 for each in held for share in each[1:])
