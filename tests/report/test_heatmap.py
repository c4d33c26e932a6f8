"""Needle maps: every sample in its cell, nothing in the others."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tests.report.synthetic import make_records

from foveate.evaluate.record import DENSE
from foveate.report.heatmap import colour, draw, grids, short_length
from foveate.report.summary import overall


def test_cells_are_the_means_of_their_samples():
    records = make_records(41, samples=17)
    (view,) = overall(records)
    found = grids(records, view)
    assert len(found) == len([row for row in view.rows if row.cells])
    for grid in found:
        mine = [
            r
            for r in records
            if (r.cell.method, r.cell.budget, r.cell.task) == (grid.row.method, grid.row.budget, "needle")
            and r.status == "done"
        ]
        assert grid.depths == (0, 0.25, 0.5, 0.75, 1)
        assert grid.lengths == (1024, 2048, 4096)
        for (depth, length), (mean, n) in grid.cells.items():
            (record,) = [r for r in mine if r.cell.length == length]
            scores = [s for s, o in zip(record.scores, record.outcomes, strict=True) if o["depths"] == [depth]]
            assert (mean, n) == (pytest.approx(sum(scores) / len(scores)), len(scores))
        assert sum(n for _, n in grid.cells.values()) == 17 * 3


def test_cells_without_samples_are_blank():
    records = make_records(42)
    records = [
        replace(r, outcomes=[{**o, "depths": [] if o["depths"] == [0.5] else o["depths"]} for o in r.outcomes])
        if r.cell.length == 2048 and r.cell.method == "kivi"
        else r
        for r in records
    ]
    (view,) = overall(records)
    by_name = {grid.row.name: draw(grid) for grid in grids(records, view)}
    assert by_name["kivi 0.25"].count('class="blank"') == 1
    assert "depth 50%, 2,048 tokens: no sample" in by_name["kivi 0.25"]
    assert by_name["kivi 0.25"].count('class="heat"') == 14
    assert by_name["snapkv 0.25"].count('class="blank"') == 0


def test_samples_with_several_needles_have_no_one_depth():
    records = [
        replace(r, outcomes=[{**o, "depths": [0.1, 0.9]} for o in r.outcomes]) if r.status == "done" else r
        for r in make_records(43)
    ]
    (view,) = overall(records)
    assert grids(records, view) == []


def test_many_depths_are_put_into_tenths():
    records = make_records(44, samples=40, lengths=(1024,))
    records = [
        replace(r, outcomes=[{**o, "depths": [i / 39]} for i, o in enumerate(r.outcomes)])
        if r.status == "done" and r.higher_is_better
        else r
        for r in records
    ]
    (view,) = overall(records)
    (dense, *_) = grids(records, view)
    assert dense.depths == tuple(i / 10 for i in range(10))
    assert sum(n for _, n in dense.cells.values()) == 40 * 4


def test_one_scale_from_bad_to_good():
    ends = colour(0), colour(0.5), colour(1)
    assert len(set(ends)) == 3
    assert colour(-3) == colour(0)
    assert colour(7) == colour(1)
    # Red falls and blue rises from one end to the other, so that order is seen without hue.
    steps = [colour(i / 20) for i in range(21)]
    assert steps[0][0] > steps[-1][0] + 100
    assert steps[0][2] < steps[-1][2] - 50


def test_dense_of_the_other_use_fills_in():
    records = make_records(45, questions=(True, False))
    records = [r for r in records if r.cell.question_seen or r.cell.method != DENSE]
    for view in overall(records):
        assert grids(records, view)[0].row.method == DENSE


def test_drawing_holds_a_figure_for_every_cell():
    records = make_records(46)
    (view,) = overall(records)
    for grid in grids(records, view):
        svg = draw(grid)
        shown = [float(value) for value in re.findall(r'class="value"[^>]*>([\d.]+)<', svg)]
        assert sorted(shown) == sorted(round(mean, 2) for mean, _ in grid.cells.values())


def test_lengths_are_short():
    assert [short_length(n) for n in (1024, 131072, 4000, 1500)] == ["1K", "128K", "4k", "1500"]
