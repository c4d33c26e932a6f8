"""Retention over turns: means, intervals and losses against dense, from records alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from foveate.errors import BadArgument
from foveate.evaluate.record import Cell, Record
from foveate.evaluate.retention import retention, turn_scores


def record(method: str, turns: Sequence[Sequence[float]], first: int = 0, **cell) -> Record:
    values = {"model": "m", "length": 512, "task": "turns_needles", "seed": 0, "question_seen": True, **cell}
    scores = [sum(each) / len(each) for each in turns]
    outcomes = [
        {"index": first + i, "score": s, "turns": t} for i, (s, t) in enumerate(zip(scores, turns, strict=True))
    ]
    return Record(
        cell=Cell(method=method, settings={}, budget=None, **values),
        scores=scores,
        outcomes=outcomes,
        kv_bytes=1,
        kv_bytes_dense=1,
    )


def test_each_turn_has_its_mean_its_interval_and_its_loss() -> None:
    dense = record("dense", [[1, 1, 0]] * 12)
    mine = record("snapkv", [[1, 0, 0]] * 9 + [[1, 1, 0]] * 3)
    points = retention(mine, dense)
    assert [p.turn for p in points] == [1, 2, 3]
    assert [p.score for p in points] == [1.0, 0.25, 0.0]
    assert [p.dense for p in points] == [1.0, 1.0, 0.0]
    assert [p.difference.difference for p in points] == [0.0, -0.75, 0.0]
    assert [p.difference.loss for p in points] == [False, True, False]
    assert all(p.low <= p.score <= p.high and p.n == 12 for p in points)
    assert points[0].low < 1.0  # twelve right answers do not prove that all are
    assert 0.0 < points[1].low < 0.25 < points[1].high < 0.75


def test_shares_are_bootstrapped() -> None:
    mine = record("h2o", [[0.5, 0.25], [1.0, 0.5], [0.75, 0.0], [0.25, 0.25]])
    first, second = retention(mine, mine)
    assert first.score == 0.625
    assert 0.25 <= first.low < first.score < first.high <= 1.0
    assert second.score == 0.25
    assert second.difference.difference == 0.0


def test_samples_are_paired_by_their_index() -> None:
    dense = record("dense", [[1, 0], [0, 1], [1, 1]])
    mine = record("snapkv", [[0, 1], [1, 0]], first=1)
    points = retention(mine, dense)
    assert [p.n for p in points] == [2, 2]
    assert [p.dense for p in points] == [0.5, 1.0]
    assert (points[0].difference.better, points[0].difference.worse) == (0, 0)
    assert (points[1].difference.better, points[1].difference.worse) == (0, 1)


def test_a_record_of_single_questions_has_no_turns() -> None:
    plain = record("dense", [[1], [0]])
    old = Record.from_json(plain.to_json().replace(',"turns":[1]', "").replace(',"turns":[0]', ""))
    assert turn_scores(old) == {}
    assert retention(old, old) == []


def test_records_that_do_not_belong_together_are_refused() -> None:
    dense, mine = record("dense", [[1, 1]]), record("snapkv", [[1, 0]])
    with pytest.raises(BadArgument, match="give the record of dense for snapkv"):
        retention(mine, record("dense", [[1, 1]], length=1024))
    with pytest.raises(BadArgument, match="shares no sample"):
        retention(mine, record("dense", [[1, 1]], first=7))
    with pytest.raises(BadArgument, match=r"samples have \[2, 3\] turns"):
        retention(mine, record("dense", [[1, 1, 1]]))
    assert retention(mine, dense)
