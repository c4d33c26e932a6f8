"""Spreads a run over workers: each has the model and measures whole groups; one process alone writes the records."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self

from foveate.errors import FoveateError
from foveate.evaluate.record import Log, Record
from foveate.evaluate.request import Request, Watch
from foveate.evaluate.runner import run as run_here
from foveate.evaluate.setting import Setting
from foveate.evaluate.work import Known, Work
from foveate.evaluate.worker import Facts, Order
from foveate.methods.base import Profile
from foveate.methods.profile import load_profile
from foveate.models import Loaded

LIVES = 2
"""Workers that a job may cost before the run gives up on it."""

LOOK = 1.0
"""Seconds between two looks at the workers."""

Profiles = Iterable[Profile | str | Path]


class Died(Exception):
    """A worker ended before its job did."""


class Crew(Protocol):
    """Workers by number, each a `foveate.evaluate.worker.Worker` in a process of its own. A worker has one job at a
    time, named by a method of `Worker`.

    Attributes:
        size: the most workers there may be.
    """

    size: int

    def start(self, worker: int) -> None:
        """Start a worker, in the place of an earlier one if there was."""
        ...

    def submit(self, worker: int, method: str, *args: Any) -> Hashable:
        """Give a worker a job."""
        ...

    def wait(self, jobs: Sequence[Hashable], seconds: float) -> list[Hashable]:
        """Jobs that have ended; waits for one so long."""
        ...

    def result(self, job: Hashable) -> Any:
        """What an ended job returned; raises what it raised, or Died."""
        ...

    def at(self, worker: int) -> tuple[float, str]:
        """How much of its job a worker has done, and what it is at."""
        ...

    def stop(self, worker: int) -> None:
        """Let a worker's job end soon; it then raises `Stopped`."""
        ...

    def dismiss(self, worker: int) -> None:
        """End a worker at once."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class Here:
    """The model is in this process, and everything is measured here."""

    def __init__(self, name: str, opened: Loaded) -> None:
        self.name, self.opened = name, opened

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, tokenizer, *args)` where the model is."""
        return function(self.opened.model, self.opened.tokenizer, *args)

    def shared(self, request: Request) -> dict[str, Any]:
        """What all cells of a request have in common."""
        return request.shared(self.opened.model)

    def run(
        self,
        request: Request,
        settings: Sequence[Setting],
        out: str | PathLike[str],
        *,
        profiles: Profiles = (),
        watch: Watch,
    ) -> list[Record]:
        """As `foveate.evaluate.runner.run`."""
        return run_here(*self.opened, request, settings, out, profiles=profiles, watch=watch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Job:
    """A job that is still to be done.

    Args:
        what: in words.
        work: about how many prompt tokens it is.
        mark: what its result belongs to.
    """

    what: str
    method: str
    args: tuple[Any, ...]
    work: float = 0.0
    mark: Any = None


class Spread:
    """The model is with the workers of a crew.

    Times are taken by one worker while no other is at work. Groups (one length and task, all settings, since methods
    share the prompt inside one) then go to whichever worker is free. A job whose worker died is given out once more.

    Args:
        name: of the model in records.
    """

    def __init__(self, name: str, crew: Crew) -> None:
        self.name, self.crew = name, crew
        self.facts: dict[int, Facts] = {}
        """Of the workers that have opened the model."""
        self.joining: dict[Hashable, int] = {}
        self.lost = 0
        self.orders = 0

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, tokenizer, *args)` where a model is."""
        return self._alone(Job("a question about the model", "ask", (function, *args)), _quiet)

    def shared(self, request: Request) -> dict[str, Any]:
        """What all cells of a request have in common."""
        return self.ask(_shared, request)

    def run(
        self,
        request: Request,
        settings: Sequence[Setting],
        out: str | PathLike[str],
        *,
        profiles: Profiles = (),
        watch: Watch,
    ) -> list[Record]:
        """As `foveate.evaluate.runner.run`: the same records, in the order in which their groups came in.

        Raises:
            BadArgument, Refused, FoveateError: as there; also where a worker died twice at the same job, or workers
                differ in what decides about results or times.
        """
        opened = tuple(p if isinstance(p, Profile) else load_profile(p) for p in profiles)
        self.orders += 1
        order = Order(self.orders, request, tuple(settings), opened)
        watch(0.0, 0.0, "a worker opens the model and writes samples")
        if not request.repeats:  # else the others open the model when times were taken
            self._hire(min(self.crew.size, len(request.lengths) * len(request.tasks)))
        shared = self._alone(Job("the samples", "prepare", (order,)), watch)
        with Log(out, shared, request.command) as log:
            work: Work = self._alone(Job("the plan", "plan", (order, list(log.done().values()))), watch)
            told = _Told(watch, work.total)
            known = self._times(order, work, log, told)
            jobs = [
                Job(
                    f"{length} tokens, {task.name}",
                    "measure",
                    (order, _of(log, length, task.name), length, task.name, known[length]),
                    work.groups[length, task.name],
                )
                for length in request.lengths
                for task in request.tasks
                if (length, task.name) in work.groups
            ]
            self._finish(jobs, self.crew.size, told, lambda job, records: log.extend(records), request)
            watch(work.total, work.total, "done")
            done = log.done()
            return [done[cell.key()] for cell in request.cells(settings)]

    def _times(self, order: Order, work: Work, log: Log, told: _Told) -> dict[int, Known]:
        """Costs by length, measured by one worker alone."""
        jobs = [
            Job(
                f"timing, {length} tokens",
                "costs",
                (order, _of(log, length), length),
                work.timings.get(length, 0.0),
                length,
            )
            for length in sorted({length for length, _ in work.groups})
        ]
        if work.timings:  # a model that is being opened would be in the way
            for worker in self.joining.values():
                self.crew.dismiss(worker)
            self.joining.clear()
        found: dict[int, Known] = {}
        self._finish(jobs, 1, told, lambda job, known: found.update({job.mark: known}), order.request)
        return found

    def _alone(self, job: Job, watch: Watch) -> Any:
        got: list[Any] = []
        self._finish([job], 1, _Told(watch, 0.0), lambda _, result: got.append(result))
        return got[0]

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _finish(
        self,
        jobs: Sequence[Job],
        most: int,
        told: _Told,
        keep: Callable[[Job, Any], None],
        request: Request | None = None,
    ) -> None:
        """Have jobs done by at most so many workers at a time, in order where it is one.

        Args:
            keep: is given each job and its result, as they come in.
            request: whose records come of it; workers must then be alike.
        """
        waiting, running, died = deque(jobs), dict[Hashable, tuple[int, Job]](), Counter[Job]()
        if request is not None:
            self._agree(request)
        try:
            while waiting or running:
                busy = {worker for worker, _ in running.values()}
                for worker in sorted(self.facts.keys() - busy)[: max(0, min(len(waiting), most - len(busy)))]:
                    job = waiting.popleft()
                    running[self.crew.submit(worker, job.method, *job.args)] = (worker, job)
                self._hire(min(most, len(running) + len(waiting)))
                told(self.crew, running.values(), len(self.joining))
                for handle in self.crew.wait([*running, *self.joining], LOOK):
                    if handle in self.joining:
                        self._join(handle)
                        if request is not None:
                            self._agree(request)
                        continue
                    worker, job = running.pop(handle)
                    try:
                        result = self.crew.result(handle)
                    except Died as error:
                        del self.facts[worker]
                        died[job] += 1
                        if died[job] >= LIVES:
                            mend = "what is complete is kept, and the same command goes on from there"
                            raise FoveateError(f"{job.what}: {LIVES} workers died at it ({error}); {mend}") from None
                        waiting.appendleft(job)
                        continue
                    keep(job, result)
                    told.finished += job.work
        except Exception:
            self._drain(running)
            raise

    def _hire(self, wanted: int) -> None:
        """Start workers until so many are there or on their way."""
        for worker in range(self.crew.size):
            if len(self.facts) + len(self.joining) >= wanted:
                return
            if worker not in self.facts and worker not in self.joining.values():
                self.crew.start(worker)
                self.joining[self.crew.submit(worker, "join")] = worker

    def _join(self, handle: Hashable) -> None:
        """A worker has opened the model, or has died over it."""
        worker = self.joining.pop(handle)
        try:
            self.facts[worker] = self.crew.result(handle)
        except Died as error:
            self.lost += 1
            if self.lost >= LIVES:
                raise FoveateError(f"{self.lost} workers died while they opened {self.name} ({error})") from None

    def _agree(self, request: Request) -> None:
        """Raise where workers would not measure the same thing."""
        if not self.facts:
            return
        first, *others = (self.facts[worker] for worker in sorted(self.facts))
        for other in others:
            for name in ("dtype", "device", "versions", *(("machine",) if request.repeats else ())):
                mine, theirs = getattr(first, name), getattr(other, name)
                if mine != theirs:
                    mend = "take machines of one kind"
                    mend += ", or measure no times (repeats 0)" if name == "machine" else ""
                    raise FoveateError(f"workers differ in their {name}, {mine} and {theirs}: {mend}")

    def _drain(self, running: dict[Hashable, tuple[int, Job]]) -> None:
        """Let workers leave what is of no use any more; they keep the model."""
        for worker, _ in running.values():
            self.crew.stop(worker)
        while running:
            for handle in self.crew.wait(list(running), LOOK):
                worker, _ = running.pop(handle)
                try:
                    self.crew.result(handle)
                except Died:
                    self.facts.pop(worker, None)
                except Exception:  # what it raises was asked for by `stop`, or comes second to what is being raised
                    continue

    def close(self) -> None:
        """End the workers."""
        self.facts.clear()
        self.joining.clear()
        self.crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Told:
    """Tells the watch what all workers have done together."""

    def __init__(self, watch: Watch, total: float) -> None:
        self.watch, self.total = watch, total
        self.finished = self.done = 0.0

    def __call__(self, crew: Crew, running: Iterable[tuple[int, Job]], joining: int) -> None:
        looks = [(job, *crew.at(worker)) for worker, job in running]
        under_way = sum(min(done, job.work) for job, done, _ in looks)
        self.done = max(self.done, min(self.total, self.finished + under_way))  # a job that is begun again counts once
        at = [what or job.what for job, _, what in looks]
        words = [*at[:1], *([f"{len(at)} workers"] if len(at) > 1 else [])]
        words += [f"{joining} opening the model"] if joining else []
        self.watch(self.done, self.total, ", ".join(words))


def _of(log: Log, length: int, task: str | None = None) -> list[Record]:
    """Records that decide about what a worker measures at a length."""
    return [r for r in log.done().values() if r.cell.length == length and task in (None, r.cell.task)]


def _shared(model: Any, tokenizer: Any, request: Request) -> dict[str, Any]:
    return request.shared(model)


def _quiet(done: float, total: float, what: str) -> None:
    pass
