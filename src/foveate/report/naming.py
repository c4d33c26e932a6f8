"""How rows are told apart and named: a method with the settings and the budget that make it another row."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from foveate.evaluate.record import Cell, Record

RowKey = tuple[str, str, str | None]
"""Method, settings and budget: what makes a row."""

_ALWAYS_SAID = {"sees"}
"""Settings that are part of a label even if all rows agree in them: what a row was told that others may not be."""


def canonical(settings: dict[str, Any]) -> str:
    """Settings as a text that is equal where they are equal."""
    return json.dumps(settings, sort_keys=True) if settings else "{}"


def row_key(cell: Cell) -> RowKey:
    """Which row of a view a cell belongs to."""
    return cell.method, canonical(cell.settings), cell.budget


def row_labels(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """(method, settings) -> label: the method alone, with the settings that differ where it was run with several."""
    settings: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        settings[record.cell.method][canonical(record.cell.settings)] = record.cell.settings
    labels: dict[tuple[str, str], str] = {}
    for method, variants in settings.items():
        names = {name for variant in variants.values() for name in variant}
        differing = {n for n in names if len({canonical({n: v.get(n)}) for v in variants.values()}) > 1}
        differing |= names & _ALWAYS_SAID
        for key, variant in variants.items():
            shown = _setting_text({n: variant[n] for n in differing if n in variant})
            labels[method, key] = f"{method} ({shown})" if shown else method
    return labels


def _setting_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))


def budget_order(budget: str | None) -> tuple[int, float, str]:
    """Sort key of a budget: by its number, None last."""
    if budget is None:
        return (1, 0.0, "")
    number = re.match(r"[\d.]+", budget)
    try:
        return (0, float(number[0]) if number else 0.0, budget)
    except ValueError:
        return (0, 0.0, budget)
