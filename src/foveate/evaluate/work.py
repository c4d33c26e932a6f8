"""What passes between those who plan a run, those who measure it, and the one who writes its records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from foveate.evaluate.record import Record

Known = dict[tuple[str, str, str | None], dict[str, Any]]
"""Cost fields of records, by the key of the setting."""


@dataclass(frozen=True)
class Work:
    """What of a run is missing, in about prompt tokens: groups by length and task, timings by length."""

    groups: dict[tuple[int, str], float]
    timings: dict[int, float]

    @property
    def total(self) -> float:
        return sum(self.groups.values()) + sum(self.timings.values())


class Records(Protocol):
    """Where a runner finds the cells that are done and leaves those that it measured."""

    def done(self) -> dict[str, Record]: ...

    def append(self, record: Record) -> None: ...


class Draft:
    """Records in memory, in the place of a `Log`.

    Args:
        records: those that are done already.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records = {record.cell.key(): record for record in records}
        self.added: list[Record] = []

    def done(self) -> dict[str, Record]:
        return dict(self._records)

    def append(self, record: Record) -> None:
        self._records[record.cell.key()] = record
        self.added.append(record)
