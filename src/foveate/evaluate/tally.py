"""What settings gathered of cells that are not complete, kept on the disk, so that a kill loses one batch of one."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from foveate.evaluate.answer import Answer
from foveate.evaluate.batch import Batch

BATCHES = "batches.jsonl"
"""Name of the file in a run's folder; it is gone when nothing is unfinished."""


@dataclass
class Tally:
    """What one setting gathered in one group, or in one batch of it.

    Args:
        answers: one per sample, in order.
        read, dense: pairs read, and those that dense attention computes, by phase.
    """

    answers: list[Answer] = field(default_factory=list)
    read: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: list[Answer], batch: Batch, earlier: Batch | None) -> Tally:
        """Of one batch; `earlier` is the shared batch it was forked from."""
        tally = cls(answers)
        for each in [batch] if earlier is None else [batch, earlier]:
            _add(tally.read, each.cache.meter or {})
            _add(tally.dense, each.dense)
        return tally

    def add(self, other: Tally) -> None:
        """Another batch's, behind this one."""
        self.answers += other.answers
        _add(self.read, other.read)
        _add(self.dense, other.dense)

    def share(self, phase: str) -> float | None:
        """Pairs read over dense pairs; None where nothing was to be read."""
        dense = self.dense.get(phase, 0.0)
        return self.read.get(f"{phase}_read", 0.0) / dense if dense else None


def _add(total: dict[str, float], more: Any) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


class Batches:
    """Tallies of the batches of unfinished cells, one line each, in a run's folder.

    The folder's `Log` has one writer and refuses other settings, so a line found here is of the same run. Use as a
    context manager.

    Args:
        folder: of the run; None: in memory only (a worker's groups are lost with it).
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.path = None if folder is None else Path(folder) / BATCHES
        self._found: dict[tuple[str, int, int], Tally] = {}
        self._file: int | None = None
        if self.path is not None and self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, TypeError, KeyError):  # what a kill tore is measured again
                    raw = json.loads(line)
                    tally = Tally([_answer(one) for one in raw["answers"]], raw["read"], raw["dense"])
                    self._found[raw["cell"], raw["start"], len(tally.answers)] = tally

    def get(self, cell: str, start: int, count: int) -> Tally | None:
        """What was measured of the samples start..start+count-1 of a cell, by its key."""
        return self._found.get((cell, start, count))

    def add(self, cell: str, start: int, tally: Tally) -> None:
        """Keep a batch's tally; when this returns it is on the disk. Where it cannot be written none is kept any more:
        the run goes on, and the log says when not even records can be written.
        """
        if self.path is None:
            return
        values = {"cell": cell, "start": start, **asdict(tally)}
        line = json.dumps(values, allow_nan=True).encode() + b"\n"
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                line = b"\n" + line  # behind what may be torn
            os.write(self._file, line)
            os.fsync(self._file)
        except OSError:
            self.drop()
            self.path = None

    def drop(self) -> None:
        """Every cell of the group is in the log: forget its batches."""
        self._found = {}
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(raw: dict[str, Any]) -> Answer:
    return Answer(**{**raw, "turns": tuple(_answer(turn) for turn in raw["turns"])})
