"""What is claimed of a loss: never more than the samples show."""

from __future__ import annotations

import random

import pytest

from foveate.errors import FoveateError
from foveate.evaluate.record import Cell, Record
from foveate.evaluate.statistics import LEVEL, paired, samples_needed
from foveate.tuning.outcome import Outcome, outcome, share
from foveate.tuning.verdict import Verdict, forewarning, level_of


def record(scores: list[float], method: str = "m", *, length: int = 64, seed: int = 0, **more: object) -> Record:
    cell = Cell("tiny", method, {}, None, length, "task", seed, False)
    facts: dict[str, object] = {"kv_bytes": 25, "kv_bytes_dense": 100, **more}
    return Record(cell=cell, scores=scores, outcomes=[{} for _ in scores], **facts)  # type: ignore[arg-type]


def judged(mine: list[float], dense: list[float], max_loss: float = 0.01, *, check: int = 0, cells: int = 1) -> Verdict:
    seen = outcome("kv-bytes", [record(mine)], [record(dense, "dense")], level=level_of(check))
    assert seen is not None
    return Verdict(seen, max_loss, cells)


def test_few_samples_show_nothing_even_if_all_agree() -> None:
    verdict = judged([1.0] * 32, [1.0] * 32, cells=2)
    assert verdict.status == "open"
    assert "n=32 cannot show a loss below 23%: give --samples at least 392" in verdict.sentence
    assert "ruled out" not in verdict.sentence


def test_enough_samples_that_agree() -> None:
    n = samples_needed(0.01)
    verdict = judged([1.0] * n, [1.0] * n)
    assert verdict.status == "shown"
    assert "a loss above 1% is ruled out" in verdict.sentence
    assert judged([1.0] * (n - 1), [1.0] * (n - 1)).status == "open"


def test_enough_samples_that_differ_too_often() -> None:
    rng = random.Random(3)
    n = 900
    dense = [float(rng.random() < 0.5) for _ in range(n)]
    mine = dense[::-1]
    mine[: sum(mine) < sum(dense)] = [1.0] * (sum(mine) < sum(dense))
    verdict = judged(mine, dense, 0.03)
    assert verdict.status == "open"
    assert "does not settle" in verdict.sentence
    assert verdict.samples_needed > n


def test_more_than_allowed() -> None:
    verdict = judged([0.0] * 3 + [1.0] * 7, [1.0] * 10, 0.1)
    assert verdict.status == "over"
    assert "more than the 10% allowed" in verdict.sentence
    assert verdict.to_json()["loss"] == pytest.approx(0.3)


def test_the_allowance_is_a_share_of_denses_score() -> None:
    """Dense at one half: losing 1 of 20 points is a tenth of it."""
    dense = [1.0] * 10 + [0.0] * 10
    mine = [1.0] * 9 + [0.0] * 11
    assert judged(mine, dense, 0.1).status == "open"
    assert judged(mine, dense, 0.09).status == "over"


def test_losses_count_downwards_and_have_no_bound() -> None:
    rng = random.Random(1)
    dense = [3 + rng.random() for _ in range(200)]
    mine = [x + 0.001 * rng.random() for x in dense]
    seen = outcome(
        "kv-bytes",
        [record(mine, higher_is_better=False)],
        [record(dense, "dense", higher_is_better=False)],
    )
    assert seen is not None and 0 < seen.loss < 0.001 and not seen.bounded
    assert Verdict(seen, 0.01, 1).status == "shown"
    assert Verdict(seen, 0.00015, 1).status == "open"
    assert Verdict(seen, 0.00015, 1).samples_needed > 200
    assert Verdict(seen, 0.0001, 1).status == "over"


def test_what_costs_no_less_is_no_winner() -> None:
    seen = Outcome(1.02, paired([1.0] * 900, [1.0] * 900), 1.0, True)
    assert Verdict(seen, 0.01, 1).status == "over"
    assert "costs 1.02 of dense" in Verdict(seen, 0.01, 1).sentence


def test_further_checks_share_one_error() -> None:
    levels = [level_of(i) for i in range(40)]
    assert levels[0] == LEVEL
    assert sum((1 - level) / 2 for level in levels) <= 1 - LEVEL
    assert levels == sorted(levels)


def test_forewarning() -> None:
    assert forewarning(0.01, 16, 2) == "n=32 cannot show a loss below 23%: give --samples at least 392"
    assert forewarning(0.01, 392, 2) is None
    assert "cannot show any loss" in str(forewarning(0.01, 1, 2))


def test_cost_is_the_mean_over_lengths_of_medians() -> None:
    records = [
        record([1.0], kv_bytes=10),
        record([1.0], seed=1, kv_bytes=30),
        record([1.0], seed=2, kv_bytes=90),
        record([1.0], length=128, kv_bytes=70),
    ]
    assert share("kv-bytes", records) == pytest.approx((0.3 + 0.7) / 2)
    assert share("decode", records) is None
    timed = record([1.0], decode_ms=2.0, decode_dense_ms=8.0, prefill_s=3.0, prefill_dense_s=2.0)
    assert (share("decode", [timed]), share("prefill", [timed])) == (0.25, 1.5)


def test_pairs_are_matched_by_cell() -> None:
    dense = [record([0.0], "dense", seed=1), record([1.0], "dense", seed=0)]
    seen = outcome("kv-bytes", [record([1.0], seed=0), record([0.0], seed=1)], dense)
    assert seen is not None and seen.loss == 0 and seen.n == 2


def test_refused_and_unmeasured() -> None:
    dense = [record([1.0], "dense")]
    cell = record([1.0]).cell
    assert outcome("kv-bytes", [Record(cell=cell, status="refused", refused="too small")], dense) is None
    assert outcome("decode", [record([1.0])], dense) is None
    assert outcome("decode", [], dense) is None


def test_nothing_can_be_lost_of_nothing() -> None:
    with pytest.raises(FoveateError, match="dense scores 0 on 3 samples"):
        outcome("kv-bytes", [record([0.0] * 3)], [record([0.0] * 3, "dense")])


def test_value_puts_what_loses_behind_all_that_keeps() -> None:
    keeps = Outcome(0.9, paired([1.0] * 9, [1.0] * 9), 1.0, True)
    loses = Outcome(0.1, paired([0.0] * 9, [1.0] * 9), 1.0, True)
    assert keeps.value(0.01) == 0.9
    assert loses.value(0.01) == pytest.approx(1.99)
