"""The table of every cell: one line per record, with the record's own figures."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from tests.report.synthetic import METHODS, RETRIEVAL, make_records

from foveate.evaluate.record import DENSE
from foveate.evaluate.statistics import mean_interval, paired
from foveate.report import MethodCard, render
from foveate.report.cells import body, cell_lines, choices, heads
from foveate.report.series import marks
from foveate.report.summary import overall

CARDS = [MethodCard("snapkv", "SnapKV", slots=("keep",)), MethodCard("kivi", "KIVI", slots=("format",))]


def test_every_record_is_a_line():
    records = make_records(91, budgets=(0.25,), lengths=(1024, 2048))
    (view,) = overall(records)
    lines = cell_lines(records, view, CARDS)
    assert {id(line.record) for line in lines} == {id(record) for record in records}
    dense = {(r.cell.length, r.cell.task): r for r in records if r.cell.method == DENSE}
    for line in lines:
        record = line.record
        if record.status == "refused":
            assert line.quality is None and line.difference is None
            continue
        alone = mean_interval(record.scores)
        assert line.quality is not None and line.quality.n == alone.n
        assert (line.quality.estimate, line.quality.low, line.quality.high) == pytest.approx(
            (alone.estimate, alone.low, alone.high), abs=0.03
        )
        if set(record.scores) <= {0.0, 1.0}:
            assert line.quality == alone
        known = [o["evidence_held"] for o in record.outcomes if o["evidence_held"] is not None]
        assert line.held == (pytest.approx(sum(known) / len(known)) if known else None)
        if record.cell.method == DENSE:
            assert line.difference is None
        elif record.higher_is_better:
            base = dense[record.cell.length, record.cell.task]
            assert line.difference == paired(record.scores, base.scores)
    spots = [(line.record.cell.length, line.record.cell.task) for line in lines]
    assert spots == sorted(spots)
    assert lines[0].row.dense, "within a length and task dense is first"


def test_lines_are_found_by_what_they_are():
    records = make_records(92, budgets=(0.25, 0.5), lengths=(1024, 2048), methods=[*METHODS, RETRIEVAL])
    (view,) = overall(records)
    found = choices(cell_lines(records, view, CARDS))
    assert list(found) == ["method", "slot", "budget", "family", "task", "length"]
    assert [value for value, _ in found["slot"]] == ["format", "keep"]
    assert [value for value, _ in found["budget"]] == ["0.25", "0.5", "–"]
    assert found["length"] == [("1024", "1,024"), ("2048", "2,048")]
    assert [value for value, _ in found["family"]] == ["needle", "ppl", "qa", "tracing"]
    both = next(line for line in cell_lines(records, view, CARDS) if line.row.method == "snapkv|kivi")
    assert both.slots == ("keep", "format")
    few = make_records(92, budgets=(0.25,), lengths=(1024,), tasks=["vt"], loss_task=False)
    assert list(choices(cell_lines(few, overall(few)[0]))) == ["method", "budget"], "what has one value is no filter"


def test_rows_of_the_table_are_as_wide_as_its_head():
    for evidence in (True, False):
        records = make_records(93, lengths=(1024,))
        if not evidence:
            records = [replace(r, outcomes=[{"index": o["index"]} for o in r.outcomes]) for r in records]
        (view,) = overall(records)
        lines = cell_lines(records, view, CARDS)
        rows = str(body(lines, marks([view]))).splitlines()
        rows = [row for row in re.split(r"(?=<tr )", "\n".join(rows)) if row]
        assert len(rows) == len(records)
        for line, row in zip(lines, rows, strict=True):
            spans = [int(n) for n in re.findall(r'colspan="(\d+)"', row)]
            assert row.count("<td") + sum(spans) - len(spans) == len(heads(lines)) == 12 + evidence
            assert line.record.cell.task in row
            if line.record.status == "refused":
                assert "not below 0.29" in row
            else:
                assert f">{len(line.record.scores)}</td>" in row


def test_a_page_of_two_thousand_cells_is_made_in_seconds():
    """Scores between 0 and 1 are the slow ones: they are resampled, not counted."""
    many = [replace(who, name=f"{who.name}-{i}") for i in range(3) for who in METHODS][:25]
    lengths, tasks = (1024, 2048, 4096, 8192, 16384), ["needle", "niah_multiquery", "vt", "qa_1", "turns", "cwe"]
    records = make_records(94, lengths=lengths, methods=many, tasks=[*tasks, "perplexity_positions"], loss_task=True)
    assert len(records) > 2000
    start = time.process_time()
    page = render(records)
    assert time.process_time() - start < 10
    assert page.count("data-length=") == len(records)
