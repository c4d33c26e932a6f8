"""From records to rows: one row per method, setting and budget, with what it kept, held, read and took.

Rules that the whole report follows:

- a sample counts once, whatever its task or length: the quality of a row is the mean over its samples;
- accuracies and losses (`higher_is_better` False) are never averaged together: `score` and `loss`; the view of a family
  of tasks whose values are losses has the loss on its axis;
- costs are sums over the cells of a row divided by the sums of the dense cache over the *same* cells, so a row that
  lacks a length is not flattered; absolute numbers are that share of the dense mean of the view;
- a row that lacks cells which the dense baseline has is partial: it is shown, but is never on a front and never
  recommended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.statistics import Interval, Paired, mean_interval, pareto_front
from foveate.report.naming import RowKey, budget_order, row_key, row_labels
from foveate.report.rows import Refusal, Row, View
from foveate.report.samples import Spot, of_use, sample_scores, spot
from foveate.report.significance import paired_many
from foveate.tasks import family as family_of


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


def _pair(records: Sequence[Record], dense: dict[Spot, Record], higher: bool) -> tuple[list[float], list[float]]:
    """Scores of a row and of dense on the samples that both have."""
    mine: list[float] = []
    base: list[float] = []
    for record in records:
        partner = dense.get(spot(record))
        if record.higher_is_better != higher or partner is None:
            continue
        left, right = sample_scores(record), sample_scores(partner)
        for index in sorted(left.keys() & right.keys()):
            mine.append(left[index])
            base.append(right[index])
    return mine, base


def _versus(rows: dict[RowKey, list[Record]], dense: dict[Spot, Record], higher: bool) -> dict[RowKey, Paired]:
    """How each row differs from dense; rows without a shared sample, and dense, are absent."""
    pairs = {key: _pair(done, dense, higher) for key, done in rows.items() if key[0] != DENSE}
    known = {key: pair for key, pair in pairs.items() if pair[0]}
    return dict(zip(known, paired_many(list(known.values()), higher_is_better=higher), strict=True))


def _scores(records: Iterable[Record], higher: bool) -> Interval | None:
    scores = [score for r in records if r.higher_is_better == higher for score in r.scores]
    return mean_interval(scores) if scores else None


@dataclass(frozen=True)
class _Scene:
    """What the rows of a view have in common."""

    expected: frozenset[Spot]
    score_vs_dense: dict[RowKey, Paired]
    loss_vs_dense: dict[RowKey, Paired]
    dense_bytes: float | None
    dense_prefill_s: float | None
    dense_decode_ms: float | None


def _row(records: Sequence[Record], label: str, every_length: Sequence[Record], scene: _Scene) -> Row:
    cell = records[0].cell
    done = [r for r in records if r.status == "done"]
    refusals = [Refusal(r.cell.length, r.cell.task, r.refused or "", r.floor) for r in records if r.status == "refused"]
    families: dict[str, list[Record]] = defaultdict(list)
    for record in done:
        families[family_of(record.cell.task)].append(record)
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
        cells=len(scene.expected & {spot(r) for r in done}),
        expected=len(scene.expected),
        lengths=tuple(sorted({r.cell.length for r in done})),
        score=_scores(done, True),
        loss=_scores(done, False),
        families={
            name: mean_interval([score for r in members for score in r.scores])
            for name, members in sorted(families.items())
            if len({r.higher_is_better for r in members}) == 1
        },
        loss_tasks=tuple(sorted({r.cell.task for r in done if not r.higher_is_better})),
        score_vs_dense=scene.score_vs_dense.get(row_key(cell)),
        loss_vs_dense=scene.loss_vs_dense.get(row_key(cell)),
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
        faster_from=None if cell.method == DENSE else _crossover([r for r in every_length if r.status == "done"]),
        refusals=tuple(sorted(refusals, key=lambda r: (r.length, r.task))),
    )


_PRICES: tuple[Callable[[Row], float | None], ...] = (
    lambda row: row.kv_share,
    lambda row: row.decode_ratio,
    lambda row: row.pairs_read,
)
"""What fronts are drawn against."""


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

    by_bytes, by_decode, by_pairs = map(marks, _PRICES)
    return [
        replace(row, front_bytes=i in by_bytes, front_decode=i in by_decode, front_pairs=i in by_pairs)
        for i, row in enumerate(rows)
    ]


def _view(
    records: Sequence[Record], model: str, question_seen: bool, length: int | None = None, family: str | None = None
) -> View | None:
    mine = of_use(records, model, question_seen)
    labels = row_labels(records)
    here = [r for r in mine if length in (None, r.cell.length) and (family is None or family_of(r.cell.task) == family)]
    if not here:
        return None
    done = [r for r in here if r.status == "done"]
    dense = {spot(r): r for r in done if r.cell.method == DENSE}
    baseline = {spot(r): r for r in done} | dense
    parts: dict[RowKey, list[Record]] = defaultdict(list)
    whole: dict[RowKey, list[Record]] = defaultdict(list)
    for record in mine:
        if family is None or family_of(record.cell.task) == family:
            whole[row_key(record.cell)].append(record)
    for record in here:
        parts[row_key(record.cell)].append(record)
    finished = {key: [r for r in part if r.status == "done"] for key, part in parts.items()}
    scene = _Scene(
        expected=frozenset(dense or baseline),
        score_vs_dense=_versus(finished, dense, True),
        loss_vs_dense=_versus(finished, dense, False),
        dense_bytes=_mean(r.kv_bytes_dense for r in baseline.values()),
        dense_prefill_s=_mean(r.prefill_dense_s for r in baseline.values()),
        dense_decode_ms=_mean(r.decode_dense_ms for r in baseline.values()),
    )
    rows = [_row(part, labels[key[0], key[1]], whole[key], scene) for key, part in parts.items()]
    rows.sort(key=lambda row: (not row.dense, row.label, budget_order(row.budget)))
    quality = "score" if any(r.higher_is_better for r in done) or not done else "loss"
    return View(
        model=model,
        question_seen=question_seen,
        length=length,
        family=family,
        rows=tuple(_mark_fronts(rows, quality)),
        tasks=tuple(sorted({r.cell.task for r in here})),
        families=tuple(sorted({name for row in rows for name in row.families})),
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
    """One view per use over all lengths and tasks."""
    views = (_view(records, model, seen) for model, seen in uses(records))
    return [view for view in views if view is not None]


def per_length(records: Sequence[Record], model: str, question_seen: bool) -> list[View]:
    """One view per context length of a use, shortest first."""
    lengths = sorted({r.cell.length for r in records if r.cell.model == model})
    views = (_view(records, model, question_seen, length=length) for length in lengths)
    return [view for view in views if view is not None]


def per_family(records: Sequence[Record], model: str, question_seen: bool) -> list[View]:
    """One view per family of tasks of a use, over all lengths, by name."""
    done = (r for r in records if r.cell.model == model and r.status == "done")
    families = sorted({family_of(r.cell.task) for r in done})
    views = (_view(records, model, question_seen, family=family) for family in families)
    return [view for view in views if view is not None]
