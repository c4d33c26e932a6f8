"""What the commands write: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text


def say(message: str) -> None:
    """One line on stderr."""
    print(f"foveate: {' '.join(message.split())}", file=sys.stderr, flush=True)


def quiet_loading(model: str) -> None:
    """Turn transformers' own progress bars off for a model that is here or comes with a bar of ours. What was set is
    looked at when transformers is imported, so this comes before it; a choice of the user's stays."""
    if Path(model).expanduser().exists() or "/" not in model:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def print_json(data: Any) -> None:
    """Machine-readable stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


def remaining(elapsed: float, share: float) -> str:
    """The time left if the rest goes as the beginning went; nothing while it is too early to tell."""
    if share < 0.02 or share >= 1:
        return ""
    seconds = elapsed * (1 - share) / share
    if seconds < 90:
        return f"about {max(5, round(seconds / 5) * 5)} s left"
    return f"about {round(seconds / 60)} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        share = task.completed / task.total if task.total else 0.0
        return Text(remaining(task.elapsed or 0.0, share), style="cyan")


class Watcher:
    """A progress bar on stderr with the time left; in a log file a line from time to time.

    Use as a context manager and call it with (work done, work in all, what is at work).
    """

    _EVERY = 20.0  # seconds between two lines of a log

    def __init__(self, label: str) -> None:
        self.label = label
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.started: float | None = None
        self.said = time.monotonic()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.fields[label]}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                _Remaining(),
                TextColumn("[dim]{task.description}"),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: float, total: float, what: str) -> None:
        now = time.monotonic()
        if self.started is None and total > 0:
            self.started = now
        if self.bar is not None:
            if not self.bar.tasks:
                self.bar.add_task(what, total=None, label=self.label)
            task = self.bar.tasks[0]
            if total and task.total is None:
                self.bar.reset(task.id, total=total)
            self.bar.update(task.id, total=total or None, completed=done, description=what)
        elif now - self.said >= self._EVERY:
            self.said = now
            share = done / total if total else 0.0
            left = remaining(now - self.started, share) if self.started is not None else ""
            parts = [f"{share:.0%}" if total else "", what, left]
            say(" · ".join(part for part in parts if part))
