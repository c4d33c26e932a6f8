"""A worker of a run that is spread: it holds the model and does the jobs that it is given, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from foveate import compat
from foveate.engine.apply import Handle, apply
from foveate.evaluate.machine import describe, versions
from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.request import Request
from foveate.evaluate.runner import Runner, prepare
from foveate.evaluate.setting import Setting
from foveate.evaluate.work import Draft, Known, Work
from foveate.methods.base import Profile
from foveate.models import Loaded, load


class Stopped(Exception):
    """A job was told to end."""


@dataclass(frozen=True)
class Facts:
    """What decides about a worker's results and times.

    Args:
        dtype: of the weights. device: its type, "cpu" or "cuda".
        machine: in words.
    """

    dtype: str
    device: str
    machine: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Order:
    """A run, as a worker needs to know it.

    Args:
        number: tells the runs of one crew apart.
    """

    number: int
    request: Request
    settings: tuple[Setting, ...]
    profiles: tuple[Profile, ...] = ()


class Worker:
    """Opens the model by itself, on its first job, and keeps it.

    `do` runs in one thread; `at` and `stop` may be called from another meanwhile.

    Args:
        source, dtype, device: as for `foveate.load`.
    """

    def __init__(self, source: str, dtype: Any = "auto", device: Any = "auto") -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.opened: Loaded | None = None
        self.handle: Handle | None = None
        self.runner: Runner | None = None
        self.number = 0
        self.job = self.until = 0
        self.progress = (0.0, "")

    def do(self, job: int, method: str, *args: Any) -> Any:
        """One job, by the name of a method.

        Args:
            job: its number, counted up.

        Raises:
            Stopped: `stop` was called for it.
        """
        self.job, self.progress = job, (0.0, "")
        return getattr(self, method)(*args)

    def at(self) -> tuple[float, str]:
        """Work done of the job, in about prompt tokens, and what it is at."""
        return self.progress

    def stop(self, job: int) -> None:
        """End this job, which may not have begun, and those before it."""
        self.until = max(self.until, job)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def join(self) -> Facts:
        """Open the model."""
        model, _ = self.open()
        dtype = str(model.dtype).removeprefix("torch.")
        return Facts(dtype, model.device.type, describe(*compat.devices(model)), versions())

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, tokenizer, *args)`."""
        return function(*self.open(), *args)

    def prepare(self, order: Order) -> dict[str, Any]:
        """Check a run and make its samples. Returns what all its cells have in common."""
        self._runner(order)
        return order.request.shared(self.open().model)

    def plan(self, order: Order, have: list[Record]) -> Work:
        """What is missing of a run, beside these records."""
        runner = self._runner(order)
        with torch.inference_mode():
            runner.log = Draft(have)
            return runner.work()

    def costs(self, order: Order, have: list[Record], length: int) -> Known:
        """Costs by setting. Nothing else may run on the device meanwhile."""
        runner = self._runner(order)
        with torch.inference_mode():
            runner.log = Draft(have)
            return runner.costs(length)

    def measure(self, order: Order, have: list[Record], length: int, task: str, known: Known) -> list[Record]:
        """The records that are missing of one length and task."""
        runner = self._runner(order)
        with torch.inference_mode():
            runner.log = draft = Draft(have)
            (chosen,) = (each for each in order.request.tasks if each.name == task)
            runner.measure(length, chosen, known)
            return draft.added

    # -- what they need -----------------------------------------------------------------------------------------------

    def open(self) -> Loaded:
        if self.opened is None:
            self.opened = load(self.source, dtype=self.dtype, device=self.device)
        return self.opened

    def _runner(self, order: Order) -> Runner:
        model, tokenizer = self.open()
        if self.runner is None or self.number != order.number:
            self.leave()
            self.handle = apply(model, DENSE)
            with torch.inference_mode():
                self.runner = prepare(
                    model, tokenizer, order.request, order.settings, self.handle, order.profiles, self._watch
                )
            self.number = order.number
        self.runner.done = self.runner.total = 0.0
        return self.runner

    def _watch(self, done: float, total: float, what: str) -> None:
        if self.job <= self.until:
            raise Stopped
        self.progress = (done, what)

    def leave(self) -> None:
        """Forget the run that it was prepared for; the model is as it was loaded."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.runner = None
