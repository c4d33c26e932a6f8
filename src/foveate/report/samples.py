"""Which records and samples stand behind a row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from foveate.evaluate.record import DENSE, Record
from foveate.report.naming import RowKey, canonical, row_key
from foveate.report.rows import Row, View
from foveate.tasks import family

Spot = tuple[int, str, int]
"""Length, task and seed: records of one model and use that agree in it have the same samples."""


def spot(record: Record) -> Spot:
    """Which samples a record was made with."""
    return (record.cell.length, record.cell.task, record.cell.seed)


def sample_scores(record: Record) -> dict[int, float]:
    """Sample index -> score; the index is the outcome's own where it has one, else its position."""
    return {
        int(outcome.get("index", position)): score
        for position, (outcome, score) in enumerate(zip(record.outcomes, record.scores, strict=True))
    }


def of_use(records: Sequence[Record], model: str, question_seen: bool) -> list[Record]:
    """Records of one use. Dense holds everything, so its result is the same in both uses and fills in for either."""
    mine = [r for r in records if r.cell.model == model and r.cell.question_seen == question_seen]
    have = {spot(r) for r in mine if r.cell.method == DENSE}
    for record in records:
        cell = record.cell
        other_use = cell.model == model and cell.method == DENSE and cell.question_seen != question_seen
        if other_use and spot(record) not in have:
            mine.append(replace(record, cell=replace(cell, question_seen=question_seen)))
    return mine


def key_of(row: Row) -> RowKey:
    """The key of a row's cells."""
    return row.method, canonical(row.settings), row.budget


def done_by_row(records: Sequence[Record], view: View) -> dict[RowKey, list[Record]]:
    """The finished records behind each row of a view; rows without any are absent."""
    found: dict[RowKey, list[Record]] = defaultdict(list)
    for record in of_use(records, view.model, view.question_seen):
        cell = record.cell
        inside = view.length in (None, cell.length) and view.family in (None, family(cell.task))
        if inside and record.status == "done":
            found[row_key(cell)].append(record)
    return dict(found)
