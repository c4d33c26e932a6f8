"""The tool that completes a sweep, on a small model: in pieces it measures what a comparison measures at once."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.evaluate.small import saved

from foveate import compare
from foveate.errors import BadArgument, FoveateError
from foveate.evaluate import batch
from foveate.evaluate.record import Log, Record, read, read_manifest
from foveate.evaluate.tally import Batches

ROOT = Path(__file__).resolve().parents[2]
METHODS = "snapkv,quest,streaming-llm"
LEFT = "streaming-llm"
"""The method whose records are there."""
SAMPLES = 5


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules of the tool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        names = ("sweep", "sweep_grid", "sweep_worker")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison; at a budget of 0.01 a method is refused."""
    folder = tmp_path_factory.mktemp("whole")
    model = saved(folder / "small")
    asked: dict[str, Any] = {"lengths": (300, 400), "tasks": "perplexity", "samples": SAMPLES, "seed": 3}
    compare(str(model), methods=METHODS, budgets=(0.01, 0.5), repeats=0, device="cpu", out=folder / "run", **asked)
    return folder / "run"


@pytest.fixture
def partial(whole: Path, tool: Any, tmp_path: Path) -> Path:
    """The same as a sweep keeps it, without the cells of two methods."""
    folder = tmp_path / "partial"
    with Log(folder, read_manifest(whole)["settings"], read_manifest(whole)["command"]) as log:
        log.extend([tool.sweep_grid.slim(r) for r in read(whole) if r.cell.method in ("dense", LEFT)])
    return folder


def wanted(tool: Any, whole: Path) -> dict[str, Record]:
    return {r.cell.key(): tool.sweep_grid.slim(r) for r in read(whole) if r.cell.method not in ("dense", LEFT)}


def assert_same(got: list[Record], want: dict[str, Record]) -> None:
    """All but times and threads; scores in fp32 may differ by what else the shared prompt was captured for."""
    assert {r.cell.key() for r in got} == set(want) and len(got) == len(want)
    for record in got:
        other = want[record.cell.key()]
        assert record.scores == pytest.approx(other.scores, abs=1e-4)
        for one, two in zip(record.outcomes, other.outcomes, strict=True):
            assert one == {**two, "score": pytest.approx(two["score"], abs=2e-4)}
        scores = {"scores": [], "outcomes": [], "status": "refused", "refused": "", "created": "", "device": ""}
        plain = {**record.__dict__, **scores, "refused": record.refused}
        assert plain == {**other.__dict__, **scores, "refused": other.refused}
        assert record.status == other.status


class InProcess:
    """A crew of so many workers in this process. After `stop` jobs Ctrl-C comes."""

    def __init__(self, worker: Any, size: int, stop: int | None = None) -> None:
        self.worker, self.stop = worker, stop
        self.given: dict[int, Any] = dict.fromkeys(range(size))
        self.log: list[Any] = []

    def give(self, worker: int, job: Any) -> None:
        self.given[worker] = job

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        worker = random.choice(list(self.given))
        job = self.given.pop(worker)
        if self.stop is not None and len(self.log) >= self.stop:
            raise KeyboardInterrupt
        if job is None:
            return [(worker, None)]
        self.log.append(job)
        return [(worker, self.worker.do(job))]


def quiet(*step: Any) -> None:
    pass


def swept(tool: Any, partial: Path, state: Path, make: Any) -> list[Record]:
    """The records of a sweep by the crew that `make` makes of a worker."""
    grid = tool.sweep_grid.Grid.open(partial, METHODS)
    missing = grid.missing()
    with Log(state, grid.shared) as log, Batches(state) as batches:
        sweep = tool.sweep.Sweep(missing, grid.request, "cpu", log, batches, state / "errors.log")
        worker = tool.sweep_worker.Worker(grid.request, grid.shared["dtype"], "cpu")
        try:
            sweep.run(make(worker), 100.0, quiet)
        finally:
            worker.handle.remove()
        return list(log.done().values())


def test_a_sweep_that_is_stopped_goes_on_and_is_what_one_comparison_is(
    tool: Any, whole: Path, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(batch.AT_ONCE, "cpu", (2, 8192))  # three batches a cell
    crews: list[InProcess] = []

    def crew(stop: int | None) -> Any:
        return lambda worker: crews.append(InProcess(worker, 2, stop)) or crews[-1]

    for stop in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            swept(tool, partial, tmp_path / "state", crew(stop))
    got = swept(tool, partial, tmp_path / "state", crew(None))
    want = wanted(tool, whole)
    assert {r.status for r in want.values()} == {"done", "refused"}
    assert_same([tool.sweep_grid.slim(r) for r in got], want)
    batches = [(job.key, job.start) for crew in crews for job in crew.log if not job.tallies]
    done = [key for key, record in want.items() if record.status == "done"]
    assert sorted(pair for pair in batches if pair[0] in done) == sorted((key, n) for key in done for n in (0, 2, 4))


def test_when_the_time_is_over_nothing_is_begun_and_what_is_under_way_may_end(
    tool: Any, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tool.sweep, "time", SimpleNamespace(monotonic=lambda: clock.now))

    class Slow(InProcess):
        """Two workers are given a job each; before they have done it the hundred seconds are over."""

        stuck = False

        def wait(self, seconds: float) -> list[tuple[int, Any]]:
            if None in self.given.values():
                return [(worker, self.given.pop(worker)) for worker in list(self.given)]
            clock.now = max(clock.now + 1.0, 101.0)
            return [] if self.stuck and self.log else super().wait(seconds)

    crews: list[Slow] = []
    for stuck in (False, True):
        clock.now = 0.0
        monkeypatch.setattr(Slow, "stuck", stuck)
        swept(tool, partial, tmp_path / str(stuck), lambda worker: crews.append(Slow(worker, 2)) or crews[-1])
    assert [len(crew.log) for crew in crews] == [2, 1]
    assert clock.now == pytest.approx(100.0 + tool.sweep.GRACE, abs=1.0)


def test_the_command_measures_in_processes_and_merges(tool: Any, whole: Path, partial: Path, tmp_path: Path) -> None:
    words = ["--records", str(partial), "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    words += ["--methods", METHODS, "--device", "cpu", "--workers", "2", "--seconds", "200"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "sweep.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 of 8 missing cells" in done.stdout
    file = tmp_path / "out" / "records.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    outcomes = [one for line in lines for one in line["outcomes"]]
    assert outcomes and not any("prediction" in one or "references" in one for one in outcomes)
    assert all(one["score"] == round(one["score"], 4) for one in outcomes)
    before = (partial / "records.jsonl").read_bytes()
    assert tool.sweep_grid.merge([file], partial) == 8
    assert (partial / "records.jsonl").read_bytes().startswith(before)
    assert_same([r for r in read(partial) if r.cell.method not in ("dense", LEFT)], wanted(tool, whole))
    assert tool.sweep_grid.Grid.open(partial).missing() == []


def test_workers_are_started_side_by_side(tool: Any, partial: Path) -> None:
    """A process takes seconds to import everything, and reads what it is given behind that. A corpus is larger than a
    pipe holds: whoever gave it there would wait for each of them."""
    request = replace(tool.sweep_grid.Grid.open(partial, METHODS).request, command="x" * 2**22)
    started = time.monotonic()
    with tool.sweep_worker.Processes(request, "float32", "cpu", 2, 1) as crew:
        begun = time.monotonic() - started
        ready: list[int] = []
        while len(ready) < 2:
            ready += [worker for worker, result in crew.wait(1.0) if result is None]
        opened = time.monotonic() - started
    assert sorted(ready) == [0, 1] and begun < opened / 4


def test_what_is_missing_is_the_command_without_what_is_there(tool: Any, partial: Path) -> None:
    grid = tool.sweep_grid.Grid
    assert grid.open(partial).missing() == []  # only methods that have a record
    cells = [one.cell for one in grid.open(partial, "snapkv").missing((400,))]
    assert [(c.method, c.budget, c.length) for c in cells] == [("snapkv", "0.01", 400), ("snapkv", "0.5", 400)]
    with pytest.raises(FoveateError, match="no dense record of perplexity at 500 tokens"):
        grid.open(partial, "snapkv").missing((500,))
    manifest = json.loads((partial / "run.json").read_text())
    for change, words in (({"corpus_digest": "another"}, "the corpus is"), ({"repeats": 2}, "holds times")):
        changed = {**manifest, "settings": {**manifest["settings"], **change}}
        (partial / "run.json").write_text(json.dumps(changed))
        with pytest.raises(FoveateError, match=words):
            grid.open(partial)


def test_a_task_of_the_shortest_length_is_missing_there_alone(tool: Any, partial: Path) -> None:
    grid = tool.sweep_grid.Grid.open(partial, METHODS)
    (task,) = grid.request.tasks
    once = replace(task, name=tool.sweep_grid.SHORTEST_ONLY[0])
    dense = [r for r in grid.records if r.cell.method == "dense" and r.cell.length == 300]
    records = (*grid.records, *(replace(r, cell=replace(r.cell, task=once.name)) for r in dense))
    both = replace(grid, request=replace(grid.request, tasks=(task, once)), records=records)
    found = [one.cell for one in both.missing() if one.cell.task == once.name]
    assert len(found) == 6 and {cell.length for cell in found} == {300}


def test_merging_refuses_what_does_not_fit(tool: Any, whole: Path, partial: Path, tmp_path: Path) -> None:
    merge, write = tool.sweep_grid.merge, tool.sweep_grid.write
    good = [r for r in wanted(tool, whole).values() if r.status == "done"]
    first, before, file = good[0], (partial / "records.jsonl").read_bytes(), tmp_path / "bad.gz"
    moved = [{**one, "depths": [0.5]} for one in first.outcomes]
    bad = {
        "is there already": next(r for r in read(partial) if r.cell.method == LEFT),
        "other samples": replace(first, outcomes=moved),
        "other samples than the dense record: 4": replace(first, outcomes=first.outcomes[1:], scores=first.scores[1:]),
        "bytes of the dense cache": replace(first, kv_bytes_dense=first.kv_bytes_dense + 1),
        "no dense record": replace(first, cell=replace(first.cell, length=512)),
    }
    for words, record in bad.items():
        write([*good[1:], record], file)
        with pytest.raises(FoveateError, match=words):
            merge([file], partial)
    file.write_bytes(gzip.compress(b"no record\n"))
    with pytest.raises(BadArgument, match="give gzip of records"):
        merge([file], partial)
    for nothing in (b"", gzip.compress(b"")):
        file.write_bytes(nothing)
        with pytest.raises(BadArgument, match="holds no records"):
            merge([file], partial)
    write(good, file)
    with pytest.raises(FoveateError, match="is there already"):
        merge([file, file], partial)
    assert (partial / "records.jsonl").read_bytes() == before  # all or none
    assert merge([file], partial) == len(good)


def test_a_cell_that_fails_is_left_out_and_one_whose_worker_died_is_given_again(
    tool: Any, whole: Path, partial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    died: list[Any] = []

    class Broken(InProcess):
        def wait(self, seconds: float) -> list[tuple[int, Any]]:
            (found,) = super().wait(seconds)
            job = self.log[-1] if self.log and found[1] is not None else None
            if job is not None and job.setting.method == "snapkv" and job.length == 300:
                return [(found[0], tool.sweep_worker.Failed("broken here", "its trace"))]
            if job is not None and job.setting.method == "quest" and not died:
                died.append(job)
                self.given[found[0]] = None
                return [(found[0], tool.sweep_worker.Died())]
            return [found]

    got = swept(tool, partial, tmp_path / "state", lambda worker: Broken(worker, 2))
    left = {k: r for k, r in wanted(tool, whole).items() if (r.cell.method, r.cell.length) != ("snapkv", 300)}
    assert died
    assert_same([tool.sweep_grid.slim(r) for r in got], left)
    assert "300 tokens, perplexity, snapkv 0.5: broken here" in capsys.readouterr().err
    assert "its trace" in (tmp_path / "state" / "errors.log").read_text()


def test_a_worker_without_room_rests_and_others_do_its_job(
    tool: Any, whole: Path, partial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rests: list[int] = []

    class Crowded(InProcess):
        def wait(self, seconds: float) -> list[tuple[int, Any]]:
            found, result = super().wait(seconds)[0]
            if result is not None and not rests and any(self.given.values()):
                rests.append(found)
                return [(found, tool.sweep_worker.Failed("no room", crowded=True))]
            return [(found, result)]

        def give(self, worker: int, job: Any) -> None:
            assert worker not in rests
            super().give(worker, job)

    got = swept(tool, partial, tmp_path / "state", lambda worker: Crowded(worker, 2))
    assert len(rests) == 1
    assert_same([tool.sweep_grid.slim(r) for r in got], wanted(tool, whole))
    assert "memory is full; a worker rests" in capsys.readouterr().err


def test_a_worker_without_room_that_is_alone_fails(
    tool: Any, partial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(InProcess):
        def wait(self, seconds: float) -> list[tuple[int, Any]]:
            found, result = super().wait(seconds)[0]
            return [(found, result and tool.sweep_worker.Failed("no room", crowded=True))]

    assert swept(tool, partial, tmp_path / "state", lambda worker: Full(worker, 1)) == []
    assert "perplexity, snapkv 0.5: no room" in capsys.readouterr().err


def test_a_model_that_cannot_be_opened_ends_the_sweep(tool: Any, partial: Path, tmp_path: Path) -> None:
    class Shut(InProcess):
        def wait(self, seconds: float) -> list[tuple[int, Any]]:
            return [(0, tool.sweep_worker.Failed("no weights"))]

    with pytest.raises(FoveateError, match="cannot be opened: no weights"):
        swept(tool, partial, tmp_path / "state", lambda worker: Shut(worker, 1))


# -- CUDA's Multi-Process Service --------------------------------------------------------------------------------------

DAEMON = """#!/bin/sh
[ "$1" = -d ] && { echo "start $CUDA_MPS_PIPE_DIRECTORY $CUDA_VISIBLE_DEVICES" >> "$SAID"; exit; }
read line; echo "$line $CUDA_MPS_PIPE_DIRECTORY" >> "$SAID"
"""


@pytest.mark.parametrize("error", [None, FoveateError, KeyboardInterrupt])
def test_the_service_is_ended_whatever_happens(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    program, said = tmp_path / tool.sweep_worker.DAEMON, tmp_path / "said"
    program.write_text(DAEMON)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(said))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    pipe = str(tmp_path / "mps" / "pipe")
    try:
        with tool.sweep_worker.shared_gpus(tmp_path / "mps") as found:
            assert found
            assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == pipe
            assert said.read_text().split("\n") == [f"start {pipe} ", ""]
            if error is not None:
                raise error
    except (FoveateError, KeyboardInterrupt):
        assert error is not None
    assert said.read_text().split("\n") == [f"start {pipe} ", f"quit {pipe}", ""]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_without_a_daemon_or_with_somebody_elses_nothing_is_started(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    with tool.sweep_worker.shared_gpus(tmp_path / "mps") as found:
        assert not found
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "theirs")
    with tool.sweep_worker.shared_gpus(tmp_path / "mps") as found:
        assert found
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "theirs"
    assert not (tmp_path / "mps").exists()
