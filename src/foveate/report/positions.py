"""Position curves: the score by the depth of what is asked for, and perplexity by where in a text it is measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from foveate.evaluate.record import Record
from foveate.evaluate.statistics import Interval, mean_interval
from foveate.report.curves import Curve, Curves, Point
from foveate.report.naming import RowKey
from foveate.report.rows import View
from foveate.report.samples import done_by_row, key_of
from foveate.tasks import TASKS, family
from foveate.tasks.perplexity import Perplexity

_MOST_PLACES = 11  # more distinct depths than this are put into bins
_MOST_BINS = 10
_PER_BIN = 5  # samples that a bin should have


def depth_curves(records: Sequence[Record], view: View) -> Curves | None:
    """Mean score by depth of every row of a view; None where no sample has a depth.

    Depths are bins of equal width, as many as the samples of a row can fill, or the depths themselves where a run has
    few. A sample counts once in each bin that one of its needles lies in.
    """
    found = {key: [s for r in done for s in _pieces(r)] for key, done in done_by_row(records, view).items()}
    depths = {depth for samples in found.values() for sample in samples for depth, _ in sample}
    if not depths:
        return None
    fullest = max(len(samples) for samples in found.values())
    bins = 0 if len(depths) <= _MOST_PLACES else max(2, min(_MOST_BINS, fullest // _PER_BIN))
    curves = []
    for row in view.rows:
        places: dict[float, list[float]] = defaultdict(list)
        for sample in found.get(key_of(row), []):
            here: dict[float, list[float]] = defaultdict(list)
            for depth, score in sample:
                here[_centre(depth, bins)].append(score)
            for place, scores in here.items():
                places[place].append(fmean(scores))
        if places:
            points = (Point(p, f"{p:.0%}", _depth(p, bins), mean_interval(places[p])) for p in sorted(places))
            curves.append(Curve(row, tuple(points)))
    return Curves("", "depth in the context", "score", tuple(curves))


def _pieces(record: Record) -> list[list[tuple[float, float]]]:
    """(depth, score) of the needles of each sample of a scored record.

    A sample with one depth has its score there. Of a task of needles that hides several, each is found or not: it
    counts where the share found is the score, so that nothing is guessed about how the task scores.
    """
    if not record.higher_is_better:
        return []
    found = []
    for outcome, score in zip(record.outcomes, record.scores, strict=True):
        depths = [float(depth) for depth in outcome.get("depths") or []]
        references, said = outcome.get("references") or [], outcome.get("prediction")
        if len(depths) == 1:
            found.append([(depths[0], score)])
        elif depths and family(record.cell.task) == "needle" and len(references) == len(depths) and said is not None:
            hits = [float(str(reference).lower() in str(said).lower()) for reference in references]
            if math.isclose(fmean(hits), score, abs_tol=1e-6):
                found.append(list(zip(depths, hits, strict=True)))
    return found


def _centre(depth: float, bins: int) -> float:
    """The middle of the bin of a depth; without bins the depth."""
    return (min(bins - 1, int(depth * bins + 1e-9)) + 0.5) / bins if bins else depth


def _depth(place: float, bins: int) -> str:
    if not bins:
        return f"depth {place:.0%}"
    half = 0.5 / bins
    return f"depth {place - half:.0%} to {place + half:.0%}"


def perplexity_curves(records: Sequence[Record], view: View) -> list[Curves]:
    """Perplexity by position of every row of a view, a set of curves per length; empty where none was measured by
    position. The mean over passages is that of log-likelihoods, and so are its intervals."""
    found: dict[int, dict[RowKey, dict[float, list[float]]]] = defaultdict(dict)
    for key, done in done_by_row(records, view).items():
        for record in done:
            task = TASKS.get(record.cell.task)
            if not isinstance(task, Perplexity) or task.buckets < 2:
                continue
            places = found[record.cell.length].setdefault(key, defaultdict(list))
            for i, (outcome, score) in enumerate(zip(record.outcomes, record.scores, strict=True)):
                places[task.position(int(outcome.get("index", i))) * record.cell.length].append(score)
    sets = []
    for length in sorted(found):
        curves = []
        for row in view.rows:
            places = found[length].get(key_of(row), {})
            points = (
                Point(p, f"{round(p):,}", f"up to token {round(p):,}", _exp(mean_interval(places[p])))
                for p in sorted(places)
            )
            if places:
                curves.append(Curve(row, tuple(points)))
        sets.append(Curves(f"{length:,} tokens", "tokens read", "perplexity", tuple(curves)))
    return sets


def _exp(value: Interval) -> Interval:
    return Interval(math.exp(value.estimate), math.exp(value.low), math.exp(value.high), value.n, value.level)
