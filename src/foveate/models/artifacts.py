"""Things that are made once and kept in the user's cache directory: whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from foveate.errors import Refused

if TYPE_CHECKING:
    from rich.progress import TaskID

Report = Callable[[str, float], None]
"""`report(step, share)`: how much of a named step is done, 0 to 1."""

_MANIFEST = "foveate.json"
_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}


def cache_root() -> Path:
    """Where Foveate keeps what it made: `FOVEATE_CACHE`, else the platform's cache directory."""
    if chosen := os.environ.get("FOVEATE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "foveate" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "foveate"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveate"


def artifact(
    key: str, name: str, build: Callable[[Path, Path, Report], None], *, space: int, kind: str = "models"
) -> Path:
    """The folder called `name` of the cache entry `key`; built first if it is missing or damaged.

    `build(folder, scratch, report)` fills `folder`; `scratch` is a second folder for downloads. Both lie in the cache
    directory and vanish if the build fails; a finished folder appears by one rename. Processes that want the same
    entry wait for each other, so what a dead process left behind is known to be dead and removed.

    Args:
        space: bytes that must be free for the build to have a chance.
        kind: the folder of the cache directory that the entry is in.

    Raises:
        Refused: the cache directory cannot be written or has not enough room.
    """
    entry = cache_root() / kind / key
    if (found := _complete(entry)) is not None:
        return found
    with _explained(entry.parent, space):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry, name):
            if (found := _complete(entry)) is not None:
                return found
            _remove_leftovers(entry)
            _require_space(entry.parent, space)
            staging = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=entry.parent))
            try:
                folder, scratch = staging / "entry" / name, staging / "scratch"
                folder.mkdir(parents=True)
                scratch.mkdir()
                with _progress(name) as report:
                    build(folder, scratch, report)
                _write_manifest(folder)
                if entry.exists():
                    entry.rename(staging / "damaged")
                (staging / "entry").replace(entry)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return entry / name


def sha256(path: Path, report: Callable[[float], None] | None = None) -> str:
    """The file's SHA-256 in hex; `report` hears the share that is read."""
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            done += len(block)
            if report is not None:
                report(done / size)
    return digest.hexdigest()


def _write_manifest(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder.parent / _MANIFEST).write_text(json.dumps({"name": folder.name, "files": sizes}, indent=1))


def _complete(entry: Path) -> Path | None:
    """The entry's folder if every file is there at its full size: a power cut can shorten files after the rename."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text())
        folder = entry / manifest["name"]
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if sizes == manifest["files"] else None


@contextmanager
def _locked(entry: Path, name: str) -> Iterator[None]:
    lock = FileLock(entry.parent / f".{entry.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is preparing {name}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(entry: Path) -> None:
    """Only the holder of the entry's lock stages it, so every other staging folder belongs to a dead process."""
    for leftover in entry.parent.glob(f".{entry.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _require_space(folder: Path, space: int) -> None:
    if shutil.disk_usage(folder).free < space:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _explained(folder: Path, space: int) -> Iterator[None]:
    """One line in place of the traceback of a full or unwritable disk."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise Refused(
            f"{reason} in {folder}: at least {space / 1e9:.2g} GB are needed there; make room, or set FOVEATE_CACHE to "
            f"another directory"
        ) from error


def _disk_reason(error: Exception) -> str | None:
    # safetensors passes the operating system's error on as text only
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in _OUT_OF_SPACE or any(f"os error {code}" in text for code in _OUT_OF_SPACE):
        return "no space left"
    if isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return "cannot write"
    return None


@contextmanager
def _progress(name: str) -> Iterator[Report]:
    """A bar a step on stderr, so that stdout stays free for results. Without rich, as where the package was copied
    without what it brings, nothing is shown."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda step, share: None
        return
    columns = (TextColumn(f"{name}: {{task.description:<12}}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:

        def report(step: str, share: float) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=1.0)
            progress.update(tasks[step], completed=share)

        yield report
