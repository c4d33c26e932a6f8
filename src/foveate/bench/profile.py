"""Where the time of a prompt or a token goes: the device's work by kernel, as torch's profiler sees it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from foveate.bench.clock import wait

LISTED = 10
"""Most kernels that are listed."""

Piece = tuple[str, int, float]
"""Name of a kernel (of an operator on a processor), launches, seconds."""

_ANONYMOUS = re.compile(r"\(anonymous namespace\)::|<unnamed>::")
_COPIED = re.compile(r"Mem(?:cpy|set)(?: \w+)?")
_WRAPPER = re.compile(r"Kernel\d?|device_kernel|enable_\w+")
"""Names that many kernels of CUTLASS share; what tells them apart is the first template argument."""


@dataclass(frozen=True)
class Work:
    """What the device did for one prompt or one token.

    Args:
        seconds: all kernels together; on a processor all operators, each without those that it calls.
        launches: of kernels, copies and fills; on a processor calls of operators.
        pieces: those that took longest, longest first.
    """

    seconds: float
    launches: float
    pieces: tuple[tuple[str, float, float], ...]

    @classmethod
    def of(cls, pieces: Iterable[Piece], repeats: int = 1) -> Work:
        """One of `repeats` equal parts of all pieces, those of one short name together."""
        sums: dict[str, tuple[int, float]] = {}
        for name, launches, seconds in pieces:
            before = sums.get(short := short_name(name), (0, 0.0))
            sums[short] = before[0] + launches, before[1] + seconds
        longest = sorted(sums.items(), key=lambda item: -item[1][1])[:LISTED]
        return cls(
            sum(seconds for _, seconds in sums.values()) / repeats,
            sum(launches for launches, _ in sums.values()) / repeats,
            tuple((name, launches / repeats, seconds / repeats) for name, (launches, seconds) in longest),
        )

    def as_json(self, wall: float) -> dict[str, Any]:
        """JSON values; `wall` is the seconds that the same work took when nobody looked."""
        return {
            "device_ms": 1e3 * self.seconds,
            "idle_ms": 1e3 * max(0.0, wall - self.seconds),
            "launches": self.launches,
            "kernels": [{"name": name, "launches": count, "ms": 1e3 * s} for name, count, s in self.pieces],
        }


class Profiled:
    """Work that is looked at from `start` to `stop`, or inside a `with`.

    A profiler that fails fails alone: the work goes on, `work` stays None and `why` says what happened.

    Args:
        repeats: equal parts of the work, of which one is told.
    """

    def __init__(self, device: torch.device, repeats: int = 1) -> None:
        self.device, self.repeats = device, repeats
        self.work: Work | None = None
        self.why = ""
        self._profiler: profile | None = None

    def prepare(self) -> None:
        """Have the device watched from now on; nothing is kept before `start`."""
        kind = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
        try:
            wait(self.device)
            self._profiler = profile(activities=[kind])
            self._profiler.prepare_trace()
        except Exception as error:
            self._give_up(error)

    def start(self) -> None:
        """Keep what is done from now on; nothing if the profiler has failed."""
        if self._profiler is None:
            return
        try:
            wait(self.device)
            self._profiler.start_trace()
        except Exception as error:
            self._give_up(error)

    def stop(self) -> None:
        """Nothing if it was not started or has been stopped."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        try:
            wait(self.device)
            profiler.stop_trace()
            work = Work.of(_kernels(profiler) if self.device.type == "cuda" else _operators(profiler), self.repeats)
            self.work = work if work.seconds else None
            self.why = "" if work.seconds else "the profiler saw no work"
        except Exception as error:
            self._give_up(error)

    def __enter__(self) -> Profiled:
        self.prepare()
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def _give_up(self, error: Exception) -> None:
        profiler, self._profiler = self._profiler, None
        self.why = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if profiler is not None:
            with suppress(Exception):  # half started it would be in the way of the next one
                profiler.stop_trace()


def _kernels(profiler: profile) -> Iterator[Piece]:
    """What ran on the device, graphs kernel by kernel."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.device_type().name == "CUDA" and not event.is_user_annotation():
            yield event.name(), 1, event.duration_ns() / 1e9


def _operators(profiler: profile) -> Iterator[Piece]:
    for event in profiler.key_averages():
        if event.device_type.name == "CPU" and not event.is_user_annotation and not event.key.startswith("["):
            yield event.key, event.count, event.self_cpu_time_total / 1e6


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and arguments."""
    if copied := _COPIED.match(name):
        return copied[0]
    plain, inner, angles, rounds = "", "", 0, 0
    for letter in _ANONYMOUS.sub("", name):
        if not angles and letter in "(,":
            break
        if not angles and letter != "<":
            plain += letter
            continue
        rounds += (letter == "(") - (letter == ")")
        if not rounds:  # within parentheses they may compare
            angles += (letter == "<") - (letter == ">")
        inner = "" if angles == 1 and letter == "<" else inner + letter * bool(angles)
    parts = plain.strip().rpartition(" ")[2].split("::")
    if _WRAPPER.fullmatch(parts[-1]) and inner:
        return short_name(inner)
    if parts[-1] == "kernel":  # says something only behind its namespace
        return "::".join(parts[-2:])
    return parts[-1] or name
