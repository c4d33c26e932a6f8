"""The differences as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.report.diff.changes import Change, Difference, Lone, Ratio
from foveate.report.diff.verdict import verdict
from foveate.report.quantities import MISSING, quality, signed

_MOST = 30  # lines of a table of cells
_NARROWEST = 128  # columns that the tables need

_STYLES = {"better": "green", "worse": "red", "noise": "", "identical": "dim"}


def ratio_text(cost: Ratio | None) -> str:
    """`0.98×`, or that it was not measured in both."""
    return MISSING if cost is None else f"{cost.ratio:.2f}×"


def ends(change: Change) -> str:
    """The interval of a difference."""
    return f"{signed(change.low)} to {signed(change.high)}"


def count(change: Change) -> str:
    """Samples; of both sides where they are not the same ones."""
    return str(change.n) if change.paired else f"{change.n}, {change.n_b}*"


def p_value(change: Change) -> str:
    """The corrected p."""
    return "<0.001" if change.corrected < 0.001 else f"{change.corrected:.3f}"


def changes_table(changes: Sequence[Change], cells: bool) -> Table:
    """Changes as lines; those of cells say where."""
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True, min_width=max((len(change.name) for change in changes), default=0))
    for name in ["length", "task"] if cells else ["families"]:
        table.add_column(name, justify="right" if name == "length" else "left", min_width=6)
    for name in ("a", "b", "b - a", "n", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name in ("KV", "prefill", "decode"):
        table.add_column(name, justify="right", no_wrap=True)
    for change in changes:
        where = [f"{change.length:,}", change.task] if cells and change.length else [change.family]
        table.add_row(
            change.name,
            *where,
            quality(change.a),
            quality(change.b),
            f"{signed(change.difference)}\n{ends(change)}",
            count(change),
            p_value(change),
            Text(change.word, style=_STYLES[change.word]),
            *(ratio_text(cost) for cost in (change.kv_bytes, change.prefill_s, change.decode_ms)),
        )
    return table


def _lone(title: str, found: Sequence[Lone], reason: bool = False) -> list[RenderableType]:
    """Cells by row: how many, and why where one run refused them."""
    if not found:
        return []
    rows: dict[tuple[str, str], int] = {}
    for lone in found:
        why = f": a {lone.a}, b {lone.b}" if reason else ""
        rows[lone.name, why] = rows.get((lone.name, why), 0) + 1
    lines = [f"  {name}{why} ({number} cell{'s' * (number > 1)})" for (name, why), number in rows.items()]
    return [Text(title, style="bold"), *map(Text, lines), Text()]


def report_diff(found: Difference) -> Group:
    """The verdict, what differs in how the runs were made, rows, and the cells that changed."""
    parts: list[RenderableType] = [Text(f"a: {found.a.path}\nb: {found.b.path}", style="dim"), Text()]
    first, *rest = verdict(found)
    parts += [Text(first, style="bold"), *map(Text, rest), Text()]
    if found.facts:
        table = Table("differs", "a", "b", pad_edge=False, box=box.SIMPLE_HEAD)
        for fact in found.facts:
            table.add_row(fact.name, fact.a or MISSING, fact.b or MISSING)
        parts.append(table)
    else:
        parts += [Text("Model, settings, corpus, machine and versions are the same."), Text()]
    if found.rows:
        parts.append(changes_table(found.rows, cells=False))
    shown = found.changed[:_MOST]
    if shown:
        parts += [Text("cells that changed", style="bold"), changes_table(shown, cells=True)]
        if len(found.changed) > len(shown):
            parts.append(Text(f"and {len(found.changed) - len(shown)} more; --json and --out have all of them"))
    parts += _lone("in a only", found.only_a)
    parts += _lone("in b only", found.only_b)
    parts += _lone("refused in one", found.refusals, reason=True)
    note = "a, b: mean scores; b - a with its 95% interval. p is corrected (Holm). KV, prefill, decode: b over a."
    if any(not change.paired for change in (*found.rows, *found.cells)):
        note += " * other samples, not paired."
    return Group(*parts, Text(note, style="dim"))


def print_diff(found: Difference, console: Console | None = None) -> None:
    """Prints `report_diff` to the terminal."""
    console = console or Console()
    console.width = max(console.width, _NARROWEST)  # a table that is cut off says nothing: lines are wrapped instead
    console.print(report_diff(found))
