"""Retention: what is left of a method's quality as one context is asked again and again."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from foveate.errors import BadArgument
from foveate.evaluate.record import Record
from foveate.evaluate.statistics import LEVEL, Paired, mean_interval, paired


@dataclass(frozen=True)
class TurnPoint:
    """One turn of a task with several.

    Attributes:
        turn: its number, from 1.
        score: the method's mean over samples.
        low, high: the interval that holds the true mean with probability `level`.
        dense: the mean of dense on the same samples.
        difference: the method against dense, sample by sample: `difference.difference` is below 0 where it lost.
        n: samples.
    """

    turn: int
    score: float
    low: float
    high: float
    dense: float
    difference: Paired
    n: int


def turn_scores(record: Record) -> dict[int, list[float]]:
    """The scores of each sample by turn, under the sample's index; empty for a task whose samples have one question."""
    outcomes = enumerate(record.outcomes)
    return {outcome.get("index", i): outcome["turns"] for i, outcome in outcomes if outcome.get("turns")}


def retention(record: Record, dense_record: Record, level: float = LEVEL) -> list[TurnPoint]:
    """Quality by turn, on the samples that both records hold; empty for a task whose samples have one question.

    Args:
        record: of any method, dense itself included.
        dense_record: of dense on the same model, length, task and seed.

    Raises:
        BadArgument: the records are of other cells, share no sample, or differ in their turns.
    """
    mine, base = turn_scores(record), turn_scores(dense_record)
    if not mine or not base:
        return []
    spot, other = ((c.model, c.length, c.task, c.seed) for c in (record.cell, dense_record.cell))
    if spot != other:
        raise BadArgument("dense_record", dense_record.cell.key(), f"give the record of dense for {record.cell.key()}")
    shared = sorted(mine.keys() & base.keys())
    if not shared:
        raise BadArgument("dense_record", dense_record.cell.key(), "it shares no sample with the method's record")
    numbers = {len(scores[index]) for scores in (mine, base) for index in shared}
    if len(numbers) > 1:
        raise BadArgument(
            "record", record.cell.key(), f"samples have {sorted(numbers)} turns; give equally many to all"
        )
    points = []
    for turn in range(numbers.pop()):
        scores, dense = ([each[index][turn] for index in shared] for each in (mine, base))
        interval = mean_interval(scores, level)
        difference = paired(scores, dense, higher_is_better=record.higher_is_better, level=level)
        points.append(
            TurnPoint(turn + 1, interval.estimate, interval.low, interval.high, fmean(dense), difference, len(shared))
        )
    return points
