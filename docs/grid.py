"""The sweep: which of its records form the grid of methods × budgets × lengths × tasks, and which lie beside it.

A sweep's records also hold further tasks for a few methods, and needles with more samples for some compositions. The
grid are the tasks that at least half of the methods ran, with the seed that most of their records have; every other
record is looked at where it belongs, and never averaged with the grid.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from foveate.evaluate.record import DENSE, RECORDS, Record, read
from foveate.evaluate.statistics import Paired, pareto_front
from foveate.methods import METHODS
from foveate.report.naming import RowKey, row_key, row_labels
from foveate.report.rows import Row, View
from foveate.report.samples import key_of, of_use, sample_scores, spot
from foveate.report.significance import paired_many
from foveate.report.summary import per_length, uses
from foveate.tasks import family

BOUNDS = ("oracle", "random")
"""The best and the least that a choice of tokens can be: not methods, and never on a front."""

ABLE = 0.2
"""Mean score of dense below which a cell shows no loss: there is next to nothing to lose."""

SAVES = 0.995
"""A share above this is dense in all but rounding."""

K = TypeVar("K")

Pair = tuple[list[float], list[float]]
"""Scores of two rows on the samples that both have."""


@dataclass(frozen=True)
class Sweep:
    """The records of one model in one use, the question not seen where there is a choice."""

    records: tuple[Record, ...]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Sweep:
        model, seen = min(uses(records), key=lambda use: (use[1], use[0]))
        return cls(tuple(of_use(records, model, seen)))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the grid, scored ones first."""
        ran: dict[str, set[str]] = defaultdict(set)
        for record in self.records:
            ran[record.cell.task].add(record.cell.method)
        methods = {record.cell.method for record in self.records if "|" not in record.cell.method}
        found = [task for task, by in ran.items() if 2 * len(by & methods) >= len(methods)]
        return tuple(sorted(found, key=lambda task: (task in self.losses, found.index(task))))

    @cached_property
    def losses(self) -> frozenset[str]:
        """Tasks whose values are losses."""
        return frozenset(r.cell.task for r in self.records if r.status == "done" and not r.higher_is_better)

    @property
    def scored(self) -> tuple[str, ...]:
        """The tasks of the grid that have a score."""
        return tuple(task for task in self.tasks if task not in self.losses)

    @cached_property
    def grid(self) -> tuple[Record, ...]:
        """Records of the grid: rows that were asked for in at least half of its tasks at a length, and tasks that at
        least half of the methods of a length ran there."""
        here = [r for r in self.records if r.cell.task in self.tasks and "|" not in r.cell.method]
        ran: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for record in here:
            ran[record.cell.length][record.cell.task].add(record.cell.method)
        most = {length: max(len(by) for by in tasks.values()) for length, tasks in ran.items()}
        here = [
            r
            for r in self.records
            if 2 * len(ran[r.cell.length][r.cell.task]) >= most.get(r.cell.length, 1) and r.cell.task in self.tasks
        ]
        seeds = Counter(r.cell.seed for r in here)
        seed = max(seeds, key=lambda each: (seeds[each], -each))
        here = [r for r in here if r.cell.seed == seed]
        asked: dict[tuple[RowKey, int], set[str]] = defaultdict(set)
        for record in here:
            asked[row_key(record.cell), record.cell.length].add(record.cell.task)
        lengths = {r.cell.length for r in here if len(asked[row_key(r.cell), r.cell.length]) * 2 >= len(self.tasks)}
        rows = {key for (key, _), tasks in asked.items() if 2 * len(tasks) >= len(self.tasks)}
        return tuple(r for r in here if row_key(r.cell) in rows and r.cell.length in lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the grid."""
        return tuple(sorted({record.cell.length for record in self.grid}))

    @cached_property
    def labels(self) -> dict[tuple[str, str], str]:
        """(method, settings) -> how a row is named, the same in all tables."""
        return row_labels(self.records)

    @cached_property
    def views(self) -> tuple[View, ...]:
        """One view of the grid per length, shortest first; bounds are on no front."""
        first = self.grid[0].cell
        found = per_length(self.grid, first.model, first.question_seen)
        return tuple(fronts(replace(v, rows=tuple(self._named(row) for row in v.rows))) for v in found)

    def _named(self, row: Row) -> Row:
        return replace(row, label=self.labels[key_of(row)[:2]])

    @cached_property
    def hard(self) -> frozenset[tuple[int, str]]:
        """Length and task of the cells of the grid in which dense itself scores next to nothing."""
        dense = [r for r in self.grid if r.cell.method == DENSE and r.scores and r.higher_is_better]
        return frozenset((r.cell.length, r.cell.task) for r in dense if sum(r.scores) < ABLE * len(r.scores))

    @cached_property
    def dense(self) -> dict[tuple[int, str, int], Record]:
        """The finished records of dense by length, task and seed."""
        return {spot(r): r for r in self.records if r.cell.method == DENSE and r.status == "done"}

    def rows(self, keep: Callable[[Record], bool] = lambda record: True) -> dict[RowKey, list[Record]]:
        """Finished records of each row that are to be kept."""
        found: dict[RowKey, list[Record]] = defaultdict(list)
        for record in self.records:
            if record.status == "done" and keep(record):
                found[row_key(record.cell)].append(record)
        return dict(found)

    def name(self, key: RowKey) -> str:
        """A row in words."""
        label = self.labels[key[0], key[1]]
        return label if key[2] is None else f"{label} {key[2]}"


def fronts(view: View) -> View:
    """The view with fronts against bytes and pairs among whole rows that are no bounds."""
    own = [
        (i, row, value.estimate if view.quality == "score" else -value.estimate)
        for i, row in enumerate(view.rows)
        if row.complete and row.method not in BOUNDS and (value := view.of(row)) is not None
    ]

    def on(cost: Callable[[Row], float | None]) -> set[int]:
        known = [(i, price, good) for i, row, good in own if (price := cost(row)) is not None]
        kept = pareto_front([c for _, c, _ in known], [g for _, _, g in known]) if known else []
        return {i for (i, *_), keep in zip(known, kept, strict=True) if keep}

    by_bytes, by_pairs = on(lambda row: row.kv_share), on(lambda row: row.pairs_read)
    rows = (replace(r, front_bytes=i in by_bytes, front_pairs=i in by_pairs) for i, r in enumerate(view.rows))
    return replace(view, rows=tuple(rows))


def shared(mine: Iterable[Record], base: Iterable[Record]) -> Pair:
    """Scores of two rows on the samples that both have, in one order."""
    partners = {spot(record): record for record in base if record.status == "done"}
    left: list[float] = []
    right: list[float] = []
    for record in mine:
        partner = partners.get(spot(record))
        if record.status != "done" or partner is None:
            continue
        a, b = sample_scores(record), sample_scores(partner)
        for index in sorted(a.keys() & b.keys()):
            left.append(a[index])
            right.append(b[index])
    return left, right


def compared(pairs: dict[K, Pair], higher: bool = True) -> dict[K, Paired]:
    """The paired comparison of each pair that has samples."""
    known = {key: pair for key, pair in pairs.items() if pair[0]}
    return dict(zip(known, paired_many(list(known.values()), higher_is_better=higher), strict=True))


def held(records: Sequence[Record]) -> float | None:
    """Bytes held over the bytes of dense in the same cells."""
    whole = sum(record.kv_bytes_dense for record in records)
    return sum(record.kv_bytes for record in records) / whole if whole else None


def saves(record: Record) -> bool:
    """Whether a finished cell held, read or computed less than dense did."""
    shares = (record.kv_bytes / record.kv_bytes_dense, record.pairs_read, record.pairs_prefill)
    return any(share is not None and share < SAVES for share in shares)


def slots(method: str) -> str:
    """What a method or composition fills, in words."""
    found = [slot for part in method.split("|") if part in METHODS for slot in sorted(METHODS[part].slots)]
    return ", ".join(dict.fromkeys(found)) or "none"


def plain(text: str) -> str:
    """A text as it stands in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def needles(record: Record) -> bool:
    """Whether a record is of a task that hides needles."""
    return family(record.cell.task) == "needle"


_READ: dict[tuple[Path, int], list[Record]] = {}


def load(folder: Path) -> Sweep | None:
    """The sweep in a folder; None where there is none, or dense is missing from it."""
    file = folder / RECORDS
    if not file.is_file():
        return None
    stamp = (file, file.stat().st_mtime_ns)
    if stamp not in _READ:
        _READ[stamp] = read(folder)
    records = _READ[stamp]
    ran = {record.cell.method for record in records if record.status == "done"}
    return Sweep.of(records) if DENSE in ran and len(ran) > 1 else None


def benches(folder: Path) -> list[dict[str, Any]]:
    """What benches measured on a GPU, each file as it is."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    models = (bench for bench in found if "rows" in bench and bench.get("kind") != "kernels")
    return [bench for bench in models if "CPU" not in bench.get("device", "")]
