"""The grid of a sweep: which cells its command asks for, which of them are missing, and how measured ones are added."""

from __future__ import annotations

import gzip
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.comparison import BUDGETS, LENGTHS, METHODS_ASKED, SAMPLES, TASKS, lengths_of, listed
from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.record import DENSE, RECORDS, Cell, Record, read, read_manifest, write_atomically
from foveate.evaluate.request import Request
from foveate.evaluate.setting import Setting, parse_budgets, parse_methods, settings_of
from foveate.tasks import corpus, expand_tasks

SHORTEST_ONLY = ("ask_many_needles",)
"""Tasks that the grid has at its shortest length alone."""
DIGITS = 4
"""Of the floats in an outcome."""
TEXTS = ("references", "prediction")
"""What an outcome leaves out."""
DEFAULTS = {
    "--methods": listed(METHODS_ASKED),
    "--budgets": listed(BUDGETS),
    "--lengths": listed(LENGTHS),
    "--tasks": listed(TASKS),
    "--samples": str(SAMPLES),
    "--seed": "0",
}
"""Of the options of `foveate compare` that decide about the cells."""


@dataclass(frozen=True)
class Missing:
    """A cell that is to be measured, and the dense record of the same samples."""

    cell: Cell
    setting: Setting
    dense: Record


@dataclass(frozen=True)
class Grid:
    """What the command in a folder of records asks for.

    Args:
        request: all lengths and tasks of the command.
        settings: every method under every budget, dense first.
        shared: what all cells have in common, from `run.json`.
        records: those that are there.
    """

    request: Request
    settings: tuple[Setting, ...]
    shared: dict[str, Any]
    records: tuple[Record, ...]

    @classmethod
    def open(cls, folder: Path, methods: str = "") -> Grid:
        """The grid of a folder.

        Args:
            methods: as for `foveate compare`; "": those of the command that have a record.

        Raises:
            BadArgument: no run is there, it holds times, or its command is not one of `foveate compare`.
            FoveateError: this Python brings another corpus than the run had.
        """
        manifest, records = read_manifest(folder), read(folder)
        shared, (model, asked) = manifest["settings"], options(str(manifest["command"]))
        text = corpus(Path(asked["--corpus"]) if "--corpus" in asked else None)
        if shared["repeats"]:
            raise BadArgument("repeats", shared["repeats"], f"{folder} holds times, and nothing can be timed here")
        if text.digest != shared["corpus_digest"]:
            mend = f"take a Python that brings {shared['corpus']} ({shared['corpus_digest']})"
            raise FoveateError(f"the samples would be others, as the corpus is {text.name} ({text.digest}): {mend}")
        request = Request(
            model=model,
            lengths=lengths_of(int(length) for length in asked["--lengths"].split(",")),
            tasks=tuple(expand_tasks(asked["--tasks"])),
            samples=int(shared["samples"]),
            seed=int(asked["--seed"]),
            repeats=0,
            corpus=text,
            command=manifest["command"],
        )
        settings = settings_of(parse_methods(methods or asked["--methods"]), parse_budgets(asked["--budgets"]))
        known = {record.cell.method for record in records}
        # As if through "all": what a method cannot do on this model is a refused cell, and no error.
        chosen = tuple(replace(s, named=False) for s in settings if methods or s.method in known)
        return cls(request, chosen, shared, tuple(records))

    def missing(self, lengths: Sequence[int] = ()) -> list[Missing]:
        """Cells without a record, by length, task and setting.

        Args:
            lengths: these instead of the command's.

        Raises:
            FoveateError: the dense record of a cell is missing, too.
        """
        have = {record.cell.key(): record for record in self.records}
        shortest = self.request.lengths[0]
        cells = [
            (self.request.cell(setting, length, task), setting)
            for length in lengths or self.request.lengths
            for task in self.request.tasks
            if length == shortest or task.name not in SHORTEST_ONLY
            for setting in self.settings
            if setting.method != DENSE
        ]
        return [Missing(cell, setting, dense_of(cell, have)) for cell, setting in cells if cell.key() not in have]


def options(command: str) -> tuple[str, dict[str, str]]:
    """The model and the options of a command, those that it leaves out by their defaults.

    Raises:
        BadArgument: it is not one of `foveate compare`, or has a flag that this tool does not know.
    """
    words = shlex.split(command)
    names, values = words[3::2], words[4::2]
    whole = len(names) == len(values) and all(name.startswith("--") for name in names)
    if words[:2] != ["foveate", "compare"] or not whole:
        raise BadArgument("command", command, "use a folder of `foveate compare MODEL --option value ...`")
    return words[2], DEFAULTS | dict(zip(names, values, strict=True))


def dense_of(cell: Cell, records: Mapping[str, Record]) -> Record:
    """The dense record of the same samples.

    Raises:
        FoveateError: there is none.
    """
    key = replace(cell, method=DENSE, settings={}, budget=None).key()
    if key not in records:
        mend = "run `foveate compare --methods dense` into the same folder first"
        raise FoveateError(f"no dense record of {cell.task} at {cell.length} tokens is there; {mend}")
    return records[key]


# -- writing and merging -----------------------------------------------------------------------------------------------


def slim(record: Record) -> Record:
    """The record as a sweep keeps it: outcomes without texts, their floats rounded."""
    outcomes = [{n: _rounded(v) for n, v in one.items() if n not in TEXTS} for one in record.outcomes]
    return replace(record, outcomes=outcomes)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def write(records: Sequence[Record], file: Path) -> None:
    """Records, one a line, as gzip."""
    write_atomically(file, gzip.compress("".join(f"{slim(r).to_json()}\n" for r in records).encode(), mtime=0))


def merge(files: Sequence[Path], folder: Path) -> int:
    """Add the records of such files to those of a folder, and return how many these are. All of them or none.

    Raises:
        BadArgument: a file that cannot be read.
        FoveateError: a cell that is there already, or one that was measured on other samples or beside another cache.
    """
    have = {record.cell.key(): record for record in read(folder)}
    added: list[Record] = []
    for file in files:
        for record in _read(file):
            cell = record.cell
            name = f"{file}: {cell.method} {cell.budget or ''}, {cell.task} at {cell.length} tokens"
            if cell.key() in have:
                raise FoveateError(f"{name} is there already")
            _check(record, dense_of(cell, have), name)
            have[cell.key()] = record
            added.append(record)
    path = folder / RECORDS
    before = path.read_bytes()
    ended = before if before.endswith(b"\n") or not before else before + b"\n"
    write_atomically(path, ended + "".join(f"{slim(record).to_json()}\n" for record in added).encode())
    return len(added)


def _read(file: Path) -> list[Record]:
    try:
        found = [Record.from_json(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    except (OSError, EOFError, ValueError) as error:  # gzip's own errors are among these
        raise BadArgument("file", str(file), f"give gzip of records, one a line ({error})") from None
    if not found:
        raise BadArgument("file", str(file), "holds no records; give what `sweep.py` wrote")
    return found


def _check(record: Record, dense: Record, name: str) -> None:
    """Raise FoveateError for a record that does not stand beside the dense one."""
    if record.status == "refused":
        return
    if _places(record) != _places(dense):
        raise FoveateError(f"{name} has other samples than the dense record: {len(record.scores)} of them")
    if record.kv_bytes_dense != dense.kv_bytes:
        held = f"{record.kv_bytes_dense} bytes of the dense cache, where the dense record has {dense.kv_bytes}"
        raise FoveateError(f"{name} has {held}")


def _places(record: Record) -> list[tuple[int, list[float]]]:
    return [(one["index"], _rounded(one["depths"])) for one in record.outcomes]
