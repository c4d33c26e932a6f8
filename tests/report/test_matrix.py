"""The win/loss matrix against the definition of its parts."""

from __future__ import annotations

from foveate.evaluate.record import Cell, Record
from foveate.evaluate.statistics import holm, mcnemar_exact, paired
from foveate.report.matrix import matrix
from foveate.report.summary import overall

N = 24


def record(method: str, scores: list[float], budget: str | None = None) -> Record:
    cell = Cell("m", method, {}, budget, 512, "niah_single_1", 0, False)
    outcomes = [{"index": i, "score": s} for i, s in enumerate(scores)]
    return Record(cell=cell, scores=scores, outcomes=outcomes, kv_bytes=50, kv_bytes_dense=100)


def test_every_pair_is_tested_once_and_corrected_for_all() -> None:
    dense, middle, bad = [1.0] * N, [1.0] * 16 + [0.0] * 8, [0.0] * N
    records = [record("dense", dense), record("a", middle, "0.5"), record("b", bad, "0.5")]
    view = overall(records)[0]
    found = matrix(records, view)
    assert found is not None
    assert [row.method for row in found.rows] == ["dense", "a", "b"]
    assert found.pairs == 3
    ps = holm([mcnemar_exact(8, 0), mcnemar_exact(24, 0), mcnemar_exact(16, 0)])
    assert [found.duels[0][1].p, found.duels[0][2].p, found.duels[1][2].p] == ps
    assert found.duels[0][0] is None
    assert [found.score(i) for i in range(3)] == [(2, 0), (1, 1), (0, 2)]
    ahead, behind = found.duels[1][2].result, found.duels[2][1].result
    assert (ahead.difference, ahead.low, ahead.better) == (-behind.difference, -behind.high, behind.worse)
    assert ahead.difference == paired(middle, bad).difference


def test_one_row_has_nobody_to_beat() -> None:
    records = [record("dense", [1.0] * N)]
    assert matrix(records, overall(records)[0]) is None


def test_rows_that_share_no_sample_are_not_compared() -> None:
    one = record("dense", [1.0] * N)
    other = record("a", [0.0] * N, "0.5")
    outcomes = [{**o, "index": o["index"] + 100} for o in other.outcomes]
    records = [one, Record(cell=other.cell, scores=other.scores, outcomes=outcomes, kv_bytes=5, kv_bytes_dense=9)]
    found = matrix(records, overall(records)[0])
    assert found is not None and found.pairs == 0 and found.duels[0][1] is None
