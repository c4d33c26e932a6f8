"""A cache entry is whole or absent, whatever happens to the process that makes it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from foveate.errors import Refused
from foveate.models.artifacts import artifact, cache_root, sha256


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder: Path, scratch: Path, report) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (scratch / "download").write_bytes(b"d" * 1000)
    report("making", 1.0)


def unreachable(folder: Path, scratch: Path, report) -> None:
    raise AssertionError("built again")


def entries(cache: Path) -> list[str]:
    """What lies in the cache beside lock files."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_built_once_and_then_found(own_cache: Path, capfd: pytest.CaptureFixture):
    folder = artifact("k", "name", fill, space=1)
    assert (folder.name, sorted(path.name for path in folder.iterdir())) == ("name", ["weights"])
    assert artifact("k", "name", unreachable, space=1) == folder
    assert entries(own_cache) == ["k"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "name: making" in err


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt(), Refused("no")])
def test_a_failure_leaves_nothing(error: BaseException, own_cache: Path):
    def fail(folder: Path, scratch: Path, report) -> None:
        fill(folder, scratch, report)
        raise error

    with pytest.raises(type(error)):
        artifact("k", "name", fail, space=1)
    assert entries(own_cache) == []
    assert (artifact("k", "name", fill, space=1) / "weights").stat().st_size == 1000


SLOW = """
import sys, time
from pathlib import Path
from foveate.models.artifacts import artifact

def slow(folder, scratch, report):
    with open(sys.argv[1], "a") as log:
        log.write("x")
    (folder / "weights").write_bytes(b"half")
    Path(sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
    (folder / "weights").write_bytes(b"w" * 1000)

print(artifact("k", "name", slow, space=1))
"""


def start(tmp_path: Path, seconds: float) -> subprocess.Popen:
    arguments = [str(tmp_path / "log"), str(tmp_path / "begun"), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)


def test_a_killed_process_leaves_only_what_the_next_one_removes(tmp_path: Path, own_cache: Path):
    process = start(tmp_path, 600)
    wait_for(tmp_path / "begun")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = entries(own_cache)
    assert len(left) == 1
    assert left[0].startswith(".k-")
    assert (artifact("k", "name", fill, space=1) / "weights").stat().st_size == 1000
    assert entries(own_cache) == ["k"]


def test_two_processes_at_once_build_once(tmp_path: Path, own_cache: Path):
    processes = [start(tmp_path, 1.0) for _ in range(2)]
    folders = [process.communicate()[0].strip() for process in processes]
    assert folders == [str(own_cache / "models" / "k" / "name")] * 2
    assert (tmp_path / "log").read_text() == "x"
    assert entries(own_cache) == ["k"]


@pytest.mark.parametrize("damage", ["shorten", "remove", "manifest"])
def test_a_damaged_entry_is_built_again(damage: str, own_cache: Path):
    folder = artifact("k", "name", fill, space=1)
    if damage == "shorten":
        (folder / "weights").write_bytes(b"w")
    elif damage == "remove":
        (folder / "weights").unlink()
    else:
        (folder.parent / "foveate.json").write_text("{")
    assert (artifact("k", "name", fill, space=1) / "weights").stat().st_size == 1000
    assert entries(own_cache) == ["k"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(error: Exception, own_cache: Path):
    def fail(folder: Path, scratch: Path, report) -> None:
        raise error

    with pytest.raises(
        Refused, match=r"^no space left in .*: at least 2 GB are needed there; .* FOVEATE_CACHE"
    ) as caught:
        artifact("k", "name", fail, space=2_000_000_000)
    assert "\n" not in str(caught.value)
    assert entries(own_cache) == []


def test_too_little_room_is_said_before_anything_is_made(own_cache: Path):
    with pytest.raises(Refused, match="no space left"):
        artifact("k", "name", unreachable, space=1 << 60)
    assert entries(own_cache) == []


def test_a_cache_directory_that_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        monkeypatch.setenv("FOVEATE_CACHE", str(path))
        with pytest.raises(Refused, match="cannot write in"):
            artifact("k", "name", unreachable, space=1)


def test_other_errors_pass_unchanged():
    def fail(folder: Path, scratch: Path, report) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        artifact("k", "name", fail, space=1)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, ".cache/foveate"),
        ("linux", {"XDG_CACHE_HOME": "~/xdg"}, "xdg/foveate"),
        ("darwin", {}, "Library/Caches/foveate"),
        ("win32", {"LOCALAPPDATA": "~/Local"}, "Local/foveate/Cache"),
        ("win32", {}, "AppData/Local/foveate/Cache"),
        ("linux", {"FOVEATE_CACHE": "~/mine"}, "mine"),
    ],
)
def test_where_the_cache_is(
    platform: str, variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("FOVEATE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value if name == "FOVEATE_CACHE" else value.replace("~", str(tmp_path)))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_root() == tmp_path / expected


def test_sha256_of_a_file_longer_than_one_block(tmp_path: Path):
    import hashlib

    data = os.urandom((1 << 22) + 12345)
    (tmp_path / "file").write_bytes(data)
    heard: list[float] = []
    assert sha256(tmp_path / "file", heard.append) == hashlib.sha256(data).hexdigest()
    assert heard[-1] == 1.0
