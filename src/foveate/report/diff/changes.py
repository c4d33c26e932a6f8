"""What changed from one run to another: cell by cell, and row by row over all its cells."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from foveate.evaluate.record import Record
from foveate.evaluate.statistics import LEVEL, Interval, holm
from foveate.report.diff.runs import Fact, Run, facts, open_run, same_corpus
from foveate.report.diff.unpaired import smallest_p, unpaired
from foveate.report.naming import budget_order, canonical, row_labels
from foveate.report.samples import sample_scores
from foveate.report.significance import mean_intervals, paired_many
from foveate.tasks import family

COSTS = ("kv_bytes", "kv_bytes_peak", "prefill_s", "decode_ms")
"""What is compared as a ratio."""

SAME_BYTES = 0.002
"""Two sizes whose ratio is this near to 1 are called the same."""


class Place(NamedTuple):
    """A cell of both runs; seeds are not part of it. `model` is empty where each run has one of its own."""

    model: str
    method: str
    settings: str
    budget: str | None
    question_seen: bool
    length: int
    task: str


@dataclass(frozen=True)
class Ratio:
    """A cost in both runs; absent (None) where it was not measured in both."""

    a: float
    b: float

    @property
    def ratio(self) -> float:
        return self.b / self.a


@dataclass(frozen=True)
class Change:
    """One cell, or all cells of a row with the same unit (then `length` is None and `task` empty).

    `difference` is b - a in the unit of the score, `low` and `high` its 95% interval, `p` is two-sided and `corrected`
    by Holm for all changes listed beside it. `paired`: tested sample by sample on the `n` samples that are the same in
    both runs; else between `n` samples of a and `n_b` of b.
    """

    label: str
    budget: str | None
    question_seen: bool
    length: int | None
    task: str
    family: str
    higher_is_better: bool
    a: Interval
    b: Interval
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    n: int
    n_b: int
    paired: bool
    identical: bool
    kv_bytes: Ratio | None
    kv_bytes_peak: Ratio | None
    prefill_s: Ratio | None
    decode_ms: Ratio | None
    cells: int = 1

    @property
    def name(self) -> str:
        return self.label if self.budget is None else f"{self.label} {self.budget}"

    @property
    def significant(self) -> bool:
        return self.corrected < 1 - LEVEL

    @property
    def better(self) -> bool:
        return self.significant and (self.difference > 0) == self.higher_is_better

    @property
    def worse(self) -> bool:
        return self.significant and not self.better

    @property
    def word(self) -> str:
        """The verdict."""
        if self.significant:
            return "better" if self.better else "worse"
        return "identical" if self.identical else "noise"

    @property
    def smallest_p(self) -> float:
        """The smallest p that so many samples can have."""
        return 2.0 ** (1 - self.n) if self.paired else smallest_p(self.n, self.n_b)


@dataclass(frozen=True)
class Lone:
    """A cell that is in one run only, or that one of them refused: `a` and `b` say what each has of it."""

    label: str
    budget: str | None
    question_seen: bool
    length: int
    task: str
    a: str
    b: str

    @property
    def name(self) -> str:
        return self.label if self.budget is None else f"{self.label} {self.budget}"


@dataclass(frozen=True)
class Difference:
    """Everything that differs between run `a` and run `b`."""

    a: Run
    b: Run
    facts: tuple[Fact, ...]
    rows: tuple[Change, ...]
    cells: tuple[Change, ...]
    only_a: tuple[Lone, ...]
    only_b: tuple[Lone, ...]
    refusals: tuple[Lone, ...]

    @property
    def changed(self) -> tuple[Change, ...]:
        """Cells that changed beyond noise."""
        return tuple(cell for cell in self.cells if cell.significant)

    @property
    def same_machine(self) -> bool:
        """Whether times of the two runs can be compared."""
        return not any(fact.name in ("machine", "device", "dtype") for fact in self.facts)


@dataclass(frozen=True)
class _Pair:
    """Scores of one or more cells of both runs, ready to test."""

    place: Place
    label: str
    higher: bool
    records: tuple[tuple[Record, ...], tuple[Record, ...]]
    scores: tuple[list[float], list[float]]
    paired: bool
    cells: int = 1


def diff(a: str | os.PathLike[str] | Run, b: str | os.PathLike[str] | Run) -> Difference:
    """Compare two runs.

    Args:
        a, b: run folders, files of records, or runs.

    Raises:
        BadArgument: a folder without records.
    """
    one, two = (run if isinstance(run, Run) else open_run(run) for run in (a, b))
    across = len(one.models) == len(two.models) == 1
    first, second = (_places(run.records, across) for run in (one, two))
    labels = row_labels([*one.records, *two.records])
    same = same_corpus(one, two)
    same_model = one.models == two.models
    pairs, refusals = [], []
    for place in sorted(first.keys() & second.keys(), key=lambda p: _order(p, labels)):
        done = tuple(tuple(r for r in side[place] if r.status == "done") for side in (first, second))
        if done[0] and done[1]:
            units = [{r.higher_is_better for r in side} for side in done]
            if units[0] == units[1] and len(units[0]) == 1:
                scores, is_paired = _scores(done[0], done[1], same, same_model)
                label = labels[place.method, place.settings]
                pairs.append(_Pair(place, label, units[0].pop(), (done[0], done[1]), scores, is_paired))
        elif done[0] or done[1]:
            refusals.append(_lone(place, labels, first[place], second[place]))
    return Difference(
        one,
        two,
        tuple(facts(one, two)),
        tuple(_tested(_rows(pairs))),
        tuple(_tested(pairs)),
        tuple(_lone(p, labels, first[p], ()) for p in sorted(first.keys() - second, key=lambda p: _order(p, labels))),
        tuple(_lone(p, labels, (), second[p]) for p in sorted(second.keys() - first, key=lambda p: _order(p, labels))),
        tuple(refusals),
    )


def _places(records: Sequence[Record], across: bool) -> dict[Place, list[Record]]:
    found: dict[Place, list[Record]] = defaultdict(list)
    for record in records:
        c = record.cell
        model = "" if across else c.model
        place = Place(model, c.method, canonical(c.settings), c.budget, c.question_seen, c.length, c.task)
        found[place].append(record)
    return dict(found)


def _order(place: Place, labels: dict[tuple[str, str], str]) -> tuple[object, ...]:
    label = labels[place.method, place.settings]
    return (
        place.method != "dense",
        label,
        place.model,
        place.question_seen,
        budget_order(place.budget),
        place.length,
        place.task,
    )


def _lone(place: Place, labels: dict[tuple[str, str], str], a: Sequence[Record], b: Sequence[Record]) -> Lone:
    def said(side: Sequence[Record]) -> str:
        if not side:
            return ""
        refused = next((r.refused for r in side if r.status != "done"), None)
        return f"refused: {refused}" if refused else "run"

    label = labels[place.method, place.settings]
    return Lone(label, place.budget, place.question_seen, place.length, place.task, said(a), said(b))


def _scores(
    a: Iterable[Record], b: Iterable[Record], same: bool | None, same_model: bool
) -> tuple[tuple[list[float], list[float]], bool]:
    """Scores of both sides, and whether they are sample by sample: the same seed, index and references, in texts that
    are not known to differ. Without references (a scored text) the corpus must be known to be the same."""
    sides = [_samples(a), _samples(b)]
    shared = []
    if same is not False:
        for key in sorted(sides[0].keys() & sides[1].keys()):
            asked, other = sides[0][key][1], sides[1][key][1]
            known = bool(asked[0]) or (same is True and same_model)
            if asked == other and known:
                shared.append(key)
    if shared:
        return ([sides[0][key][0] for key in shared], [sides[1][key][0] for key in shared]), True
    return ([score for score, _ in sides[0].values()], [score for score, _ in sides[1].values()]), False


def _samples(records: Iterable[Record]) -> dict[tuple[int, int], tuple[float, tuple[object, ...]]]:
    """(seed, index) -> (score, what was asked)."""
    found = {}
    for record in records:
        asked = {
            int(o.get("index", i)): (o.get("references") or [], o.get("depths") or [])
            for i, o in enumerate(record.outcomes)
        }
        for index, score in sample_scores(record).items():
            found[record.cell.seed, index] = (score, asked[index])
    return found


def _rows(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Pairs of all cells of a row that have the same unit; paired where all of them are."""
    groups: dict[tuple[object, ...], list[_Pair]] = defaultdict(list)
    for pair in pairs:
        groups[(*pair.place[:5], pair.higher)].append(pair)
    pooled = []
    for members in groups.values():
        scores = tuple([score for pair in members for score in pair.scores[side]] for side in (0, 1))
        records = tuple(tuple(r for pair in members for r in pair.records[side]) for side in (0, 1))
        pooled.append(
            replace(
                members[0],
                place=members[0].place._replace(length=0, task=""),
                scores=(scores[0], scores[1]),
                records=(records[0], records[1]),
                paired=all(pair.paired for pair in members),
                cells=len(members),
            )
        )
    return pooled


def _tested(pairs: Sequence[_Pair]) -> list[Change]:
    """The pairs with intervals and p values, corrected for all of them."""
    means = mean_intervals([scores for pair in pairs for scores in pair.scores])
    wanted = [i for i, pair in enumerate(pairs) if pair.paired]
    tests = dict(zip(wanted, paired_many([(pairs[i].scores[1], pairs[i].scores[0]) for i in wanted]), strict=True))
    found = []
    for i, pair in enumerate(pairs):
        a, b = means[2 * i], means[2 * i + 1]
        low, high, p = (tests[i].low, tests[i].high, tests[i].p) if i in tests else unpaired(*pair.scores)
        difference = tests[i].difference if i in tests else b.estimate - a.estimate
        place = pair.place
        tasks = {record.cell.task for side in pair.records for record in side}
        families = sorted({family(task) for task in tasks})
        found.append(
            Change(
                label=pair.label,
                budget=place.budget,
                question_seen=place.question_seen,
                length=place.length or None,
                task=place.task,
                family=", ".join(families),
                higher_is_better=pair.higher,
                a=a,
                b=b,
                difference=difference,
                low=low,
                high=high,
                p=p,
                corrected=1.0,
                n=len(pair.scores[0]),
                n_b=len(pair.scores[1]),
                paired=pair.paired,
                identical=pair.paired and pair.scores[0] == pair.scores[1],
                cells=pair.cells,
                **{
                    name: _ratio(pair.records, name) for name in ("kv_bytes", "kv_bytes_peak", "prefill_s", "decode_ms")
                },
            )
        )
    corrected = holm([change.p for change in found])
    return [replace(change, corrected=p) for change, p in zip(found, corrected, strict=True)]


def _ratio(records: tuple[tuple[Record, ...], tuple[Record, ...]], name: str) -> Ratio | None:
    """Mean cost per record in both runs, where every record has it."""
    sides = [[getattr(record, name) for record in side] for side in records]
    if any(value is None for side in sides for value in side):
        return None
    a, b = (sum(side) / len(side) for side in sides)
    return Ratio(a, b) if a > 0 else None
