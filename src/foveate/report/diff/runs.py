"""The two runs that are compared, and what differs in how they were made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument
from foveate.evaluate.record import MANIFEST, Record, read, read_manifest


@dataclass(frozen=True)
class Run:
    """A folder's records, and what its `run.json` says all of them share (empty where there is none)."""

    path: str
    records: tuple[Record, ...]
    settings: dict[str, Any]

    @property
    def models(self) -> set[str]:
        return {record.cell.model for record in self.records}

    def values(self, of: Callable[[Record], object]) -> str:
        """What the records say, each value once."""
        return ", ".join(sorted({str(of(record)) for record in self.records} - {""}))


@dataclass(frozen=True)
class Fact:
    """Something that the runs do not have in common; empty where a run does not say."""

    name: str
    a: str
    b: str


def open_run(path: str | os.PathLike[str]) -> Run:
    """A run folder, or a file of records.

    Raises:
        BadArgument: there are no records, or something else than records.
    """
    records = tuple(read(path))
    if not records:
        raise BadArgument("run", os.fspath(path), "holds no records; give the folder of a foveate compare")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    settings = read_manifest(folder)["settings"] if (folder / MANIFEST).is_file() else {}
    return Run(os.fspath(path), records, settings)


def facts(a: Run, b: Run) -> list[Fact]:
    """What differs in model, settings, corpus, seeds, machine and versions."""
    found = [("model", *(run.values(lambda r: r.cell.model) for run in (a, b)))]
    found.append(("seeds", *(run.values(lambda r: r.cell.seed) for run in (a, b))))
    for name in sorted(a.settings.keys() | b.settings.keys()):
        found.append((name.replace("_", " "), *(str(run.settings.get(name, "")) for run in (a, b))))
    found.append(("machine", *(run.values(lambda r: r.device) for run in (a, b))))
    found.append(("foveate", *(run.values(lambda r: r.foveate) for run in (a, b))))
    names = sorted({name for run in (a, b) for record in run.records for name in record.versions})
    for name in names:
        found.append((name, *(run.values(lambda r, name=name: r.versions.get(name, "")) for run in (a, b))))
    return [Fact(*each) for each in found if each[1] != each[2]]


def same_corpus(a: Run, b: Run) -> bool | None:
    """Whether haystacks are made of the same text; None where a run does not say."""
    ones = a.settings.get("corpus_digest"), b.settings.get("corpus_digest")
    return None if None in ones else ones[0] == ones[1]
