"""Rows against sums done by hand, and the rules that keep them comparable."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from tests.report.synthetic import METHODS, TASKS, make_records

from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.statistics import mcnemar_exact
from foveate.report.as_json import summary_json
from foveate.report.naming import budget_order
from foveate.report.rows import Row, View
from foveate.report.summary import overall, per_family, per_length, uses


def row_of(view: View, method: str, budget: str | None) -> Row:
    return next(row for row in view.rows if row.method == method and row.budget == budget)


def of(records: list[Record], method: str, budget: str | None) -> list[Record]:
    return [r for r in records if r.cell.method == method and r.cell.budget == budget and r.status == "done"]


def test_a_row_is_the_sum_of_its_cells():
    records = make_records(random.randrange(10**6))
    random.shuffle(records)
    (view,) = overall(records)
    dense = of(records, DENSE, None)
    for who, budget in (("snapkv", "0.25"), ("quest", "0.5"), ("snapkv|kivi", "0.5")):
        mine = of(records, who, budget)
        row = row_of(view, who, budget)
        scores = [s for r in mine if r.higher_is_better for s in r.scores]
        assert row.score is not None
        assert row.score.estimate == pytest.approx(sum(scores) / len(scores))
        assert row.score.n == len(scores)
        assert row.kv_share == pytest.approx(sum(r.kv_bytes for r in mine) / sum(r.kv_bytes_dense for r in mine))
        assert row.kv_bytes == pytest.approx(sum(r.kv_bytes for r in mine) / len(mine))
        assert row.decode_ms == pytest.approx(sum(r.decode_ms or 0 for r in mine) / len(mine))
        assert row.prefill_ratio == pytest.approx(
            sum(r.prefill_s or 0 for r in mine) / sum(r.prefill_dense_s or 0 for r in mine)
        )
        by_key = {(r.cell.length, r.cell.task): r for r in dense}
        pairs = [
            (a, b)
            for r in mine
            if r.higher_is_better
            for a, b in zip(r.scores, by_key[r.cell.length, r.cell.task].scores, strict=True)
        ]
        result = row.score_vs_dense
        assert result is not None
        assert result.n == len(pairs)
        assert result.p == pytest.approx(mcnemar_exact(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)))
        assert set(row.families) == {"needle", "ppl", "qa", "tracing"}
        assert row.families["tracing"].estimate == pytest.approx(
            sum(s for r in mine if r.cell.task == "vt" for s in r.scores) / sum(len(r.scores) for r in mine) * 5
        )
        assert row.loss is not None
        assert row.loss.estimate > 2
        assert row.complete
    assert row_of(view, "duo-attention", "0.25").calibration_s == 41.5
    assert row_of(view, "snapkv", "0.25").calibration_s is None


def test_samples_are_paired_by_their_index_not_by_their_place():
    records = make_records(3, lengths=(1024,), tasks=["vt"], loss_task=False)
    (before,) = overall(records)
    turned = []
    for record in records:
        order = list(range(len(record.scores)))
        random.shuffle(order)
        outcomes, scores = [record.outcomes[i] for i in order], [record.scores[i] for i in order]
        turned.append(replace(record, outcomes=outcomes, scores=scores))
    (after,) = overall(turned)
    for row, again in zip(before.rows, after.rows, strict=True):
        assert row.score_vs_dense == again.score_vs_dense


def test_a_row_that_lacks_a_length_is_neither_flattered_nor_on_a_front():
    records = make_records(5)
    (whole,) = overall(records)
    (view,) = overall([r for r in records if not (r.cell.method == "kivi" and r.cell.length > 1024)])
    row = row_of(view, "kivi", "0.25")
    assert (row.cells, row.expected, row.complete) == (5, 15, False)
    assert not row.front_bytes
    assert not row.front_decode
    # Its bytes are its share of the dense mean of the view, not the bytes of its short contexts.
    full = row_of(whole, "kivi", "0.25")
    assert row.kv_bytes == pytest.approx(full.kv_bytes, rel=0.05)
    (short, *_) = per_length(records, view.model, True)
    assert row_of(short, "kivi", "0.25").complete


def test_refused_cells_keep_their_floor():
    records = make_records(6, budgets=(0.25,))
    (view,) = overall(records)
    row = row_of(view, "h2o", "0.25")
    assert row.cells == 0
    assert {refusal.text for refusal in row.refusals} == {"not below 0.29"}
    assert row.score is None
    assert row.kv_share is None


def test_dense_serves_both_uses_when_it_was_run_in_one():
    records = make_records(8, questions=(True, False))
    one = [r for r in records if r.cell.question_seen or r.cell.method != DENSE]
    seen, unseen = overall(one)
    assert (seen.question_seen, unseen.question_seen) == (True, False)
    assert unseen.dense is not None
    assert seen.dense is not None
    assert unseen.dense.score == seen.dense.score
    assert row_of(unseen, "kivi", "0.25").score_vs_dense is not None
    assert uses([r for r in records if r.cell.method != DENSE or not r.cell.question_seen]) == uses(records)
    only_dense_unseen = [r for r in records if r.cell.question_seen or r.cell.method == DENSE]
    assert [use[1] for use in uses(only_dense_unseen)] == [True]


def test_missing_timings_are_missing_not_zero():
    (view,) = overall(make_records(9, timings=False))
    for row in view.rows:
        assert (row.decode_ms, row.decode_ratio, row.prefill_ratio, row.faster_from) == (None,) * 4
        assert not row.front_decode
    assert any(row.front_bytes for row in view.rows)


def test_fronts_hold_what_nothing_beats():
    for seed in range(5):
        (view,) = overall(make_records(seed))
        rows = [r for r in view.rows if r.cells]
        for row in rows:
            assert row.score is not None
            beaten = any(
                other.kv_share <= row.kv_share
                and other.score.estimate >= row.score.estimate
                and (other.kv_share < row.kv_share or other.score.estimate > row.score.estimate)
                for other in rows
                if other.kv_share is not None and other.score is not None
            )
            assert row.front_bytes is not beaten


def test_a_family_has_fronts_of_its_own():
    records = make_records(9)
    (whole,) = overall(records)
    views = {view.family: view for view in per_family(records, whole.model, True)}
    assert list(views) == ["needle", "ppl", "qa", "tracing"] == list(whole.families)
    assert views["needle"].tasks == ("needle", "niah_multikey_1")
    assert {name: view.quality for name, view in views.items() if name != "ppl"} == dict.fromkeys(
        ("needle", "qa", "tracing"), "score"
    )
    assert views["ppl"].quality == "loss", "losses have an axis of their own"
    assert all(row.score is None for row in views["ppl"].rows)
    for name, view in views.items():
        for row in view.rows:
            if row.cells:
                assert view.of(row) == row_of(whole, row.method, row.budget).families[name]
        assert any(row.front_bytes for row in view.rows)
        assert row_of(view, "snapkv", "0.25").expected == 3 * len(view.tasks)
    # A row that lacks one family is whole in the others.
    (view,) = [
        v
        for v in per_family([r for r in records if (r.cell.method, r.cell.task) != ("kivi", "vt")], whole.model, True)
        if v.family == "qa"
    ]
    assert row_of(view, "kivi", "0.25").complete


def test_losses_alone_make_the_axis_of_a_view():
    (view,) = overall(make_records(10, tasks=[]))
    assert view.quality == "loss"
    dense = view.dense
    assert dense is not None
    assert view.of(dense) == dense.loss
    best = min((r for r in view.rows if r.cells), key=lambda r: (view.of(r).estimate, r.kv_share))  # type: ignore[union-attr]
    assert best.front_bytes


def test_several_settings_of_one_method_are_told_apart_by_what_differs():
    records = make_records(11, lengths=(1024,), budgets=(0.25,))
    extra = [
        replace(r, cell=replace(r.cell, settings={"window": 64, "kernel": 5}))
        for r in records
        if r.cell.method == "snapkv"
    ]
    (view,) = overall(records + extra)
    labels = {row.label for row in view.rows if row.method == "snapkv"}
    assert labels == {"snapkv (window=32)", "snapkv (window=64)"}


def test_crossover_is_the_length_from_which_decode_stays_faster():
    base = [r for r in make_records(12, methods=[METHODS[0]], budgets=(0.25,)) if r.decode_ms]

    def crossover(ratios: dict[int, float]) -> int | None:
        records = [
            r if r.cell.method == DENSE else replace(r, decode_ms=r.decode_dense_ms * ratios[r.cell.length])  # type: ignore[operator]
            for r in base
        ]
        return row_of(overall(records)[0], "snapkv", "0.25").faster_from

    assert crossover({1024: 1.2, 2048: 0.9, 4096: 0.8}) == 2048
    assert crossover({1024: 0.9, 2048: 1.1, 4096: 0.8}) == 4096
    assert crossover({1024: 0.9, 2048: 0.9, 4096: 0.8}) == 1024
    assert crossover({1024: 0.9, 2048: 0.9, 4096: 1.0}) is None


def test_budgets_are_in_order_of_their_numbers():
    assert sorted(["1024 tokens", "0.5", None, "0.25", "128 tokens", "x", "1.2.3"], key=budget_order) == [
        "1.2.3",
        "x",
        "0.25",
        "0.5",
        "128 tokens",
        "1024 tokens",
        None,
    ]


def test_the_json_summary_is_plain_and_says_what_the_views_say():
    records = make_records(13, questions=(True, False))
    data = json.loads(json.dumps(summary_json(records), allow_nan=False))
    assert data["cells"] == len(records)
    assert len(data["views"]) == 2
    for part, view in zip(data["views"], overall(records), strict=True):
        assert [row["name"] for row in part["rows"]] == [row.name for row in view.rows]
        for row, entry in zip(view.rows, part["rows"], strict=True):
            assert entry["kv_share"] == row.kv_share
            assert entry["front_bytes"] is row.front_bytes
            if row.score_vs_dense is not None:
                assert entry["score_vs_dense"]["loss"] is row.score_vs_dense.loss
        assert part["recommendation"]["sentence"].endswith(".")
    assert set(TASKS) < set(data["views"][0]["tasks"])
    assert data["versions"]["torch"] == "2.13.0"
