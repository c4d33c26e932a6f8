"""The terminal table: everything in it, nothing cut off, at any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tests.report.synthetic import MODEL, make_records

from foveate.report.recommend import recommend
from foveate.report.summary import overall
from foveate.report.terminal import print_report


def printed(records: list, width: int) -> str:
    out = io.StringIO()
    print_report(records, Console(file=out, width=width, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_figure_is_cut_off_at_any_width(width: int):
    records = make_records(21)
    text = printed(records, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in ("KV held", "peak", "score", "vs dense", "prefill", "decode", "needle", "ppl", "qa", "tracing"):
        assert word in text
    flat = " ".join(text.split())
    assert recommend(records)[0].sentence in flat
    (view,) = overall(records)
    for row in view.rows:
        assert row.label in text
        if row.score is not None:
            assert f"{row.score.low:.2f}–{row.score.high:.2f}" in text


def test_refused_cells_are_rows_and_reasons():
    text = printed(make_records(22), 120)
    (line,) = [line for line in text.splitlines() if line.strip().startswith("h2o") and "not below 0.29  " in line]
    assert line.split()[:5] == ["h2o", "0.25", "not", "below", "0.29"]
    assert "h2o 0.25: not below 0.29 at 1,024, 2,048, 4,096 tokens" in text


def test_partial_rows_and_missing_timings_say_so():
    records = [r for r in make_records(23) if not (r.cell.method == "kivi" and r.cell.task == "vt")]
    text = printed(records, 200)
    assert "12 of 15 cells" in text
    untimed = printed(make_records(23, timings=False), 200)
    assert "ms" not in untimed.split("●")[0]


def test_both_uses_are_printed():
    text = printed(make_records(24, questions=(True, False)), 200)
    assert f"{MODEL} · 1,024, 2,048, 4,096 tokens · question seen" in text
    assert "· question not seen" in text


def test_no_records_is_a_line_not_an_error():
    assert printed([], 80).strip() == "no records yet"
