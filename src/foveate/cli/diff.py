"""`foveate diff`: what changed between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import AsJson
from foveate.cli.screen import print_json


def diff(
    a: Annotated[Path, typer.Argument(help="Folder of the earlier run, or its records.jsonl.")],
    b: Annotated[Path, typer.Argument(help="Folder of the later run.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write diff.html to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what changed from run A to run B: settings, versions, scores, bytes and times.

    Scores are compared sample by sample where both runs have the same samples; what is not significant after
    correction is called noise. Exits with 0 whatever changed.
    """
    from foveate.report.diff import diff as compare_runs
    from foveate.report.diff import diff_json, print_diff, write_diff

    found = compare_runs(a, b)
    page = write_diff(found, out) if out is not None else None
    if as_json:
        print_json({**diff_json(found), "page": None if page is None else str(page)})
        return
    from rich.console import Console

    print_diff(found)
    if page is not None:
        Console().print(f"page: {page}", style="bold", soft_wrap=True)
