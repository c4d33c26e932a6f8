"""The ladder as a table for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.report import quantities
from foveate.report.conversion.ladder import Record, error, exact_error, kl, number, scalars, sentence, served

_WIDE = 120  # columns from which on what the stages told has room


def ladder_table(record: Record, wide: bool = True) -> Table:
    """One line a stage; `wide` with what it told."""
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    for name in ("error", "KL", "perplexity", "cache", "of dense", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("", overflow="fold", style="dim")
    for index, rung in enumerate(record["rungs"]):
        table.add_row(
            rung["stage"],
            error(exact_error(record, index)),
            kl(rung["kl"]),
            number(rung["perplexity"]),
            quantities.bytes_text(rung["kv_bytes"]),
            quantities.percent(rung["share"]),
            quantities.seconds(rung["seconds"]),
            *([scalars(rung["facts"])] if wide else []),
        )
    return table


def print_ladder(record: Record, page: Path | None = None, console: Console | None = None) -> None:
    """The ladder, what was measured before and after, and where the page is."""
    out = console or Console(highlight=False)
    out.print(Text(f"{record['conversion']} of {record['model']}", style="bold"))
    out.print(ladder_table(record, out.width >= _WIDE))
    out.print(Text(sentence(record)))
    for words, before, after in served(record):
        out.print(Text(f"{words}: {before} before, {after} after"))
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
