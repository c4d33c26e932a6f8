"""Method cards: what a method does, where it comes from, how it was set and what it was measured to cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.report.rows import Row, View

_ARXIV = re.compile(r"(?:arxiv:?\s*)?(\d{4}\.\d{4,5})(v\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class MethodCard:
    """A method in words, given by the caller.

    Args:
        id: its name in the registry, as in `Cell.method`; a composition `a|b` is described by the cards of its parts.
        name: as its authors write it.
        paper: title, arXiv number or address.
        slots: which parts of attention it changes (`keep`, `format`, …).
        summary: what it does, in one or two sentences.
        settings: its settings in this run.
    """

    id: str
    name: str
    paper: str = ""
    slots: tuple[str, ...] = ()
    summary: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def link(self) -> str | None:
        """Address of the paper where one can be told from `paper`; None otherwise."""
        if re.match(r"https?://[^\s]+$", self.paper):
            return self.paper
        found = _ARXIV.fullmatch(self.paper.strip()) or re.search(r"arxiv:?\s*(\d{4}\.\d{4,5})", self.paper, re.I)
        return f"https://arxiv.org/abs/{found[1]}" if found else None


@dataclass(frozen=True)
class FilledCard:
    """A card of the page: a label of the run, the cards that describe it, and its rows, one per budget."""

    label: str
    parts: tuple[MethodCard, ...]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    calibration_s: float | None
    faster_from: int | None


def fill(cards: Sequence[MethodCard], view: View) -> list[FilledCard]:
    """One filled card per label of a view, dense left out; a method without a card still shows what was measured."""
    known = {name: card for card in cards for name in (card.name, card.id)}
    rows: dict[str, list[Row]] = {}
    for row in view.rows:
        if not row.dense:
            rows.setdefault(row.label, []).append(row)
    filled = []
    for label, members in rows.items():
        method = members[0].method
        names = [method] if method in known else [part.strip() for part in method.split("|")]
        parts = tuple(known.get(name, MethodCard(name, name)) for name in names)
        settings = {name: value for part in parts for name, value in part.settings.items()} | members[0].settings
        filled.append(
            FilledCard(
                label=label,
                parts=parts,
                settings=settings,
                rows=tuple(members),
                calibration_s=max((r.calibration_s for r in members if r.calibration_s is not None), default=None),
                faster_from=min((r.faster_from for r in members if r.faster_from is not None), default=None),
            )
        )
    return filled
