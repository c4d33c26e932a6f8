"""`foveate papers`: the catalog."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.options import AsJson
from foveate.cli.screen import print_json


def papers(
    status: Annotated[str, typer.Option(help='Only those that are "works" or "planned".')] = "", as_json: AsJson = False
) -> None:
    """List the papers of the catalog: where each lives here, and whether it works."""
    from foveate.errors import BadArgument
    from foveate.papers import papers as catalog

    if status not in ("", "works", "planned"):
        raise BadArgument("status", status, 'give "works" or "planned"')
    found = [paper for paper in catalog() if status in ("", paper.status)]
    if as_json:
        print_json(
            [
                {
                    "id": paper.id,
                    "title": paper.title,
                    "arxiv": paper.arxiv,
                    "home": paper.home,
                    "status": paper.status,
                    "module": paper.module,
                    "tests": list(paper.tests),
                }
                for paper in found
            ]
        )
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("id", "title", "arxiv", "home", "status"):
        table.add_column(name, no_wrap=name in ("id", "arxiv", "status"))
    for paper in sorted(found, key=lambda paper: (paper.status != "works", paper.tier, paper.id)):
        mark = Text(paper.status, style="green" if paper.status == "works" else "dim")
        table.add_row(paper.id, paper.title, paper.arxiv or "–", paper.home, mark)
    console = Console()
    console.print(table)
    works = sum(paper.status == "works" for paper in found)
    console.print(f"{len(found)} papers, {works} work here, {len(found) - works} are planned", style="dim")
