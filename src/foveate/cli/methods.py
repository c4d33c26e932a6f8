"""`foveate methods`: which methods there are."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from foveate.cli.options import AsJson
from foveate.cli.screen import print_json


def methods(as_json: AsJson = False) -> None:
    """List the methods with their papers, the slots they fill and their parameters."""
    from foveate.methods import METHODS
    from foveate.methods.base import SLOTS

    if as_json:
        print_json([entry(cls) for cls in METHODS.values()])
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for cls in METHODS.values():
        row = entry(cls)
        slots = ", ".join(slot for slot in SLOTS if slot in row["slots"]) or "the baseline"
        source = f", arXiv {row['paper']}" if row["paper"] else ""
        head = Text(row["id"], style="bold").append(f"  {row['name']}{source} · {slots}", style="not bold")
        if row["needs_calibration"]:
            head.append(" · needs a calibration profile", style="not bold yellow")
        console.print(head)
        parameters = ", ".join(f"{name}={value}" for name, value in row["parameters"].items())
        if parameters:
            console.print(Padding(Text(parameters, style="dim"), (0, 0, 0, 4)))


def entry(cls: Any) -> dict[str, Any]:
    """One method as JSON values."""
    return {
        "id": cls.id,
        "name": cls.name,
        "paper": cls.paper,
        "slots": sorted(cls.slots),
        "needs_calibration": cls.calibrated,
        "parameters": {f.name: f.default for f in fields(cls) if f.name != "budget" or cls.budgeted},
    }
