"""The differences as one HTML page that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from foveate.evaluate.record import write_atomically
from foveate.report import quantities
from foveate.report.diff import terminal
from foveate.report.diff.changes import Change, Difference
from foveate.report.diff.verdict import verdict
from foveate.report.html import environment
from foveate.report.naming import budget_order

PAGE = "diff.html"
_CLASSES = {"better": "good", "worse": "bad", "noise": "none", "identical": "slot"}


def _choices(changes: Sequence[Change]) -> dict[str, list[tuple[str, str]]]:
    """(value, words) of every filter of the table of cells that has something to choose."""
    picks = {
        "verdict": {c.word for c in changes},
        "method": {c.label for c in changes},
        "budget": {c.budget or quantities.MISSING for c in changes},
        "family": {c.family for c in changes},
        "task": {c.task for c in changes},
        "length": {str(c.length) for c in changes},
    }
    orders = {"length": lambda v: (0, float(v), ""), "budget": budget_order}
    return {
        name: [(v, f"{int(v):,}" if name == "length" else v) for v in sorted(values, key=orders.get(name))]
        for name, values in picks.items()
        if len(values) > 1
    }


def render_diff(found: Difference) -> str:
    """The page as text."""
    page = environment().get_template("diff/diff.html.j2")
    return page.render(
        found=found,
        verdict=verdict(found),
        changed=any(change.significant for change in (*found.rows, *found.cells)),
        classes=_CLASSES,
        choices=_choices(found.cells),
        t=terminal,
    )


def write_diff(found: Difference, out_dir: str | os.PathLike[str]) -> Path:
    """Writes `diff.html` into a folder, whole or not at all, and returns its path.

    Raises:
        FoveateError: the folder cannot be written or the disk is full.
    """
    path = Path(out_dir) / PAGE
    write_atomically(path, render_diff(found).encode())
    return path
