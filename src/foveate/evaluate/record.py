"""Records: one JSON line per measured cell, written so that a run can be killed at any moment and resumed.

A run is a folder with two files: `records.jsonl` (one line per cell, appended and synced) and `run.json` (what all
cells of the run share). Everything that is printed or drawn is made from records and from nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

try:
    import fcntl
except ImportError:  # not a POSIX system: two writers on one file are then not noticed
    fcntl = None

from foveate.errors import BadArgument, FoveateError

SCHEMA = 1
DENSE = "dense"
"""Name of the method that is the baseline: every comparison is made against the records of this method."""

RECORDS = "records.jsonl"
MANIFEST = "run.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version() -> str:
    try:
        return metadata.version("foveate")
    except metadata.PackageNotFoundError:
        return "unknown"


def _plain(argument: str, value: Any) -> Any:
    """`value` as JSON gives it back (tuples become lists), so that a record equals itself after a round trip."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BadArgument(argument, value, f"use plain, finite JSON values only ({error})") from None


@dataclass(frozen=True)
class Cell:
    """What was measured: one point of the grid of a comparison.

    Args:
        model: hub id, folder or built-in name.
        method: display name, `"snapkv"` or a composition `"snapkv|kivi"`; `DENSE` is the baseline.
        settings: the settings of the method, JSON values.
        budget: as asked, `"0.25"` or `"1024 tokens"`; None where the method takes none.
        length: context length in tokens.
        task: name of the task, `"niah_single_1"`.
        seed: seed of the samples; cells that differ only in method share their samples.
        question_seen: whether the method saw the question while it compressed the context.
    """

    model: str
    method: str
    settings: dict[str, Any]
    budget: str | None
    length: int
    task: str
    seed: int
    question_seen: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _plain("settings", self.settings))

    def key(self) -> str:
        """Stable identity for resuming: readable in front, a digest of all fields behind."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        seen = "seen" if self.question_seen else "unseen"
        budget = "-" if self.budget is None else self.budget
        return f"{self.method}/{budget}/{self.length}/{self.task}/{self.seed}/{seen}/{digest}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one cell measured, or why it was refused.

    Args:
        cell: the point of the grid.
        status: `"done"`, or `"refused"` with the reason in `refused`.
        scores: one finite number per sample; index i is the same sample for every method of the run.
        outcomes: one dict per sample (`index`, `depths` in 0..1, `prediction`, `references`, `score`, `kv_bytes`, …).
            Samples of several turns also have one value per turn: `turns` (scores, whose mean is `score`),
            `prediction`, `turns_held`, `turns_read` and `turns_kv_bytes`.
        higher_is_better: True for accuracies, False for losses (negative log-likelihood per token).
        kv_bytes: bytes of the live tensors of the cache after the prompt, median over samples.
        kv_bytes_dense: the same for the dense cache at this length.
        kv_bytes_peak: the most held at any moment, None where it was not measured.
        pairs_read: share of the dense pairs that decode read, 0..1.
        pairs_prefill: share of the dense causal pairs that prefill computed, 0..1.
        prefill_s, prefill_dense_s: seconds for the prompt, median over repeats.
        decode_ms, decode_dense_ms: milliseconds per new token, median.
        repeats: how many times each timing was repeated.
        calibration_s: seconds of calibration that the method needed, None if it needs none.
        refused: why the cell was not run (`"not below 0.29 at 1024 tokens"`).
        floor: the smallest share that the method could have met, 0..1.
        versions: names and versions of what matters (`{"torch": "2.13.0"}`).
        device: the machine in words.
        command: the command that repeats the run.
        created: ISO time. foveate: version of this package.
    """

    cell: Cell
    status: Literal["done", "refused"] = "done"
    scores: list[float] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    higher_is_better: bool = True
    kv_bytes: int = 0
    kv_bytes_dense: int = 0
    kv_bytes_peak: int | None = None
    pairs_read: float | None = None
    pairs_prefill: float | None = None
    prefill_s: float | None = None
    prefill_dense_s: float | None = None
    decode_ms: float | None = None
    decode_dense_ms: float | None = None
    repeats: int = 0
    calibration_s: float | None = None
    refused: str | None = None
    floor: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    command: str = ""
    created: str = field(default_factory=_now)
    foveate: str = field(default_factory=_version)

    def __post_init__(self) -> None:
        for name in ("scores", "outcomes", "versions"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if self.status == "refused":
            if not self.refused:
                raise BadArgument("refused", self.refused, "give the reason of a refused cell")
            if self.scores:
                raise BadArgument("scores", f"{len(self.scores)} scores", "a refused cell has none")
        elif self.status == "done":
            if self.refused:
                raise BadArgument("refused", self.refused, 'give status="refused" with a reason')
            if not self.scores:
                raise BadArgument("scores", self.scores, "a cell that is done has one score per sample")
            if len(self.outcomes) != len(self.scores):
                raise BadArgument("outcomes", f"{len(self.outcomes)} outcomes", f"give {len(self.scores)}, as scores")
            if self.kv_bytes < 0 or self.kv_bytes_dense <= 0:
                held = (self.kv_bytes, self.kv_bytes_dense)
                raise BadArgument("kv_bytes, kv_bytes_dense", held, "give the measured bytes of both caches")
        else:
            raise BadArgument("status", self.status, 'use "done" or "refused"')
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise BadArgument(item.name, value, "give a finite number, or None where nothing was measured")

    def to_json(self) -> str:
        """The record as one line of JSON, without the line end."""
        try:
            return json.dumps({"schema": SCHEMA, **asdict(self)}, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise BadArgument("record", self.cell.key(), f"use plain, finite JSON values only ({error})") from None

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads one line; raises ValueError, with the reason, for anything that `to_json` did not write."""
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        schema = data.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}, this version of foveate reads {SCHEMA}")
        try:
            return cls(**{**data, "cell": Cell(**data["cell"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a record ({error})") from None


def _parse(path: Path, data: bytes) -> tuple[list[Record], int]:
    """Records of a file and how many of its bytes are whole lines; a torn last line is left out."""
    records: list[Record] = []
    whole = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        torn = not line.endswith(b"\n")
        try:
            # A line without its end can still be whole: the write was cut between the two.
            records.append(Record.from_json(line.decode()))
        except ValueError as error:
            if torn:
                break
            mend = f"line {number} is not a record ({error}); repair it or delete the line, its cell is run again"
            raise BadArgument("records", str(path), mend) from None
        whole += len(line)
    return records, whole


def _latest(records: Iterable[Record]) -> dict[str, Record]:
    return {record.cell.key(): record for record in records}


def read(*paths: str | os.PathLike[str]) -> list[Record]:
    """Records of one or more runs (folders or `.jsonl` files), for reports: nothing is locked, repaired or written.

    Where several lines hold the same cell the last one counts. A torn last line is left out.

    Raises:
        BadArgument: a path does not exist or holds something that is not a record.
    """
    found: dict[str, Record] = {}
    for path in map(Path, paths):
        file = path / RECORDS if path.is_dir() else path
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BadArgument("records", str(path), f"cannot be read ({error.strerror}); give a run folder") from None
        found.update(_latest(_parse(file, data)[0]))
    return list(found.values())


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`run.json` of a run folder: `{"settings": {...}, "command": str, "created": str, "foveate": str}`."""
    file = Path(path) / MANIFEST if Path(path).is_dir() else Path(path).with_name(MANIFEST)
    try:
        manifest = json.loads(file.read_text())
        if not isinstance(manifest["settings"], dict):
            raise ValueError("settings is not an object")
    except OSError as error:
        raise BadArgument("run", str(file), f"cannot be read ({error.strerror}); give a run folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadArgument("run", str(file), f"is not a run manifest ({error}); use another folder") from None
    return manifest


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing: a reader never sees half of it, also after a power cut.

    Raises:
        FoveateError: the disk is full or the folder cannot be written; an older file is then still in place.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> FoveateError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FoveateError(f"{path}: no space left to write; free some and run the same command again to resume")
    return FoveateError(f"{path}: cannot be written ({error.strerror}); choose a folder you can write to")


class Log:
    """An append-only file of records with one writer.

    Each record is one `write` followed by fsync: after a kill at most the last line is torn, and opening the log again
    drops it, so that its cell is run again. Use as a context manager, or call `close`.

    Args:
        path: the `.jsonl` file, or the run folder (then `records.jsonl` in it); folders are made.
        settings: what every cell of the run shares and no cell key holds (number of samples, dtype, device, new tokens,
            repeats). Kept in `run.json` beside the file; a run with other settings is refused. None: no check.
        command: the command that repeats the run, kept in `run.json`.

    Raises:
        BadArgument: the folder holds a run with other settings, or a line that is not a record.
        FoveateError: the file cannot be written, or another process is writing to it.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, command: str = ""
    ) -> None:
        given = Path(path)
        self.path = given if given.suffix == ".jsonl" else given / RECORDS
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        try:
            self._lock()
            data = self.path.read_bytes()
            if settings is not None:
                self._check_settings(_plain("settings", dict(settings)), command, bool(data))
            records, whole = _parse(self.path, data)
            self.dropped = len(data) - whole
            """Bytes of a torn last line that opening dropped."""
            if self.dropped:
                os.ftruncate(self._file, whole)
            elif data and not data.endswith(b"\n"):
                self._write(b"\n")
            self._records = _latest(records)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FoveateError(f"{self.path}: another run is writing to it; wait, or use another folder") from None
        except OSError:  # a file system without locks
            pass

    def _check_settings(self, settings: dict[str, Any], command: str, has_records: bool) -> None:
        file = self.path.with_name(MANIFEST)
        if not file.exists():
            if has_records:
                mend = f"it has records but no {MANIFEST}, so nobody knows their settings; use another folder"
                raise BadArgument("run", str(self.path.parent), mend)
            manifest = {"settings": settings, "command": command, "created": _now(), "foveate": _version()}
            write_atomically(file, (json.dumps(manifest, indent=2) + "\n").encode())
            return
        earlier = read_manifest(file)["settings"]
        for name in sorted(settings.keys() | earlier.keys()):
            if settings.get(name) != earlier.get(name):
                mend = f"the run in {self.path.parent} has {earlier.get(name)!r}; give that, or use another folder"
                raise BadArgument(name, settings.get(name), mend)

    def done(self) -> dict[str, Record]:
        """Cells that need not be run again: key -> the latest record, refusals included."""
        return dict(self._records)

    def append(self, record: Record) -> None:
        """Adds one record; when this returns it is on the disk.

        Raises:
            FoveateError: the disk is full or the file cannot be written; the log then ends at the record before.
        """
        self.extend([record])

    def extend(self, records: Sequence[Record]) -> None:
        """Adds records that belong together: all of them or, if the write fails or is interrupted, none.

        Raises:
            FoveateError: as `append`.
        """
        self._write(b"".join(record.to_json().encode() + b"\n" for record in records))
        self._records |= _latest(records)

    def _write(self, line: bytes) -> None:
        start = os.fstat(self._file).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except BaseException as error:  # also Ctrl-C: take back what was half written
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, start)
            if isinstance(error, OSError):
                raise _unwritable(self.path, error) from None
            raise

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
