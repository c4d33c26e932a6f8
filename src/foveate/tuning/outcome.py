"""What the records of one setting say beside those of dense: what it costs, and what it loses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from foveate.errors import FoveateError
from foveate.evaluate.record import Cell, Record
from foveate.evaluate.statistics import LEVEL, Paired, paired

COSTS = {
    "kv-bytes": ("kv_bytes", "kv_bytes_dense"),
    "decode": ("decode_ms", "decode_dense_ms"),
    "prefill": ("prefill_s", "prefill_dense_s"),
}
"""By target: what a record says of it, and the same of dense."""


@dataclass(frozen=True)
class Outcome:
    """One setting on some samples.

    Args:
        cost: of the target, as a share of dense's; the mean over lengths of the median over their cells.
        difference: of the scores, paired with dense's; positive is better.
        dense: mean score of dense on these samples.
        bounded: whether all scores lie within 0..1, so that the smallest loss that n samples can show is known.
    """

    cost: float
    difference: Paired
    dense: float
    bounded: bool

    @property
    def n(self) -> int:
        return self.difference.n

    @property
    def loss(self) -> float:
        """What is lost, as a share of dense's score; negative where it gains."""
        return -self.difference.difference / self.dense

    def keeps(self, max_loss: float) -> bool:
        """Whether these samples' own loss is within what is allowed."""
        return self.loss <= max_loss + 1e-12

    def value(self, max_loss: float) -> float:
        """What the search makes small: the cost, and for a setting that loses too much always more than dense's."""
        return self.cost if self.keeps(max_loss) else max(1.0, self.cost) + self.loss - max_loss


def share(target: str, records: Iterable[Record]) -> float | None:
    """The cost as a share of dense's; None where it was not measured."""
    mine, theirs = COSTS[target]
    found: dict[int, list[float]] = defaultdict(list)
    for record in records:
        value, dense = getattr(record, mine), getattr(record, theirs)
        if value is not None and dense:
            found[record.cell.length].append(value / dense)
    return fmean(median(ratios) for ratios in found.values()) if found else None


def outcome(target: str, records: Sequence[Record], dense: Sequence[Record], level: float = LEVEL) -> Outcome | None:
    """The outcome of one setting's records; None where one was refused or its cost could not be measured.

    Args:
        dense: records of the same cells (length, task, seed) and perhaps of others.

    Raises:
        FoveateError: dense scores nothing on these samples, so nothing can be lost.
    """
    base = {_spot(record.cell): record for record in dense}
    if not records or any(record.status != "done" for record in records):
        return None
    cost = share(target, records)
    if cost is None:
        return None
    scores = [score for record in records for score in record.scores]
    theirs = [score for record in records for score in base[_spot(record.cell)].scores]
    mean = fmean(theirs)
    if mean <= 0:
        raise FoveateError(
            f"dense scores {mean:g} on {len(theirs)} samples, so no method could lose anything: "
            "give --tasks and --lengths that this model can do"
        )
    difference = paired(scores, theirs, higher_is_better=records[0].higher_is_better, level=level)
    return Outcome(cost, difference, mean, all(0 <= score <= 1 for score in [*scores, *theirs]))


def _spot(cell: Cell) -> tuple[int, str, int]:
    return cell.length, cell.task, cell.seed
