"""The comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.evaluate.record import Record
from foveate.evaluate.statistics import Interval
from foveate.report.quantities import MISSING, bytes_text, milliseconds, percent, quality, spread, times
from foveate.report.recommend import recommend_view
from foveate.report.summary import Row, View, overall


def _held(share: float | None, size: float | None) -> str:
    return MISSING if share is None else f"{bytes_text(size)} {percent(share)}"


def _quality(value: Interval | None) -> str:
    return MISSING if value is None else f"{quality(value)}\n{spread(value)}"


def _cost(ratio: float | None, absolute: str) -> str:
    return MISSING if ratio is None else f"{times(ratio)}\n{absolute}" if absolute else times(ratio)


def _method(row: Row) -> Text:
    text = Text(row.label, style="bold" if row.dense else "")
    marks = ("●" if row.front_bytes else "") + ("▲" if row.front_decode else "")
    if marks:
        text.append(f" {marks}", style="green")
    if row.cells and not row.complete:
        text.append(f"\n{row.cells} of {row.expected} cells", style="yellow")
    return text


def _verdict(view: View, row: Row) -> Text:
    results = [r for r in (row.score_vs_dense, row.loss_vs_dense) if r is not None]
    if row.dense:
        return Text("baseline", style="dim")
    if not results:
        return Text(MISSING)
    if any(r.loss for r in results):
        return Text("loses", style="red")
    if not all(r.can_detect for r in results):
        return Text("too few", style="yellow")
    if any(r.gain for r in results):
        return Text("gains", style="green")
    return Text("no loss seen", style="green")


def view_table(view: View) -> Table:
    """One view as a table: a row per method and budget, refused cells last in words."""
    use = "question seen" if view.question_seen else "question not seen"
    lengths = " ".join(f"{n:,}" for n in view.lengths)
    table = Table(title=f"{view.model} · {lengths} tokens · {use}", title_justify="left", pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("budget", no_wrap=True)
    table.add_column("KV held", justify="right")
    table.add_column("peak", justify="right")
    for group in view.groups:
        table.add_column(group, justify="right", no_wrap=True)
    table.add_column("vs dense")
    table.add_column("prefill", justify="right")
    table.add_column("decode", justify="right")
    crossover = any(row.faster_from for row in view.rows) and len(view.lengths) > 1
    if crossover:
        table.add_column("faster from", justify="right")
    for row in view.rows:
        if not row.cells:
            continue
        cells: list[RenderableType] = [_method(row), row.budget or MISSING, _held(row.kv_share, row.kv_bytes)]
        cells.append(_held(row.peak_share, row.peak_bytes))
        cells += [_quality(row.groups.get(group)) for group in view.groups]
        cells.append(_verdict(view, row))
        cells += [_cost(row.prefill_ratio, ""), _cost(row.decode_ratio, milliseconds(row.decode_ms))]
        if crossover:
            cells.append(f"{row.faster_from:,}" if row.faster_from else MISSING)
        table.add_row(*cells, style="bold" if row.dense else None, end_section=row.dense)
    return table


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
        parts.append(view_table(view))
        refused = refused_lines(view)
        if refused:
            parts.append(Text("refused", style="bold"))
            parts += [Text(f"  {name}: {why}", style="yellow") for name, why in refused]
        parts += [Text(), Text(recommend_view(view).sentence, style="bold green"), Text()]
    if not parts:
        return Group(Text("no records yet"))
    note = "● on the front of quality and KV bytes, ▲ of quality and decode time. Quality: mean and 95% interval. "
    parts.append(Text(note + "Times are × dense on the same machine.", style="dim"))
    return Group(*parts)


def print_report(records: Sequence[Record], console: Console | None = None) -> None:
    """Prints `report` to the terminal."""
    (console or Console()).print(report(records))
