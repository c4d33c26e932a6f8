"""The ladder as a table for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.report import quantities
from foveate.report.conversion.ladder import Record, columns, error, scalars, sentence, served

_WIDE = 120  # columns from which on what the stages told has room, and how long they took
_SHORT = {"kv_bytes": "cache"}


def ladder_table(record: Record, wide: bool = True) -> Table:
    """One line a stage; `wide` with what it told."""
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD)
    shown = columns(record)
    held = any(column.name == "kv_bytes" for column in shown)
    shown = [
        column for column in shown if (wide or column.name != "seconds") and not (held and column.name == "parameters")
    ]
    table.add_column("stage", min_width=12, overflow="fold")  # long names give way to numbers
    for column in shown:
        table.add_column(_SHORT.get(column.name, column.heading), justify="right", no_wrap=True)
    if wide:
        table.add_column("", overflow="fold", style="dim")
    for index, rung in enumerate(record["rungs"]):
        said = [scalars(rung["facts"])] if wide else []
        table.add_row(rung["stage"], *(column.cells[index][0] for column in shown), *said)
    return table


def print_ladder(record: Record, page: Path | None = None, console: Console | None = None) -> None:
    """The ladder, what was measured before and after, and where the page is."""
    out = console or Console(highlight=False)
    out.print(Text(f"{record['conversion']} of {record['model']}", style="bold"))
    out.print(ladder_table(record, out.width >= _WIDE))
    out.print(Text(sentence(record)))
    times, rows = served(record)
    for words, figures in rows:
        out.print(Text(f"{words}: " + ", ".join(f"{f} {time}" for f, time in zip(figures, times, strict=True))))
    export = record.get("export")
    if export:
        out.print(
            Text(
                f"Exported as {export['architecture']}: latent {export['rank']}, "
                f"{quantities.bytes_text(export['kv_bytes'])} of cache per token, norms {export['norm']}, "
                f"relative error {error(export.get('error'))}"
            )
        )
    if page is not None:
        out.print(f"page: {page}", style="bold", soft_wrap=True, markup=False)
