"""The comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from foveate.evaluate.record import Record
from foveate.evaluate.statistics import Interval
from foveate.report.quantities import (
    MISSING,
    bytes_text,
    milliseconds,
    percent,
    quality,
    seconds,
    signed,
    spread,
    times,
)
from foveate.report.recommend import recommend_view
from foveate.report.rows import Row, View
from foveate.report.summary import overall


@dataclass(frozen=True)
class _Column:
    name: str
    cell: Callable[[Row], RenderableType]
    justify: Literal["left", "right"] = "right"


def _held(share: float | None, size: float | None) -> str:
    return MISSING if share is None else f"{percent(share)}\n{bytes_text(size)}"


def _kv(row: Row) -> str:
    if not row.cells and row.refusals:
        return row.refusals[0].short
    return _held(row.kv_share, row.kv_bytes)


def _quality(value: Interval | None) -> str:
    return MISSING if value is None else f"{quality(value)}\n{spread(value)}"


def _cost(ratio: float | None, absolute: str) -> str:
    return MISSING if ratio is None else f"{times(ratio)}\n{absolute}" if absolute else times(ratio)


def _evidence(row: Row) -> str:
    """Share of the evidence that was held, and of what the answer's first step read of it."""
    read = "" if row.evidence_read is None else f"\n{percent(row.evidence_read)} read"
    return MISSING if row.evidence_held is None else f"{percent(row.evidence_held)}{read}"


def _method(row: Row) -> Text:
    text = Text(row.label, style="bold" if row.dense else "")
    marks = ("●" if row.front_bytes else "") + ("▲" if row.front_decode else "")
    if marks:
        text.append(f" {marks}", style="green")
    if row.cells and not row.complete:
        text.append(f"\n{row.cells} of {row.expected} cells", style="yellow")
    return text


def _verdict(view: View, row: Row) -> Text:
    result = view.versus_dense(row)
    if row.dense or result is None:
        return Text("baseline" if row.dense else MISSING, style="dim")
    difference = signed(result.difference if view.quality == "score" else -result.difference)
    if result.loss:
        return Text(f"loss\n{difference}", style="red")
    if not result.can_detect:
        return Text(f"n={result.n} too few\n{difference}", style="yellow")
    return Text(f"{'gain' if result.gain else 'no loss seen'}\n{difference}", style="green")


def _who_columns() -> list[_Column]:
    return [_Column("method", _method, "left"), _Column("budget", lambda row: row.budget or MISSING, "left")]


def _columns(view: View) -> list[_Column]:
    """What a row says, most important first: what does not fit goes into further tables."""

    def family_column(family: str) -> _Column:
        return _Column(family, lambda row: _quality(row.families.get(family)))

    columns = [
        _Column("KV held", _kv),
        _Column("peak", lambda row: _held(row.peak_share, row.peak_bytes)),
        _Column(view.quality, lambda row: _quality(view.of(row))),
        _Column("n", lambda row: MISSING if (value := view.of(row)) is None else str(value.n)),
        _Column("vs dense", lambda row: _verdict(view, row), "left"),
        _Column("prefill", lambda row: _cost(row.prefill_ratio, seconds(row.prefill_s))),
        _Column("decode", lambda row: _cost(row.decode_ratio, milliseconds(row.decode_ms))),
    ]
    if view.has_evidence:
        columns.append(_Column("evidence", _evidence))
    if len(view.lengths) > 1 and any(row.faster_from for row in view.rows):
        columns.append(_Column("faster\nfrom", lambda row: f"{row.faster_from:,}" if row.faster_from else MISSING))
    if any(row.calibration_s is not None for row in view.rows):
        columns.append(_Column("calib.", lambda row: seconds(row.calibration_s)))
    if len(view.families) > 1:
        columns += [family_column(family) for family in view.families]
    return columns


def _table(view: View, columns: Sequence[_Column]) -> Table:
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.name, justify=column.justify, no_wrap=True)
    for row in view.rows:
        style = "bold" if row.dense else None if row.cells else "yellow"
        table.add_row(*(column.cell(row) for column in columns), style=style, end_section=row.dense)
    return table


class ViewTable:
    """One view as a table, a row per method and budget; what does not fit the terminal goes into further tables."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view = self.view
        use = "question seen" if view.question_seen else "question not seen"
        yield Text(f"{view.model} · {', '.join(f'{n:,}' for n in view.lengths)} tokens · {use}", style="bold")
        who, waiting = _who_columns(), _columns(view)
        unlimited = options.update(max_width=10_000)

        def fits(columns: list[_Column]) -> bool:
            return Measurement.get(console, unlimited, _table(view, who + columns)).maximum <= options.max_width

        while waiting:
            # At least one column, or a terminal that is too narrow for any would never come to an end.
            count = next((n for n in range(len(waiting), 1, -1) if fits(waiting[:n])), 1)
            yield _table(view, who + waiting[:count])
            waiting = waiting[count:]


def refused_lines(view: View) -> list[tuple[str, str]]:
    """(row in words, why) for every refused cell, equal reasons of one row joined."""
    lines = []
    for row in view.rows:
        where: dict[str, set[int]] = {}
        for refusal in row.refusals:
            where.setdefault(refusal.text, set()).add(refusal.length)
        for text, lengths in where.items():
            lines.append((row.name, f"{text} at {', '.join(f'{n:,}' for n in sorted(lengths))} tokens"))
    return lines


def report(records: Sequence[Record]) -> Group:
    """All views of a run with their refusals and recommendations, ready to print."""
    parts: list[RenderableType] = []
    for view in overall(records):
        parts.append(ViewTable(view))
        refused = refused_lines(view)
        if refused:
            parts.append(Text("refused", style="bold"))
            parts += [Text(f"  {name}: {why}", style="yellow") for name, why in refused]
        parts += [Text(), Text(recommend_view(view).sentence, style="bold green"), Text()]
    if not parts:
        return Group(Text("no records yet"))
    note = "● on the Pareto front of quality and KV bytes, ▲ of quality and decode time. "
    note += "Quality: mean and 95% interval. Times are × dense on the same machine."
    parts.append(Text(note, style="dim"))
    return Group(*parts)


def print_report(records: Sequence[Record], console: Console | None = None) -> None:
    """Prints `report` to the terminal."""
    (console or Console()).print(report(records))
