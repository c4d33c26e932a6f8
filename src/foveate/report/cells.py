"""Every cell of a view as one line of a table that can be filtered: nothing averaged but the samples of the cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.statistics import Interval, Paired
from foveate.report import quantities as q
from foveate.report.cards import MethodCard
from foveate.report.naming import budget_order, row_key
from foveate.report.rows import Row, View
from foveate.report.samples import Spot, key_of, of_use, sample_scores, spot
from foveate.report.series import Mark
from foveate.report.significance import mean_intervals, paired_many
from foveate.tasks import family

PICKS = ("method", "slot", "budget", "family", "task", "length")
"""What the table can be filtered by, besides text."""


@dataclass(frozen=True)
class Line:
    """One cell: its row, its record, and what its samples show. Evidence is the mean over samples that have any."""

    row: Row
    record: Record
    slots: tuple[str, ...]
    family: str
    quality: Interval | None
    difference: Paired | None
    held: float | None
    read: float | None

    def pick(self, name: str) -> tuple[str, ...]:
        """What the line is found by under one of `PICKS`."""
        cell = self.record.cell
        return {
            "method": (self.row.label,),
            "slot": self.slots,
            "budget": (cell.budget or q.MISSING,),
            "family": (self.family,),
            "task": (cell.task,),
            "length": (str(cell.length),),
        }[name]


def cell_lines(records: Sequence[Record], view: View, cards: Sequence[MethodCard] = ()) -> list[Line]:
    """The lines of a view by length and task, and in each the rows in their order, so that neighbours compare."""
    slots = {name: card.slots for card in cards for name in (card.name, card.id)}
    rows = {key_of(row): (i, row) for i, row in enumerate(view.rows)}
    found = [r for r in of_use(records, view.model, view.question_seen) if row_key(r.cell) in rows]
    found.sort(key=lambda r: (*spot(r), rows[row_key(r.cell)][0]))
    differences = _differences(found)
    done = [record for record in found if record.scores]
    qualities = dict(zip(map(id, done), mean_intervals([record.scores for record in done]), strict=True))
    lines = []
    for record in found:
        _, row = rows[row_key(record.cell)]
        method = record.cell.method
        parts = [method] if method in slots else [part.strip() for part in method.split("|")]
        lines.append(
            Line(
                row=row,
                record=record,
                slots=tuple(dict.fromkeys(slot for part in parts for slot in slots.get(part, ()))),
                family=family(record.cell.task),
                quality=qualities.get(id(record)),
                difference=differences.get(id(record)),
                held=_mean(outcome.get("evidence_held") for outcome in record.outcomes),
                read=_mean(outcome.get("evidence_read") for outcome in record.outcomes),
            )
        )
    return lines


def _differences(records: Sequence[Record]) -> dict[int, Paired]:
    """How each finished record differs from dense on the same samples, by the record's id."""
    dense: dict[Spot, Record] = {spot(r): r for r in records if r.cell.method == DENSE and r.status == "done"}
    found: dict[int, Paired] = {}
    for higher in (True, False):
        pairs = {}
        for record in records:
            base = dense.get(spot(record))
            if record.status != "done" or record.cell.method == DENSE or base is None:
                continue
            if record.higher_is_better != higher or base.higher_is_better != higher:
                continue
            mine, theirs = sample_scores(record), sample_scores(base)
            both = sorted(mine.keys() & theirs.keys())
            if both:
                pairs[id(record)] = [mine[i] for i in both], [theirs[i] for i in both]
        found |= dict(zip(pairs, paired_many(list(pairs.values()), higher_is_better=higher), strict=True))
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def choices(lines: Sequence[Line]) -> dict[str, list[tuple[str, str]]]:
    """(value, words) of every filter that has something to choose, in the order in which a reader looks for it."""
    orders = {
        "budget": lambda value: budget_order(None if value == q.MISSING else value),
        "length": lambda value: (0, float(value), ""),
    }
    found = {}
    for name in PICKS:
        values = {value for line in lines for value in line.pick(name)}
        if len(values) > 1:
            order = sorted(values, key=orders.get(name, lambda value: (0, 0.0, value)))
            found[name] = [(v, f"{int(v):,}" if name == "length" else v) for v in order]
    return found


def heads(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """(heading, CSS class) of the columns."""
    names = [("Method", ""), ("Budget", "left"), ("Task", "left"), ("Length", ""), ("Quality", ""), ("vs dense", "")]
    names += [(name, "") for name in ("n", "KV held", "Peak", "Prefill", "Decode", "Pairs")]
    return names + ([("Evidence", "")] if _evidence(lines) else [])


def _evidence(lines: Sequence[Line]) -> bool:
    return any(line.held is not None for line in lines)


def body(lines: Sequence[Line], marks: Mapping[str, Mark]) -> Markup:
    """The rows of the table as HTML."""
    evidence = _evidence(lines)
    return Markup("\n".join(_line(line, marks[line.row.label], evidence) for line in lines))


def _td(sort: float | str | None, text: str, sub: str = "", css: str = "") -> str:
    """A cell: what it is sorted by, what it says, and a second line."""
    key = "" if sort is None else sort if isinstance(sort, str) else repr(float(sort))
    kind = f' class="{css}"' if css else ""
    below = f'<span class="sub">{escape(sub)}</span>' if sub else ""
    return f'<td{kind} data-sort="{escape(key)}">{escape(text)}{below}</td>'


def _line(line: Line, mark: Mark, evidence: bool) -> str:
    record, cell = line.record, line.record.cell
    picks = "".join(f' data-{name}="{escape(chr(10).join(line.pick(name)))}"' for name in PICKS)
    text = " ".join([line.row.name, *line.slots, line.family, cell.task, str(cell.length), record.refused or ""])
    css = "dense" if line.row.dense else "refused" if record.status == "refused" else ""
    start = f'<tr class="{css}" data-text="{escape(text)}"{picks}>'
    who = f'<span class="who">{mark.icon()}<span>{escape(line.row.label)}</span></span>'
    slots = f'<span class="sub">{escape(", ".join(line.slots))}</span>' if line.slots else ""
    parts = [
        f'{start}<td data-sort="{escape(line.row.label)}">{who}{slots}</td>',
        _td(cell.budget or "", cell.budget or q.MISSING, css="left"),
        _td(cell.task, cell.task, line.family, css="left"),
        _td(cell.length, f"{cell.length:,}"),
    ]
    if record.status == "refused":
        reason = f"not below {record.floor:.2g}" if record.floor is not None else record.refused or "refused"
        return "".join(
            [*parts, f'<td class="left reason" colspan="{8 + evidence}" data-sort="">{escape(reason)}</td></tr>']
        )
    quality, difference = line.quality, line.difference
    sign = 1 if record.higher_is_better else -1
    ends = sorted((sign * difference.low, sign * difference.high)) if difference else []
    held_share = record.kv_bytes / record.kv_bytes_dense
    peak = record.kv_bytes_peak
    peak_share = None if peak is None else peak / record.kv_bytes_dense
    seen = "" if line.read is None else f"{q.percent(line.read)} read"
    parts += [
        _td(quality.estimate if quality else None, q.quality(quality), q.spread(quality)),
        _td(
            sign * difference.difference if difference else None,
            "baseline" if line.row.dense else q.signed(sign * difference.difference) if difference else q.MISSING,
            f"{q.signed(ends[0])} to {q.signed(ends[1])}" if ends else "",
        ),
        _td(len(record.scores), str(len(record.scores))),
        _td(held_share, q.percent(held_share), q.bytes_text(record.kv_bytes)),
        _td(peak_share, q.percent(peak_share), "" if peak is None else q.bytes_text(peak)),
        _time(record.prefill_s, record.prefill_dense_s, q.seconds(record.prefill_s)),
        _time(record.decode_ms, record.decode_dense_ms, q.milliseconds(record.decode_ms)),
        _td(record.pairs_read, q.percent(record.pairs_read)),
    ]
    if evidence:
        parts.append(_td(line.held, q.percent(line.held), seen))
    return "".join([*parts, "</tr>"])


def _time(value: float | None, dense: float | None, text: str) -> str:
    ratio = value / dense if value is not None and dense else None
    return _td(ratio, q.times(ratio) if ratio is not None else text, text if ratio is not None else "")
