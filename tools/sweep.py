"""Measures the cells that a sweep lacks, in many processes, and adds measured ones to its records.

    python tools/sweep.py --seconds 500 --workers 28 --gpus 2
    python tools/sweep.py merge runs/sweep/records.jsonl.gz

The first writes what it measured to `--out`; what is not complete stays in `--state`, from where a later call with the
same state goes on. It may be called on one machine and its file merged on another. Each worker opens the model once and
is given one batch of samples of one cell at a time, by itself: what a method prepares of a prompt may depend on the
budget (which keys are indexed, for one), so that nothing but the samples is shared between cells. Nothing is timed, as
workers share the GPUs. The corpus must be the run's, which is the documentation of a certain Python.

Processes that share a GPU take turns on it, and each wait of one for the device then lasts as long as the turns of all
others: 28 processes on 2 GPUs measured 52 cells in 545 s. With CUDA's Multi-Process Service their kernels run side by
side: 72 cells in 170 s. Where `nvidia-cuda-mps-control` is found, the service is started for the run and ended with it;
`--no-mps` leaves it alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer

from foveate.cli.app import exit_code
from foveate.cli.options import whole_numbers
from foveate.cli.screen import Watcher, say
from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.batch import rows_at_once
from foveate.evaluate.record import RECORDS, Log, Record
from foveate.evaluate.request import Request, Watch
from foveate.evaluate.scale import LIVES, LOOK
from foveate.evaluate.tally import Batches, Tally
from sweep_grid import Grid, Missing, merge, write
from sweep_worker import Died, Failed, Job, Processes, Result, shared_gpus

GRACE = 60.0
"""Seconds that jobs under way have when the time is over. A batch takes some tens of them, and is lost otherwise."""

TRACES = "errors.log"
"""Name of the file in the state folder with the tracebacks of jobs that failed."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").partition("\n")[0])


class Crew(Protocol):
    """Workers. Each says None once it is ready, and may then be given one job after another."""

    def give(self, worker: int, job: Job) -> None: ...

    def wait(self, seconds: float) -> list[tuple[int, Result]]: ...


class Sweep:
    """The missing cells: their batches are given out in order, and a cell is recorded when all of its own are there.

    Args:
        device: its type decides how many samples are a batch.
        log, batches: where records and tallies are kept; what they hold is not measured again.
    """

    def __init__(
        self, missing: Sequence[Missing], request: Request, device: str, log: Log, batches: Batches, traces: Path
    ) -> None:
        self.log, self.batches, self.traces = log, batches, traces
        self.jobs: deque[Job] = deque()
        self.tallies: dict[str, dict[int, Tally]] = {}
        """Of each cell that has no record yet, by first sample."""
        self.counts: dict[str, int] = {}
        """How many batches each of them has."""
        self.failed: dict[str, str] = {}
        self.died: Counter[str] = Counter()
        done = log.done()
        for one in missing:
            key, length = one.cell.key(), one.cell.length
            if key not in done:
                rows = rows_at_once(length, device)
                starts = range(0, request.samples, rows)
                known = {n: batches.get(key, n, min(rows, request.samples - n)) for n in starts}
                self.tallies[key] = {n: tally for n, tally in known.items() if tally is not None}
                self.counts[key] = len(starts)
                jobs = [Job(key, one.setting, length, one.cell.task, n, one.dense) for n in starts]
                self.jobs += [job for job in jobs if job.start not in self.tallies[key]] or [self._whole(jobs[0])]

    def _whole(self, job: Job) -> Job:
        """The job of a cell's record."""
        return Job(job.key, job.setting, job.length, job.task, 0, job.dense, self.tallies[job.key])

    def run(self, crew: Crew, seconds: float, watch: Watch) -> None:
        """Measure for so many seconds. What is under way then may end within `GRACE` seconds, or else is dropped.

        Raises:
            FoveateError: the model cannot be opened, or workers died over it; or the state cannot be written.
        """
        end, lost = time.monotonic() + seconds, 0
        free: list[int] = []
        busy: dict[int, Job] = {}
        done, total = 0, sum(job.work for job in self.jobs)
        watch(0.0, 0.0, "opening the model")
        while time.monotonic() < (end + GRACE if busy else end) and (self.jobs or busy):
            for worker, result in crew.wait(LOOK):
                job = busy.pop(worker, None)
                if job is None and isinstance(result, Failed):
                    raise FoveateError(f"the model cannot be opened: {result.reason}")
                if isinstance(result, Died):
                    lost += job is None
                    if lost >= LIVES:
                        raise FoveateError(f"{lost} workers died while they opened the model; give fewer --workers")
                    free = [each for each in free if each != worker]
                elif job is not None and busy and isinstance(result, Failed) and result.crowded:
                    self.jobs.append(job)  # the others go on with the memory there is; this worker rests
                    say(f"{job.what}: the device's memory is full; a worker rests")
                    continue
                else:
                    free.append(worker)
                if job is not None:
                    self.take(job, result)
                    done += 0 if isinstance(result, Died) else job.work
            while free and self.jobs and time.monotonic() < end:
                job = self.jobs.popleft()
                if job.key in self.tallies and job.key not in self.failed:
                    busy[free[0]] = job
                    crew.give(free.pop(0), job)
                else:  # refused or failed over another batch
                    done += job.work
            what = next((job.what for job in busy.values()), "opening the model")
            watch(done, total, f"{what}, {len(self.tallies)} cells left")

    def take(self, job: Job, result: Result) -> None:
        """What came of a job."""
        if job.key not in self.tallies:  # refused meanwhile, over another batch
            return
        if isinstance(result, Tally):
            self.batches.add(job.key, job.start, result)
            self.tallies[job.key][job.start] = result
            if len(self.tallies[job.key]) == self.counts[job.key]:
                self.jobs.appendleft(self._whole(job))
        elif isinstance(result, Record):
            self.log.append(result)
            del self.tallies[job.key]
        elif isinstance(result, Failed):
            self._fail(job, result.reason)
            with self.traces.open("a") as file:
                file.write(f"{job.what}, from sample {job.start}\n{result.trace}\n")
        else:
            self.died[job.key] += 1
            if self.died[job.key] >= LIVES:
                self._fail(job, f"{LIVES} workers died at it")
            else:
                self.jobs.appendleft(job)

    def _fail(self, job: Job, reason: str) -> None:
        """Leave a cell out of this run."""
        if job.key not in self.failed:
            self.failed[job.key] = reason
            say(f"{job.what}: {reason}")


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(help="Begin no batch after so long; the same call goes on.")] = 500.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with the model.")] = os.cpu_count() or 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that they share.")] = 1,
    device: Annotated[str, typer.Option(help="cuda or cpu; the run's own if nothing is given.")] = "",
    methods: Annotated[str, typer.Option(help='By commas, or "all"; else those that have a record.')] = "",
    lengths: Annotated[str, typer.Option(help="Context lengths by commas; else those of the run.")] = "",
    records: Annotated[Path, typer.Option(help="Folder with records.jsonl and run.json.")] = Path("results/sweep"),
    state: Annotated[Path, typer.Option(help="Folder of what was measured.")] = Path("runs/sweep"),
    out: Annotated[Path | None, typer.Option(help="Folder for records.jsonl.gz; else that of the state.")] = None,
    no_mps: Annotated[bool, typer.Option("--no-mps", help="Start no Multi-Process Service.")] = False,
) -> None:
    """Measure the cells that are missing, and write them to records.jsonl.gz."""
    if context.invoked_subcommand is not None:
        return
    with Watcher("sweep") as watch:
        watch(0.0, 0.0, "reading the records")
        grid = Grid.open(records, methods)
        missing = grid.missing(whole_numbers("lengths", lengths))
        device = device or grid.shared["device"]
        if device not in ("cpu", "cuda"):
            raise BadArgument("device", device, "give cpu or cuda; --gpus says how many are shared")
        if device == "cuda" and not torch.cuda.is_available():
            raise BadArgument("device", device, "there is no GPU here; give cpu")
        shared: dict[str, Any] = {**grid.shared, "device": device}
        with Log(state, shared, grid.request.command) as log, Batches(state) as batches:
            sweep = Sweep(missing, grid.request, device, log, batches, state / TRACES)
            size = min(workers, len(sweep.jobs))
            service = shared_gpus(state / "mps") if device == "cuda" and size and not no_mps else nullcontext(no_mps)
            try:
                with service as found, Processes(grid.request, grid.shared["dtype"], device, size, gpus) as crew:
                    if device == "cuda" and not found:
                        say("CUDA's Multi-Process Service is not there: workers on one GPU take turns")
                    sweep.run(crew, seconds, watch)
            except KeyboardInterrupt:
                say(f"stopped; {len(log.done())} cells and batches of others are in {state}: the same call goes on")
                raise typer.Exit(130) from None
            done = log.done()
            file = (out or state) / f"{RECORDS}.gz"
            measured = [done[one.cell.key()] for one in missing if one.cell.key() in done]
            write(measured, file)
            if not sweep.tallies:
                batches.drop()
    print(f"{len(measured)} of {len(missing)} missing cells are in {file}; {len(sweep.failed)} failed")
    if sweep.failed:
        raise typer.Exit(1)


@app.command("merge")
def add(
    files: Annotated[list[Path], typer.Argument(help="What `sweep.py` wrote.")],
    records: Annotated[Path, typer.Option(help="Folder with records.jsonl.")] = Path("results/sweep"),
) -> None:
    """Add measured cells to the records: all of them, or none where one does not fit."""
    print(f"{merge(files, records)} cells added to {records}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool and leave it: 2 after one line on stderr, 1 where a cell failed, 130 when it was interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nor may `timeout` leave the service running
    sys.exit(exit_code(lambda: app(args=arguments, prog_name="sweep", standalone_mode=False)))


if __name__ == "__main__":
    main()
