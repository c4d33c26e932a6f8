"""Samples that a method lost: dense answered better, the method did not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.evaluate.record import DENSE, Record
from foveate.report.rows import Row, View

_SHOWN = 3
_LONGEST = 240


@dataclass(frozen=True)
class Loss:
    """One sample that dense scored higher on."""

    task: str
    length: int
    depths: str
    expected: str
    dense: str
    method: str
    dense_score: float
    method_score: float


@dataclass(frozen=True)
class Losses:
    """How many samples a row lost, of how many it shares with dense, and the first of them."""

    row: Row
    lost: int
    shared: int
    shown: tuple[Loss, ...]


def _short(value: object) -> str:
    text = " / ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def lost_answers(records: Sequence[Record], view: View) -> list[Losses]:
    """Per row of a view, the samples that dense scored higher on; rows that lost none are left out."""
    dense: dict[tuple[int, str, int], Record] = {}
    mine: dict[tuple[str, str, str | None], list[Record]] = defaultdict(list)
    for record in records:
        cell = record.cell
        if cell.model != view.model or record.status != "done" or not record.higher_is_better:
            continue
        spot = (cell.length, cell.task, cell.seed)
        if cell.method == DENSE:
            if cell.question_seen == view.question_seen or spot not in dense:
                dense[spot] = record
        elif cell.question_seen == view.question_seen:
            mine[cell.method, repr(cell.settings), cell.budget].append(record)
    found = []
    for row in view.rows:
        lost = shared = 0
        shown: list[Loss] = []
        for record in mine.get((row.method, repr(row.settings), row.budget), []):
            cell = record.cell
            base = dense.get((cell.length, cell.task, cell.seed))
            if base is None:
                continue
            pairs = enumerate(zip(base.outcomes, base.scores, strict=True))
            theirs = {outcome.get("index", i): (outcome, score) for i, (outcome, score) in pairs}
            here = 0
            for i, (outcome, score) in enumerate(zip(record.outcomes, record.scores, strict=True)):
                partner = theirs.get(outcome.get("index", i))
                if partner is None:
                    continue
                shared += 1
                if partner[1] <= score:
                    continue
                lost += 1
                here += 1
                # The first loss of each cell: examples from several tasks say more than three of one.
                if here == 1 and len(shown) < _SHOWN:
                    depths = ", ".join(f"{float(d):.0%}" for d in outcome.get("depths") or [])
                    shown.append(
                        Loss(
                            task=cell.task,
                            length=cell.length,
                            depths=depths,
                            expected=_short(outcome.get("references", "")),
                            dense=_short(partner[0].get("prediction", "")),
                            method=_short(outcome.get("prediction", "")),
                            dense_score=partner[1],
                            method_score=score,
                        )
                    )
        if lost:
            found.append(Losses(row, lost, shared, tuple(shown)))
    return found
