"""Who beats whom: every pair of rows on the samples that both answered, corrected for there being many pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from foveate.evaluate.record import Record
from foveate.evaluate.statistics import LEVEL, Paired, holm
from foveate.report.rows import Row, View
from foveate.report.samples import done_by_row, key_of, sample_scores, spot
from foveate.report.significance import paired_many

MOST_ROWS = 40
"""Rows that are still readable side by side."""


@dataclass(frozen=True)
class Duel:
    """One row against another. `p` is corrected (Holm) for all pairs of the matrix; positive is better."""

    result: Paired
    p: float

    @property
    def wins(self) -> bool:
        return self.result.difference > 0 and self.p < 1 - LEVEL

    @property
    def loses(self) -> bool:
        return self.result.difference < 0 and self.p < 1 - LEVEL


@dataclass(frozen=True)
class Matrix:
    """Rows in order of their quality, best first; `duels[i][j]` is row i against row j, None on the diagonal and where
    no sample is shared. `pairs` comparisons were made in all."""

    rows: tuple[Row, ...]
    duels: tuple[tuple[Duel | None, ...], ...]
    pairs: int

    def score(self, i: int) -> tuple[int, int]:
        """How many rows row i beats, and how many beat it."""
        known = [duel for duel in self.duels[i] if duel is not None]
        return sum(d.wins for d in known), sum(d.loses for d in known)


def matrix(records: Sequence[Record], view: View) -> Matrix | None:
    """The matrix of a view's complete rows; None where there are fewer than two."""
    higher = view.quality == "score"
    sign = 1 if higher else -1
    rows = [row for row in view.rows if row.complete and view.of(row) is not None]
    rows.sort(key=lambda row: -sign * view.of(row).estimate)  # type: ignore[union-attr]
    rows = rows[:MOST_ROWS]
    if len(rows) < 2:
        return None
    done = done_by_row(records, view)
    scores = [
        {
            (spot(record), index): score
            for record in done.get(key_of(row), [])
            if record.higher_is_better == higher
            for index, score in sample_scores(record).items()
        }
        for row in rows
    ]
    shared: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
    for i, j in combinations(range(len(rows)), 2):
        both = sorted(scores[i].keys() & scores[j].keys())
        if both:
            shared[i, j] = [scores[i][key] for key in both], [scores[j][key] for key in both]
    found = dict(zip(shared, paired_many(list(shared.values()), higher_is_better=higher), strict=True))
    corrected = dict(zip(found, holm([result.p for result in found.values()]), strict=True))
    duels: list[list[Duel | None]] = [[None] * len(rows) for _ in rows]
    for (i, j), result in found.items():
        duels[i][j] = Duel(result, corrected[i, j])
        turned = Paired(
            -result.difference, -result.high, -result.low, result.p, result.n, result.worse, result.better, result.level
        )
        duels[j][i] = Duel(turned, corrected[i, j])
    return Matrix(tuple(rows), tuple(tuple(line) for line in duels), len(found))
