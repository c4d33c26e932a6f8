"""Retention over turns: the score of the first question to one context, of the second, and so on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from foveate.evaluate.record import Record
from foveate.evaluate.retention import turn_scores
from foveate.evaluate.statistics import mean_interval
from foveate.report.curves import Curve, Curves, Point
from foveate.report.rows import View
from foveate.report.samples import done_by_row, key_of


def turn_curves(records: Sequence[Record], view: View) -> Curves | None:
    """Mean score by turn of every row of a view, over its tasks with turns; None where there is none.

    A turn is the mean over all samples that came to it; samples with fewer turns are not in the later ones.
    """
    done = done_by_row(records, view)
    curves = []
    for row in view.rows:
        turns: dict[int, list[float]] = defaultdict(list)
        for record in done.get(key_of(row), []):
            for scores in turn_scores(record).values():
                for turn, score in enumerate(scores, start=1):
                    turns[turn].append(float(score))
        if turns:
            points = (Point(n, str(n), f"turn {n}", mean_interval(turns[n])) for n in sorted(turns))
            curves.append(Curve(row, tuple(points)))
    return Curves("", "turn", "score", tuple(curves)) if curves else None
