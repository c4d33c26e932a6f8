"""Where a method stands beside the two bounds: above the oracle, or below a random choice, at the same budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.statistics import LEVEL, Paired, holm, p_text
from foveate.report import quantities as q
from foveate.report.naming import RowKey, row_key
from grid import BOUNDS, Pair, Sweep, compared, plain, shared, slots


@dataclass(frozen=True)
class Case:
    """A row against a bound at one length, over all scored tasks (`task` empty) or on one."""

    key: RowKey
    bound: str
    length: int
    task: str
    result: Paired
    p: float
    """Corrected for all comparisons of its kind, listed or not."""

    @property
    def unexpected(self) -> bool:
        """Whether the row beats the oracle or loses to a random choice, significantly or not."""
        return self.result.difference > 0 if self.bound == BOUNDS[0] else self.result.difference < 0

    @property
    def significant(self) -> bool:
        return self.p < 1 - LEVEL


def cases(sweep: Sweep, tasks: Sequence[str]) -> list[Case]:
    """Every row against both bounds of its budget, at every length of the grid, over these tasks together."""
    rows: dict[tuple[RowKey, int], list[Record]] = {}
    for record in sweep.grid:
        if record.status == "done" and record.cell.task in tasks:
            rows.setdefault((row_key(record.cell), record.cell.length), []).append(record)
    limits = {(key[0], key[2], n): records for (key, n), records in rows.items() if key[0] in BOUNDS}
    pairs: dict[tuple[RowKey, str, int], Pair] = {}
    for (key, length), records in rows.items():
        if key[0] in (*BOUNDS, DENSE) or key[2] is None:
            continue
        for bound in BOUNDS:
            if (bound, key[2], length) in limits:
                pairs[key, bound, length] = shared(records, limits[bound, key[2], length])
    results = compared(pairs, higher=not set(tasks) & sweep.losses)
    corrected = holm([result.p for result in results.values()])
    task = tasks[0] if len(tasks) == 1 else ""
    return [
        Case(key, bound, length, task, result, p)
        for ((key, bound, length), result), p in zip(results.items(), corrected, strict=True)
    ]


def bounds(sweep: Sweep) -> Iterator[str]:
    """The section of the page; nothing where the sweep has no bounds."""
    if not any(record.cell.method in BOUNDS and record.status == "done" for record in sweep.grid):
        return
    overall = cases(sweep, sweep.scored)
    yield "## The bounds"
    yield ""
    yield (
        "The oracle reads, in every layer and step, the keys that the softmax weighs most; random reads any. Both "
        "choose what a new token reads and hold everything. A method that reads lists should lie between them at the "
        "same budget. One that drops tokens is bounded by the oracle in what it reads, but its budget is of bytes; "
        "one that packs tokens reads all of them and is bounded by neither. Listed is every case outside, significant "
        "or not; "
        f"p is corrected for all {len(overall)} comparisons of the table (Holm)."
    )
    yield ""
    yield from table(sweep, [case for case in overall if case.unexpected])
    single = [case for task in sweep.tasks for case in cases(sweep, [task])]
    yield from by_task(sweep, single)


def table(sweep: Sweep, found: list[Case]) -> Iterator[str]:
    if not found:
        yield "Over all scored tasks together no row lies outside."
        yield ""
        return
    yield "| method | slot | tokens | outside | difference (95 %) | n | p | significant |"
    yield "|---|---|--:|---|--:|--:|--:|---|"
    for case in sorted(found, key=lambda c: (c.bound, -abs(c.result.difference))):
        result = case.result
        yield "".join(
            [
                f"| {plain(sweep.name(case.key))} | {slots(case.key[0])} | {case.length:,} ",
                f"| {'above the oracle' if case.bound == BOUNDS[0] else 'below random'} ",
                f"| {q.signed(result.difference)} ({q.signed(result.low)} to {q.signed(result.high)}) ",
                f"| {result.n} | {p_text(case.p)} | {'yes' if case.significant else 'no'} |",
            ]
        )
    yield ""


def by_task(sweep: Sweep, single: list[Case]) -> Iterator[str]:
    """The same on single tasks, one line per row and bound."""
    yield "### On single tasks"
    yield ""
    yield (
        "A cell has few samples, so most of these are within noise; bold: significant after correction for all cells "
        "of the task. Differences are of scores, for perplexity of nats, and positive is better."
    )
    yield ""
    for bound, title in zip(BOUNDS, ("Above the oracle", "Below random"), strict=True):
        lines: dict[RowKey, list[str]] = {}
        for case in sorted(single, key=lambda c: (sweep.name(c.key), c.length)):
            if case.bound == bound and case.unexpected:
                text = f"{case.task} at {case.length:,} {q.signed(case.result.difference)}"
                lines.setdefault(case.key, []).append(f"**{text}**" if case.significant else text)
        count = sum(map(len, lines.values()))
        of = sum(case.bound == bound for case in single)
        yield f"{title}: {count} of {of:,} cells."
        yield ""
        for key, texts in lines.items():
            yield f"- {plain(sweep.name(key))}: {', '.join(texts)}."
        if lines:
            yield ""
