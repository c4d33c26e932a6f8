"""The reader: what it gives, what that costs, and its row beside methods'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.small import LENGTH, Brief, small
from tests.evaluate.test_runner import request, start

from foveate.errors import BadArgument, Infeasible
from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.setting import parse_budgets, parse_methods, settings_of, text_of
from foveate.methods.budget import Budget
from foveate.models import Loaded
from foveate.models.shape import ModelShape
from foveate.report.summary import overall
from foveate.retrieval import Retrieval
from foveate.tasks import Sample, task


@pytest.fixture(scope="module")
def opened() -> Loaded:
    return small()


@pytest.fixture(scope="module")
def samples(opened: Loaded) -> list[Sample]:
    return task("niah_single_1").generate(opened.tokenizer, LENGTH, 3, 5)


def read(opened: Loaded, sample: Sample, **settings: Any) -> Sample:
    return Retrieval(**settings).open(opened.tokenizer, ModelShape.of(opened.model), "cpu")(sample)


def share(whole: Sample, part: Sample) -> float:
    def tokens(sample: Sample) -> int:
        return sum(stop - start for start, stop in sample.evidence)

    return tokens(part) / tokens(whole)


@pytest.mark.parametrize("settings", [{}, {"decompose": True}, {"fanout": 3, "beam": 2}, {"passage": 100}])
def test_what_is_read_is_the_instruction_passages_in_order_and_the_question(
    opened: Loaded, samples: list[Sample], settings: dict[str, Any]
) -> None:
    for sample in samples:
        part = read(opened, sample, budget=0.7, **settings)
        total = len(sample.context_ids) + len(sample.question_ids)
        assert len(part.context_ids) + len(part.question_ids) <= 0.7 * total
        assert part.context_ids[: sample.intro] == sample.context_ids[: sample.intro]
        assert part.question_ids == sample.question_ids
        rest = iter(sample.context_ids)
        assert all(token in rest for token in part.context_ids)  # a subsequence, order kept
        assert (part.references, part.max_new_tokens, part.depths) == (
            sample.references,
            sample.max_new_tokens,
            sample.depths,
        )


def test_the_needle_is_found(opened: Loaded, samples: list[Sample]) -> None:
    for sample in samples:
        part = read(opened, sample, budget=0.7, passage=120)
        assert share(sample, part) == 1
        for (a, b), (c, d) in zip(sample.evidence, part.evidence, strict=True):
            assert sample.context_ids[a:b] == part.context_ids[c:d]


def test_evidence_that_is_not_read_is_gone(opened: Loaded, samples: list[Sample]) -> None:
    (a, b), *_ = samples[0].evidence
    far = replace(samples[0], question_ids=tuple(opened.tokenizer("zzz qqq")["input_ids"]))
    part = read(opened, far, k=1, budget=None, passage=a - samples[0].intro)
    assert len(part.context_ids) < b
    assert share(samples[0], part) < 1


def test_everything_fits_under_a_budget_of_one(opened: Loaded, samples: list[Sample]) -> None:
    assert read(opened, samples[0], budget=1.0) == samples[0]


def test_k_limits_the_passages(opened: Loaded, samples: list[Sample]) -> None:
    sample = samples[0]
    part = read(opened, sample, k=2, passage=40)
    assert sample.intro < len(part.context_ids) <= sample.intro + 80
    with pytest.raises(BadArgument, match="give k or a budget"):
        read(opened, sample)


def test_a_prompt_without_a_question_is_searched_with_its_end(opened: Loaded) -> None:
    (sample,) = Brief("perplexity").generate(opened.tokenizer, LENGTH, 1, 0)
    assert sample.question_ids == ()
    part = read(opened, sample, k=1, passage=50)
    assert part.context_ids[-8:] == sample.context_ids[-8:]
    assert 50 < len(part.context_ids) <= 100
    assert part.target_ids == sample.target_ids


def test_a_budget_is_a_share_of_the_dense_cache(opened: Loaded) -> None:
    shape = ModelShape.of(opened.model)
    room = Retrieval(budget=0.25)._room
    assert room(shape, 1000) == 250
    assert Retrieval(budget=300)._room(shape, 1000) == 300
    assert Retrieval(budget=300)._room(shape, 200) == 200
    assert Retrieval(budget=Budget.bytes(shape.dense_kv_bytes(123)))._room(shape, 1000) == 123
    sliding = ModelShape.of(small("gemma3").model)
    tokens = room(sliding, 1000)
    assert sliding.dense_kv_bytes(tokens) <= 0.25 * sliding.dense_kv_bytes(1000) < sliding.dense_kv_bytes(tokens + 1)


def test_a_budget_without_room_for_a_passage_names_its_floor(opened: Loaded, samples: list[Sample]) -> None:
    with pytest.raises(Infeasible, match="question and one passage") as caught:
        read(opened, samples[0], budget=0.05)
    floor = caught.value.floor
    assert 0.05 < floor < 1
    assert read(opened, samples[0], budget=min(1.0, floor + 1e-3)).context_ids


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 0}, "at least 1 passage"),
        ({"retriever": "sparta"}, "bm25, minilm"),
        ({"passage": 1}, "at least 2 tokens"),
        ({"fanout": 1}, "0 for a flat index"),
        ({"beam": 0}, "at least 1 section"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        Retrieval(**settings)


# -- in a comparison ---------------------------------------------------------------------------------------------------


def rows(methods: Any, budgets: object = "0.25") -> list[tuple[str, dict[str, object], str | None]]:
    return [(s.method, s.settings, s.budget) for s in settings_of(parse_methods(methods), parse_budgets(budgets))][1:]


def test_it_is_named_like_a_method() -> None:
    sees = {"sees": "question"}
    assert rows("retrieval", "0.25,0.5") == [("retrieval", sees, "0.25"), ("retrieval", sees, "0.5")]
    assert rows("retrieval(k=3, budget=None)") == [("retrieval", {"k": 3} | sees, None)]
    assert rows([Retrieval(passage=32)]) == [("retrieval", {"passage": 32} | sees, "0.25")]
    assert rows("retrieval(budget=0.5)|snapkv") == [("retrieval|snapkv", {"retrieval.budget": "0.5"} | sees, "0.25")]
    with pytest.raises(BadArgument, match="retrieval and snapkv would both take the budget"):
        parse_methods("retrieval|snapkv")
    for text in ("snapkv|retrieval", "retrieval|retrieval"):
        with pytest.raises(BadArgument, match="before the methods, once"):
            parse_methods(text)


@pytest.mark.parametrize("text", ["retrieval", "retrieval(k=3, budget=None),dense", "retrieval(budget='0.5')|snapkv"])
def test_its_text_reads_back(text: str) -> None:
    entries = parse_methods(text)
    assert settings_of(parse_methods(text_of(entries)), parse_budgets("0.25")) == settings_of(
        entries, parse_budgets("0.25")
    )


@pytest.fixture(scope="module")
def records(opened: Loaded, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    methods = "retrieval(passage=100), retrieval(passage=100, budget=1.0), snapkv, retrieval(budget=0.8)|snapkv"
    found = start(opened, tmp_path_factory.mktemp("run"), request(repeats=1), methods)
    return {(f"{r.cell.method} {r.cell.budget}", r.cell.task): r for r in found}


def test_its_row_is_measured_like_the_others(records: dict[tuple[str, str], Record]) -> None:
    assert all(record.status == "done" for record in records.values())
    for name in ("niah_single_1", "perplexity"):
        row = records["retrieval 0.7", name]
        assert 0.3 < row.kv_bytes / row.kv_bytes_dense <= 0.703
        assert row.pairs_read == pytest.approx(row.kv_bytes / row.kv_bytes_dense, abs=0.02)
        assert row.pairs_prefill == pytest.approx(row.pairs_read**2, abs=0.02)
        assert row.prefill_s is not None and row.prefill_s > 0
        assert row.decode_ms is not None and row.kv_bytes_peak is not None
        assert row.cell.settings["sees"] == "question"


def test_its_label_says_what_it_sees(records: dict[tuple[str, str], Record]) -> None:
    labels = {row.label for view in overall(list(records.values())) for row in view.rows}
    assert {"retrieval (sees=question)", "snapkv"} <= labels


def test_everything_retrieved_is_dense(records: dict[tuple[str, str], Record]) -> None:
    for name in ("niah_single_1", "perplexity"):
        row, dense = records["retrieval 1.0", name], records[f"{DENSE} None", name]
        assert row.scores == pytest.approx(dense.scores, abs=1e-5)
        assert (row.kv_bytes, row.pairs_read, row.pairs_prefill) == (dense.kv_bytes, 1.0, 1.0)


def test_recall_is_reported_beside_the_score(records: dict[tuple[str, str], Record]) -> None:
    outcomes = records["retrieval 0.7", "niah_single_1"].outcomes
    assert [outcome["evidence_held"] for outcome in outcomes] == [1.0] * 3
    assert all("score" in outcome for outcome in outcomes)


def test_a_method_works_on_what_was_retrieved(records: dict[tuple[str, str], Record]) -> None:
    both, alone = records["retrieval|snapkv 0.7", "perplexity"], records["snapkv 0.7", "perplexity"]
    assert both.kv_bytes < alone.kv_bytes


def test_lost_evidence_counts_as_not_held(opened: Loaded, tmp_path: Path) -> None:
    found = start(opened, tmp_path, request(tasks=(Brief("niah_single_1"),)), "retrieval(k=1, passage=16, budget=None)")
    held = [outcome["evidence_held"] for outcome in found[1].outcomes]
    assert all(share is not None and share < 0.5 for share in held)
