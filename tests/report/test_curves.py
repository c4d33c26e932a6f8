"""Curves over turns, depths and positions: every sample at its place, and the picture shows them."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from tests.report.synthetic import METHODS, make_records

from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.statistics import mean_interval
from foveate.report.curves import Curves, draw
from foveate.report.positions import depth_curves, perplexity_curves
from foveate.report.rows import View
from foveate.report.series import marks
from foveate.report.summary import overall
from foveate.report.turns import turn_curves

TASKS = ["needle", "niah_multiquery", "turns", "perplexity_positions", "vt"]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return make_records(81, samples=16, tasks=TASKS, methods=METHODS[:3], lengths=(1024, 2048))


@pytest.fixture(scope="module")
def view(records: list[Record]) -> View:
    return overall(records)[0]


def of(records: list[Record], task: str, method: str = "snapkv", budget: str = "0.25") -> list[Record]:
    return [r for r in records if (r.cell.method, r.cell.budget, r.cell.task) == (method, budget, task)]


def points(curves: Curves, method: str = "snapkv", budget: str | None = "0.25"):
    return next(c.points for c in curves.curves if (c.row.method, c.row.budget) == (method, budget))


def test_a_turn_is_the_mean_of_its_scores(records: list[Record], view: View):
    curves = turn_curves(records, view)
    assert curves is not None
    assert curves.dense is not None and curves.dense.row.method == DENSE
    for turn, point in enumerate(points(curves)):
        scores = [outcome["turns"][turn] for r in of(records, "turns") for outcome in r.outcomes]
        assert (point.x, point.where, point.value) == (turn + 1, f"turn {turn + 1}", mean_interval(scores))
        assert point.value.n == 2 * 16
    refused = [row.name for row in view.rows if not row.cells]
    assert refused == ["h2o 0.25"]
    assert len(curves.curves) == len(view.rows) - 1


def test_samples_with_fewer_turns_end_earlier(records: list[Record], view: View):
    short = [
        replace(r, outcomes=[{**o, "turns": o["turns"][: 2 if o["index"] < 4 else 5]} for o in r.outcomes])
        if r.cell.task == "turns" and r.status == "done"
        else r
        for r in records
    ]
    curves = turn_curves(short, view)
    assert curves is not None
    assert [p.value.n for p in points(curves)] == [32, 32, 24, 24, 24]


def test_no_turns_no_curve(records: list[Record], view: View):
    rest = [r for r in records if r.cell.task != "turns"]
    assert turn_curves(rest, view) is None
    assert perplexity_curves([r for r in rest if r.cell.task != "perplexity_positions"], view) == []
    assert depth_curves([r for r in rest if r.cell.task == "vt"], view) is None


def test_needles_count_at_their_depths(records: list[Record], view: View):
    found = depth_curves([r for r in records if r.cell.task == "niah_multiquery"], view)
    assert found is not None
    assert [p.x for p in points(found)] == [0.1, 0.35, 0.6, 0.85]
    for j, point in enumerate(points(found)):
        hits = [
            float(o["references"][j] in o["prediction"]) for r in of(records, "niah_multiquery") for o in r.outcomes
        ]
        assert point.value == mean_interval(hits)
    alone = depth_curves([r for r in records if r.cell.task == "needle"], view)
    assert alone is not None
    assert [p.tick for p in points(alone)] == ["0%", "25%", "50%", "75%", "100%"]
    for point in points(alone):
        scores = [o["score"] for r in of(records, "needle") for o in r.outcomes if o["depths"] == [point.x]]
        assert point.value == mean_interval(scores)


def test_needles_whose_score_is_not_the_share_found_are_left_out(records: list[Record], view: View):
    odd = [
        replace(r, outcomes=[{**o, "prediction": "none of them"} for o in r.outcomes])
        for r in records
        if r.cell.task == "niah_multiquery" and r.status == "done" and min(r.scores) > 0
    ]
    assert odd
    assert depth_curves(odd, overall(odd)[0]) is None


def test_many_depths_are_put_into_bins_that_samples_can_fill(records: list[Record], view: View):
    def spread(number: int) -> list[Record]:
        few = make_records(82, samples=number, lengths=(1024,), tasks=["needle"], loss_task=False, methods=METHODS[:1])
        return [replace(r, outcomes=[{**o, "depths": [(o["index"] + 0.5) / number]} for o in r.outcomes]) for r in few]

    for number, bins in ((12, 2), (40, 8), (200, 10)):
        some = spread(number)
        curves = depth_curves(some, overall(some)[0])
        assert curves is not None
        assert [p.x for p in points(curves)] == pytest.approx([(i + 0.5) / bins for i in range(bins)])
        assert sum(p.value.n for p in points(curves)) == number
    assert points(curves)[0].where == "depth 0% to 10%"


def test_perplexity_by_position_per_length(records: list[Record], view: View):
    sets = perplexity_curves(records, view)
    assert [each.tab for each in sets] == ["1,024 tokens", "2,048 tokens"]
    for each, length in zip(sets, (1024, 2048), strict=True):
        (record,) = [r for r in of(records, "perplexity_positions") if r.cell.length == length]
        found = points(each)
        assert [p.x for p in found] == [length * i / 8 for i in range(1, 9)]
        for place, point in enumerate(found, start=1):
            losses = [s for i, s in enumerate(record.scores) if 8 - i % 8 == place]
            assert point.value.estimate == pytest.approx(math.exp(sum(losses) / len(losses)))
            assert point.value.low <= point.value.estimate <= point.value.high
            assert point.value.n == 2


def test_a_picture_holds_its_points_and_dense(records: list[Record], view: View):
    known = marks([view])
    for curves in (turn_curves(records, view), depth_curves(records, view), *perplexity_curves(records, view)):
        assert curves is not None
        assert [c.row.dense for c in curves.drawn] == [False] * 5
        for curve in curves.drawn:
            svg = draw(curves, curve, known)
            assert svg.count('class="hit"') == svg.count('class="dot') == len(curve.points)
            assert svg.count('class="dense-line"') == svg.count('class="band"') == 1
            assert svg.count("dense ") == len(curve.points), "each point says what dense has there"
            for y in re.findall(r'class="dot[^"]*" cx="[\d.]+" cy="([\d.]+)"', svg):
                assert 0 <= float(y) <= 140
    alone = turn_curves([r for r in records if r.cell.method == DENSE], view)
    assert alone is not None
    assert [c.row.method for c in alone.drawn] == [DENSE]
    assert 'class="dense-line"' not in draw(alone, alone.drawn[0], known)
