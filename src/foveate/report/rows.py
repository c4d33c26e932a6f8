"""What the report shows: rows, one per method, setting and budget, and views, the rows of one model in one use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.evaluate.record import DENSE
from foveate.evaluate.statistics import Interval, Paired


@dataclass(frozen=True)
class Refusal:
    """A cell that a method refused."""

    length: int
    task: str
    reason: str
    floor: float | None

    @property
    def text(self) -> str:
        """`not below 0.29` where the method named its floor, else its own words."""
        return self.reason if self.floor is None else self.short

    @property
    def short(self) -> str:
        """`not below 0.29`, or that it was refused."""
        return "refused" if self.floor is None else f"not below {self.floor:.2g}"


@dataclass(frozen=True)
class Row:
    """One method with one setting and one budget, over the cells of a view.

    `families` holds the quality per family of tasks. `evidence_held` and `evidence_read` are the shares of the tokens
    with the evidence that were still held when the answer began and that its first step read. Shares and ratios are
    relative to dense; None where nothing was measured. `front_bytes`, `front_decode` and `front_pairs` say whether the
    row is on the Pareto front of quality against KV bytes, decode time, and the pairs that a new token reads.
    """

    model: str
    method: str
    settings: dict[str, Any]
    budget: str | None
    question_seen: bool
    label: str
    cells: int
    expected: int
    lengths: tuple[int, ...]
    score: Interval | None
    loss: Interval | None
    families: dict[str, Interval]
    loss_tasks: tuple[str, ...]
    score_vs_dense: Paired | None
    loss_vs_dense: Paired | None
    kv_share: float | None
    kv_bytes: float | None
    peak_share: float | None
    peak_bytes: float | None
    pairs_read: float | None
    pairs_prefill: float | None
    evidence_held: float | None
    evidence_read: float | None
    prefill_ratio: float | None
    prefill_s: float | None
    decode_ratio: float | None
    decode_ms: float | None
    repeats: int
    calibration_s: float | None
    faster_from: int | None
    refusals: tuple[Refusal, ...]
    front_bytes: bool = False
    front_decode: bool = False
    front_pairs: bool = False

    @property
    def dense(self) -> bool:
        return self.method == DENSE

    @property
    def complete(self) -> bool:
        return self.cells > 0 and self.cells >= self.expected

    @property
    def name(self) -> str:
        """The row in words: `snapkv 0.25`."""
        return self.label if self.budget is None else f"{self.label} {self.budget}"

    @property
    def told(self) -> bool:
        """Whether the row was shown the question though the methods beside it were not (a reader that searches)."""
        return not self.question_seen and self.settings.get("sees") == "question"


@dataclass(frozen=True)
class View:
    """The rows of one model in one use (question seen or not), over one length or all of them (`length` None), and over
    one family of tasks or all of them (`family` None)."""

    model: str
    question_seen: bool
    length: int | None
    family: str | None
    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    families: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    dense_bytes: float | None
    """Mean bytes of the dense cache over the cells of the view."""
    quality: str
    """What the quality axis is: `"score"` where any task has one, else `"loss"`."""

    @property
    def has_evidence(self) -> bool:
        """Whether any row knows how much of the evidence it held."""
        return any(row.evidence_held is not None for row in self.rows)

    @property
    def dense(self) -> Row | None:
        return next((row for row in self.rows if row.dense and row.cells), None)

    def of(self, row: Row) -> Interval | None:
        """The quality of a row on the axis of this view."""
        return row.score if self.quality == "score" else row.loss

    def versus_dense(self, row: Row) -> Paired | None:
        """The paired difference of a row from dense on the axis of this view."""
        return row.score_vs_dense if self.quality == "score" else row.loss_vs_dense
