"""Runs the command line, in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from foveate.cli import main

PROGRAM = [sys.executable, "-m", "foveate"]
PLAIN = {
    **os.environ,
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "160",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def invoke(capsys: pytest.CaptureFixture[str], words: Sequence[object]) -> Outcome:
    """The program in this process."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return Outcome(int(left.value.code or 0), captured.out, captured.err)


def spawn(words: Sequence[object], folder: Path, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The program in a process of its own, which hears Ctrl-C even where these tests run in a shell's background."""
    return subprocess.Popen(
        [*prefix, *PROGRAM, *map(str, words)],
        cwd=folder,
        env=PLAIN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def errors(done: Outcome) -> list[str]:
    """What was said on stderr, without the bars that transformers draws while it loads a model."""
    assert "Traceback" not in done.err
    return [line for line in done.err.replace("\r", "\n").splitlines() if line and "Loading weights" not in line]


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)
