"""The table of several questions about one context in docs/*.md, from a folder of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from foveate.evaluate.record import DENSE, Record
from foveate.report import quantities as q
from foveate.report.naming import row_key


def turns_part(records: Sequence[Record]) -> str:
    """A table per task: the share of right answers by turn, and of the evidence that is held when each turn begins."""
    asked = [r for r in records if r.outcomes and r.outcomes[0].get("turns")]
    lines: list[str] = []
    for task in dict.fromkeys(record.cell.task for record in asked):
        mine = [record for record in asked if record.cell.task == task]
        lines += [*_table(task, mine), ""]
    if asked:
        last = asked[-1]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(last.versions.items()))
        lines += [f"{last.cell.model}; {last.device}; {versions}. `{last.command}`", ""]
    return "\n".join(lines)


def _table(task: str, records: Sequence[Record]) -> Iterator[str]:
    turns = len(records[0].outcomes[0]["turns"])
    samples = max(len(record.outcomes) for record in records)
    yield f"### {task}, {records[0].cell.length:,} tokens, {samples} contexts"
    yield ""
    titles = [f"turn {turn + 1}" for turn in range(turns)]
    yield f"| method | budget | first question | KV held | {' | '.join(titles)} | evidence held |"
    yield f"|---|--:|---|--:|{'--:|' * turns}---|"
    for record in sorted(records, key=_order):
        right = [fmean(outcome["turns"][turn] for outcome in record.outcomes) for turn in range(turns)]
        held = [_mean(outcome["turns_held"][turn] for outcome in record.outcomes) for turn in range(turns)]
        share = record.kv_bytes / record.kv_bytes_dense if record.kv_bytes and record.kv_bytes_dense else None
        name, _, budget = row_key(record.cell)[:3]
        cells = [name, budget or q.MISSING, "seen" if record.cell.question_seen else "unseen", q.percent(share)]
        shown = " / ".join(q.percent(value) for value in held)
        yield f"| {' | '.join([*cells, *(f'{value:.2f}' for value in right), shown])} |"


def _order(record: Record) -> tuple[bool, str, str, bool]:
    cell = record.cell
    return cell.method != DENSE, cell.method, cell.budget or "", cell.question_seen


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
