"""Workers of a sweep: processes that open the model once and measure one batch of samples of one cell after another."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from foveate.engine.apply import apply
from foveate.errors import FoveateError
from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.request import Request, make_samples
from foveate.evaluate.runner import Runner
from foveate.evaluate.setting import Setting, bind, parse_methods, settings_of
from foveate.evaluate.tally import Batches, Tally
from foveate.evaluate.work import Draft
from foveate.models import load
from foveate.models.shape import ModelShape
from foveate.tasks import Sample

DAEMON = "nvidia-cuda-mps-control"
LEAVE = 5.0
"""Seconds that workers have to end by themselves before they are killed."""

PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"


@dataclass(frozen=True)
class Job:
    """One batch of samples of a cell; or, with the tallies of all of its batches, the cell's record.

    Args:
        key: of the cell.
        start: first sample of the batch.
        dense: record of the same samples.
        tallies: by first sample.
    """

    key: str
    setting: Setting
    length: int
    task: str
    start: int
    dense: Record
    tallies: Mapping[int, Tally] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return f"{self.length} tokens, {self.task}, {self.setting.label}"

    @property
    def work(self) -> int:
        """In tokens of one row; a record is none."""
        return 0 if self.tallies else self.length


@dataclass(frozen=True)
class Failed:
    """A job or the opening of a model ended in an error that is no property of the cell.

    Args:
        crowded: the device's memory was full, maybe of what other workers hold.
    """

    reason: str
    trace: str = ""
    crowded: bool = False


class Died:
    """A worker's process ended; another one is being started in its place."""


Result = Tally | Record | Failed | Died | None
"""Of a job; None: a worker has opened the model."""


class Measured(Batches):
    """The batches of one cell, all of them."""

    def __init__(self, tallies: Mapping[int, Tally]) -> None:
        super().__init__()
        self.tallies = tallies

    def get(self, cell: str, start: int, count: int) -> Tally | None:
        return self.tallies.get(start)


class Worker:
    """The model, opened, and what jobs share.

    Args:
        request: all lengths and tasks.
        dtype, device: as for `foveate.load`.
    """

    def __init__(self, request: Request, dtype: str, device: str) -> None:
        self.request = request
        self.model, self.tokenizer = load(request.model, dtype=dtype, device=device)
        self.handle = apply(self.model, DENSE)
        self.samples: dict[tuple[int, str], list[Sample]] = {}
        self.runners: tuple[str, Runner | None] = ("", None)

    def do(self, job: Job) -> Tally | Record:
        """The tally of a batch; or a record, where it is asked for or the method refuses the cell."""
        with torch.inference_mode():
            runner = self._runner(job)
            (task,) = runner.request.tasks
            runner.log = draft = Draft([job.dense])
            (bound,) = runner.pending(job.length, task)
            if bound.binding is None or job.tallies:
                runner.batches = Measured(job.tallies)
                runner.measure(job.length, task, {})
                return draft.added[0]
            try:
                return runner.batch(bound, job.length, task, job.start)
            except FoveateError as error:
                if _crowded(error):  # there may be room without the neighbours
                    raise
                cell = runner.request.cell(job.setting, job.length, task)
                floor = getattr(error, "floor", None)
                return Record(cell=cell, status="refused", refused=str(error), floor=floor, **runner.facts)
            finally:
                if self.model.device.type == "cuda":
                    torch.cuda.empty_cache()  # neighbours on the same GPU need it

    def _runner(self, job: Job) -> Runner:
        """Of the job's cell and dense attention, with the samples of all jobs of its length and task."""
        known, runner = self.runners
        if runner is None or known != job.key:
            (task,) = (each for each in self.request.tasks if each.name == job.task)
            request = replace(self.request, lengths=(job.length,), tasks=(task,))
            if (job.length, job.task) not in self.samples:
                self.samples |= make_samples(request, self.tokenizer, _quiet)
            shape = ModelShape.of(self.model)
            settings = [*settings_of(parse_methods(DENSE), []), job.setting]
            bounds = [bind(self.handle, setting, {}, self.tokenizer) for setting in settings]
            made = (self.model, self.tokenizer, shape, request, self.handle, bounds, self.samples, Draft(), _quiet)
            runner = Runner(*made)
            self.runners = (job.key, runner)
        return runner


def _quiet(done: float, total: float, what: str) -> None:
    pass


# -- processes ---------------------------------------------------------------------------------------------------------


def serve(wire: Connection, request: Path, dtype: str, device: str, threads: int) -> None:
    """A worker's process: says None when the model is open, then answers each job with its result.

    Args:
        request: file with a pickled `Request`.
    """
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # whoever gives the jobs is gone
        try:
            worker = Worker(pickle.loads(request.read_bytes()), dtype, device)
        except Exception as error:
            wire.send(_failed(error))
            return
        wire.send(None)
        while True:
            job = wire.recv()
            try:
                result: Result = worker.do(job)
            except Exception as error:
                result = _failed(error)
            wire.send(result)


def _failed(error: Exception) -> Failed:
    words = str(error) if isinstance(error, FoveateError) else f"{type(error).__name__}: {error}"
    return Failed(words.strip().partition("\n")[0], traceback.format_exc(), _crowded(error))


def _crowded(error: BaseException) -> bool:
    return any(isinstance(each, torch.OutOfMemoryError) for each in (error, error.__context__))


class Processes:
    """Workers, each a process, in turns on the GPUs where there are any. Use as a context manager.

    Args:
        request, dtype, device: as for `Worker`.
        size: how many there are. gpus: how many GPUs they share.
    """

    def __init__(self, request: Request, dtype: str, device: str, size: int, gpus: int) -> None:
        self.size = size
        threads = max(1, (os.cpu_count() or 1) // max(1, size)) if device == "cpu" else 1
        self.folder = tempfile.TemporaryDirectory()
        # A process that is started with more than a pipe holds keeps its parent until it has imported everything: one
        # after the other, sixteen took two minutes.
        file = Path(self.folder.name) / "request"
        file.write_bytes(pickle.dumps(request))
        self.given = (file, dtype, device, threads)
        shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        self.gpus = shown.split(",")[:gpus] if device == "cuda" else []
        self.context = mp.get_context("spawn")
        self.wires: list[Connection] = []
        self.processes: list[BaseProcess] = []

    def __enter__(self) -> Processes:
        for number in range(self.size):
            wire, process = self._start(number)
            self.wires.append(wire)
            self.processes.append(process)
        return self

    def __exit__(self, *exc: object) -> None:
        for wire in self.wires:  # who waits for a job ends by itself
            wire.close()
        end = time.monotonic() + LEAVE
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()

    def _start(self, number: int) -> tuple[Connection, BaseProcess]:
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs, *self.given), daemon=True)
        shown = {"CUDA_VISIBLE_DEVICES": self.gpus[number % len(self.gpus)]} if self.gpus else {}
        with environment(shown), deaf():
            process.start()
        theirs.close()
        return mine, process

    def give(self, worker: int, job: Job) -> None:
        with contextlib.suppress(OSError):  # one that is dead is noticed by `wait`
            self.wires[worker].send(job)

    def wait(self, seconds: float) -> list[tuple[int, Result]]:
        """What came in within so many seconds, at least one thing if anything did, by worker."""
        found: list[tuple[int, Result]] = []
        for wire in wait(self.wires, seconds):
            worker = next(number for number, each in enumerate(self.wires) if each is wire)
            try:
                found.append((worker, self.wires[worker].recv()))
            except (EOFError, OSError):
                found.append((worker, Died()))
                self.processes[worker].join()
                self.wires[worker], self.processes[worker] = self._start(worker)
        return found


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables, for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C: who started them ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# -- CUDA's Multi-Process Service --------------------------------------------------------------------------------------


@contextlib.contextmanager
def shared_gpus(folder: Path) -> Iterator[bool]:
    """CUDA's Multi-Process Service for processes that are started meanwhile, with its pipes and logs in a folder.

    Yields whether it is there: not where its daemon is not installed or does not start. One that the environment names
    already is used and left running.
    """
    if PIPES in os.environ:
        yield True
        return
    folder = folder.absolute()  # the daemon works elsewhere
    program, places = shutil.which(DAEMON), {PIPES: str(folder / "pipe"), LOGS: str(folder / "log")}
    if program is None:
        yield False
        return
    for place in places.values():
        Path(place).mkdir(parents=True, exist_ok=True)
    with environment(places):
        try:
            with deaf():
                started = _control(program, ["-d"])
            yield started
        finally:
            with deaf():
                _control(program, [], "quit\n")


def _control(program: str, words: Sequence[str], said: str = "") -> bool:
    """Whether the daemon did what it was told. It sees all GPUs; each worker chooses its own."""
    seen: dict[str, Any] = {n: v for n, v in os.environ.items() if n != "CUDA_VISIBLE_DEVICES"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
    try:
        return subprocess.run([program, *words], input=said.encode(), env=seen, timeout=60, **quiet).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
