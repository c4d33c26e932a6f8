"""From records to rows: one row per method, setting and budget, with what it kept, held, read and took.

Rules that the whole report follows:

- a sample counts once, whatever its task or length: the quality of a row is the mean over its samples;
- accuracies and losses (`higher_is_better` False) are never averaged together: `score` and `loss`;
- costs are sums over the cells of a row divided by the sums of the dense cache over the *same* cells, so a row that
  lacks a length is not flattered; absolute numbers are that share of the dense mean of the view;
- a row that lacks cells which the dense baseline has is partial: it is shown, but is never on a front and never
  recommended.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.statistics import Interval, Paired, mean_interval, paired, pareto_front


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

    `evidence_held` and `evidence_read` are the shares of the tokens with the evidence that were still held when the
    answer began and that its first step read. Shares and ratios are relative to dense; None where nothing was measured.
    `front_bytes` and `front_decode` say whether the row is on the Pareto front of quality against KV bytes and against
    decode time.
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
    groups: dict[str, Interval]
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


@dataclass(frozen=True)
class View:
    """The rows of one model in one use (question seen or not), over one length or all of them (`length` None)."""

    model: str
    question_seen: bool
    length: int | None
    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
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


def task_group(task: str) -> str:
    """The family of a task: what stands before the first separator (`niah_single_1` -> `niah`)."""
    return re.split(r"[_\-/:.]", task, maxsplit=1)[0] or task


def read_sample_pairs(record: Record) -> dict[int, float]:
    """Sample index -> score; the index is the outcome's own where it has one, else its position."""
    return {
        int(outcome.get("index", position)): score
        for position, (outcome, score) in enumerate(zip(record.outcomes, record.scores, strict=True))
    }


def row_scores(records: Sequence[Record], view: View, row: Row) -> dict[tuple[int, str, int, int], float]:
    """(length, task, seed, index) -> score of a row's samples on the axis of its view."""
    mine = (row.method, _canonical(row.settings), row.budget)
    found = {}
    for record in _with_shared_dense(records, view.model, view.question_seen):
        cell = record.cell
        same = (cell.method, _canonical(cell.settings), cell.budget) == mine and view.length in (None, cell.length)
        if same and record.status == "done" and record.higher_is_better == (view.quality == "score"):
            for index, score in read_sample_pairs(record).items():
                found[(*_sample_key(record), index)] = score
    return found


def _setting_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))


def _canonical(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


_ALWAYS_SAID = {"sees"}
"""Settings that are part of a label even if all rows agree in them: what a row was told that others may not be."""


def _labels(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """(method, settings) -> label: the method alone, with the settings that differ where it was run with several."""
    settings: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        settings[record.cell.method][_canonical(record.cell.settings)] = record.cell.settings
    labels: dict[tuple[str, str], str] = {}
    for method, variants in settings.items():
        names = {name for variant in variants.values() for name in variant}
        differing = {n for n in names if len({_canonical({n: v.get(n)}) for v in variants.values()}) > 1}
        differing |= names & _ALWAYS_SAID
        for key, variant in variants.items():
            shown = _setting_text({n: variant[n] for n in differing if n in variant})
            labels[method, key] = f"{method} ({shown})" if shown else method
    return labels


def budget_order(budget: str | None) -> tuple[int, float, str]:
    """Sort key of a budget: by its number, None last."""
    if budget is None:
        return (1, 0.0, "")
    number = re.match(r"[\d.]+", budget)
    try:
        return (0, float(number[0]) if number else 0.0, budget)
    except ValueError:
        return (0, 0.0, budget)


def _ratio(records: Sequence[Record], top: Callable[[Record], float | None], bottom: Callable[[Record], float | None]):
    pairs = [(a, b) for r in records if (a := top(r)) is not None and (b := bottom(r)) is not None and b > 0]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _crossover(records: Sequence[Record]) -> int | None:
    """The shortest measured length from which decode was faster than dense at every longer one too."""
    by_length: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_length[record.cell.length].append(record)
    found = None
    for length in sorted(by_length, reverse=True):
        ratio = _ratio(by_length[length], lambda r: r.decode_ms, lambda r: r.decode_dense_ms)
        if ratio is None or ratio >= 1:
            break
        found = length
    return found


def _sample_key(record: Record) -> tuple[int, str, int]:
    return (record.cell.length, record.cell.task, record.cell.seed)


def _versus(records: Sequence[Record], dense: dict[tuple[int, str, int], Record], higher: bool) -> Paired | None:
    mine: list[float] = []
    base: list[float] = []
    for record in records:
        partner = dense.get(_sample_key(record))
        if record.higher_is_better != higher or partner is None:
            continue
        left, right = read_sample_pairs(record), read_sample_pairs(partner)
        for index in sorted(left.keys() & right.keys()):
            mine.append(left[index])
            base.append(right[index])
    return paired(mine, base, higher_is_better=higher) if mine else None


def _scores(records: Iterable[Record], higher: bool) -> Interval | None:
    scores = [score for r in records if r.higher_is_better == higher for score in r.scores]
    return mean_interval(scores) if scores else None


@dataclass(frozen=True)
class _Scene:
    """What the rows of a view have in common."""

    expected: frozenset[tuple[int, str, int]]
    dense: dict[tuple[int, str, int], Record]
    dense_bytes: float | None
    dense_prefill_s: float | None
    dense_decode_ms: float | None


def _row(records: Sequence[Record], label: str, every_length: Sequence[Record], scene: _Scene) -> Row:
    cell = records[0].cell
    done = [r for r in records if r.status == "done"]
    refusals = [Refusal(r.cell.length, r.cell.task, r.refused or "", r.floor) for r in records if r.status == "refused"]
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in done:
        groups[task_group(record.cell.task)].append(record)
    is_dense = cell.method == DENSE
    kv_share = _ratio(done, lambda r: r.kv_bytes, lambda r: r.kv_bytes_dense)
    peak_share = _ratio(done, lambda r: r.kv_bytes_peak, lambda r: r.kv_bytes_dense)
    prefill = _ratio(done, lambda r: r.prefill_s, lambda r: r.prefill_dense_s)
    decode = _ratio(done, lambda r: r.decode_ms, lambda r: r.decode_dense_ms)

    def absolute(share: float | None, whole: float | None) -> float | None:
        return None if share is None or whole is None else share * whole

    return Row(
        model=cell.model,
        method=cell.method,
        settings=cell.settings,
        budget=cell.budget,
        question_seen=cell.question_seen,
        label=label,
        cells=len(scene.expected & {_sample_key(r) for r in done}),
        expected=len(scene.expected),
        lengths=tuple(sorted({r.cell.length for r in done})),
        score=_scores(done, True),
        loss=_scores(done, False),
        groups={
            name: mean_interval([score for r in members for score in r.scores])
            for name, members in sorted(groups.items())
            if len({r.higher_is_better for r in members}) == 1
        },
        loss_tasks=tuple(sorted({r.cell.task for r in done if not r.higher_is_better})),
        score_vs_dense=None if is_dense else _versus(done, scene.dense, True),
        loss_vs_dense=None if is_dense else _versus(done, scene.dense, False),
        kv_share=kv_share,
        kv_bytes=absolute(kv_share, scene.dense_bytes),
        peak_share=peak_share,
        peak_bytes=absolute(peak_share, scene.dense_bytes),
        pairs_read=_mean(r.pairs_read for r in done),
        pairs_prefill=_mean(r.pairs_prefill for r in done),
        evidence_held=_mean(outcome.get("evidence_held") for r in done for outcome in r.outcomes),
        evidence_read=_mean(outcome.get("evidence_read") for r in done for outcome in r.outcomes),
        prefill_ratio=prefill,
        prefill_s=absolute(prefill, scene.dense_prefill_s),
        decode_ratio=decode,
        decode_ms=absolute(decode, scene.dense_decode_ms),
        repeats=min((r.repeats for r in done), default=0),
        calibration_s=max((r.calibration_s for r in done if r.calibration_s is not None), default=None),
        faster_from=None if is_dense else _crossover([r for r in every_length if r.status == "done"]),
        refusals=tuple(sorted(refusals, key=lambda r: (r.length, r.task))),
    )


def _mark_fronts(rows: list[Row], quality: str) -> list[Row]:
    def marks(cost: Callable[[Row], float | None]) -> set[int]:
        points = []
        for i, row in enumerate(rows):
            value = row.score if quality == "score" else row.loss
            price = cost(row)
            if row.complete and value is not None and price is not None:
                points.append((i, price, value.estimate if quality == "score" else -value.estimate))
        if not points:
            return set()
        kept = pareto_front([p for _, p, _ in points], [q for _, _, q in points])
        return {i for (i, _, _), keep in zip(points, kept, strict=True) if keep}

    by_bytes, by_decode = marks(lambda r: r.kv_share), marks(lambda r: r.decode_ratio)
    return [replace(row, front_bytes=i in by_bytes, front_decode=i in by_decode) for i, row in enumerate(rows)]


def _with_shared_dense(records: Sequence[Record], model: str, question_seen: bool) -> list[Record]:
    """Records of one use. Dense holds everything, so its result is the same in both uses and fills in for either."""
    mine = [r for r in records if r.cell.model == model and r.cell.question_seen == question_seen]
    have = {_sample_key(r) for r in mine if r.cell.method == DENSE}
    for record in records:
        cell = record.cell
        other_use = cell.model == model and cell.method == DENSE and cell.question_seen != question_seen
        if other_use and _sample_key(record) not in have:
            mine.append(replace(record, cell=replace(cell, question_seen=question_seen)))
    return mine


def _view(records: Sequence[Record], model: str, question_seen: bool, length: int | None) -> View | None:
    mine = _with_shared_dense(records, model, question_seen)
    labels = _labels(records)
    here = [r for r in mine if length is None or r.cell.length == length]
    if not here:
        return None
    dense = {_sample_key(r): r for r in here if r.cell.method == DENSE and r.status == "done"}
    done = [r for r in here if r.status == "done"]
    baseline = {_sample_key(r): r for r in done} | dense
    scene = _Scene(
        expected=frozenset(dense or baseline),
        dense=dense,
        dense_bytes=_mean(r.kv_bytes_dense for r in baseline.values()),
        dense_prefill_s=_mean(r.prefill_dense_s for r in baseline.values()),
        dense_decode_ms=_mean(r.decode_dense_ms for r in baseline.values()),
    )
    parts: dict[tuple[str, str, str | None], list[Record]] = defaultdict(list)
    whole: dict[tuple[str, str, str | None], list[Record]] = defaultdict(list)
    for record in mine:
        whole[record.cell.method, _canonical(record.cell.settings), record.cell.budget].append(record)
    for record in here:
        parts[record.cell.method, _canonical(record.cell.settings), record.cell.budget].append(record)
    rows = [_row(part, labels[key[0], key[1]], whole[key], scene) for key, part in parts.items()]
    rows.sort(key=lambda row: (not row.dense, row.label, budget_order(row.budget)))
    quality = "score" if any(r.higher_is_better for r in done) or not done else "loss"
    return View(
        model=model,
        question_seen=question_seen,
        length=length,
        rows=tuple(_mark_fronts(rows, quality)),
        tasks=tuple(sorted({r.cell.task for r in here})),
        groups=tuple(sorted({name for row in rows for name in row.groups})),
        lengths=tuple(sorted({r.cell.length for r in here})),
        samples=sum(len(r.scores) for r in baseline.values()),
        dense_bytes=scene.dense_bytes,
        quality=quality,
    )


def uses(records: Sequence[Record]) -> list[tuple[str, bool]]:
    """The (model, question_seen) pairs of a run. A use in which only dense was run is not one."""
    found = sorted({(r.cell.model, r.cell.question_seen) for r in records}, key=lambda use: (use[0], not use[1]))
    busy = {(r.cell.model, r.cell.question_seen) for r in records if r.cell.method != DENSE}
    models_with_methods = {model for model, _ in busy}
    return [use for use in found if use in busy or use[0] not in models_with_methods]


def overall(records: Sequence[Record]) -> list[View]:
    """One view per use over all lengths."""
    views = (_view(records, model, seen, None) for model, seen in uses(records))
    return [view for view in views if view is not None]


def per_length(records: Sequence[Record], model: str, question_seen: bool) -> list[View]:
    """One view per context length of a use, shortest first."""
    lengths = sorted({r.cell.length for r in records if r.cell.model == model})
    views = (_view(records, model, question_seen, length) for length in lengths)
    return [view for view in views if view is not None]
