"""Runs that are spread: the same records as of one process, whoever measures them and whatever happens to workers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.crew import InProcess
from tests.evaluate.small import LENGTH, Brief, saved, small

import foveate
from foveate.cli.options import with_ray_named
from foveate.errors import BadArgument, FoveateError
from foveate.evaluate import cluster
from foveate.evaluate.record import RECORDS, Record, read, read_manifest
from foveate.evaluate.request import Request
from foveate.evaluate.scale import Died, Here, Spread
from foveate.evaluate.setting import Setting, parse_budgets, parse_methods, settings_of
from foveate.evaluate.work import Work
from foveate.evaluate.worker import Facts, Stopped, Worker
from foveate.models import Loaded, load
from foveate.tasks import corpus, task
from foveate.tasks.corpora import Corpus

TASKS = ("niah_single_1", "niah_multikey_1", "perplexity")


def quiet(done: float, total: float, what: str) -> None:
    pass


def some_settings(text: str = "snapkv, quest(dense_layers=0), flexprefill") -> list[Setting]:
    return settings_of(parse_methods(text), parse_budgets("0.6"))


def measured(record: Record) -> tuple[Any, ...]:
    """All of a record that is not a time."""
    return (record.cell, record.scores, record.outcomes, record.kv_bytes, record.kv_bytes_peak, record.pairs_read)


# -- real workers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "small")


def workers_of(model: Path, size: int = 2, pick: int = 0) -> InProcess:
    return InProcess(size, lambda _: Worker(str(model), "float32", "cpu"), pick)


@pytest.fixture(scope="module")
def asked() -> Request:
    tasks = (Brief("niah_single_1", 6), Brief("perplexity", 6))
    return Request(model="small", lengths=(LENGTH,), tasks=tasks, samples=2, seed=3, repeats=1, corpus=corpus())


@pytest.fixture(scope="module")
def alone(model: Path, asked: Request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone")
    opened = Loaded(*load(model, dtype="float32", device="cpu"))
    return out, Here("small", opened).run(asked, some_settings(), out, watch=quiet)


@pytest.mark.parametrize("pick", [0, -1])
def test_the_records_are_those_of_one_process(model: Path, asked: Request, alone, tmp_path: Path, pick: int) -> None:
    seen: list[tuple[float, float]] = []
    with Spread("small", workers_of(model, pick=pick)) as spread:
        got = spread.run(asked, some_settings(), tmp_path, watch=lambda a, b, _: seen.append((a, b)))
        names = spread.ask(lambda model, tokenizer, word: (type(model).__name__, word), "x")
    assert names == ("LlamaForCausalLM", "x")
    assert [measured(r) for r in got] == [measured(r) for r in alone[1]]
    assert read_manifest(tmp_path)["settings"] == read_manifest(alone[0])["settings"]
    assert all(r.repeats == 1 and r.prefill_s and r.decode_ms for r in got)
    first, second = (r for r in got if r.cell.method == "snapkv")
    assert first.prefill_s == second.prefill_s  # timed once for a length
    shares = [done / total for done, total in seen if total]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_run_goes_on_with_and_without_workers(model: Path, asked: Request, alone, tmp_path: Path) -> None:
    whole = (alone[0] / RECORDS).read_bytes().splitlines(keepends=True)
    (tmp_path / RECORDS).write_bytes(b"".join(whole[:3]))  # of the first group one setting is missing
    (tmp_path / "run.json").write_bytes((alone[0] / "run.json").read_bytes())
    with Spread("small", workers_of(model)) as spread:
        got = spread.run(asked, some_settings(), tmp_path, watch=quiet)
        assert [measured(r) for r in got] == [measured(r) for r in alone[1]]
        assert (tmp_path / RECORDS).read_bytes().startswith(b"".join(whole[:3]))
        assert got[0].prefill_s == alone[1][0].prefill_s  # what was timed before stands
        before = (tmp_path / RECORDS).read_bytes()
        assert before.count(b"\n") == len(whole)
        assert spread.run(asked, some_settings(), tmp_path, watch=quiet) == got
    assert Here("small", small()).run(asked, some_settings(), tmp_path, watch=quiet) == got
    assert (tmp_path / RECORDS).read_bytes() == before


def test_what_cannot_be_run_writes_nothing(model: Path, asked: Request, tmp_path: Path) -> None:
    with Spread("small", workers_of(model)) as spread:
        with pytest.raises(BadArgument, match="has 2048 positions"):
            spread.run(replace(asked, lengths=(4096,)), some_settings(), tmp_path / "out", watch=quiet)
        with pytest.raises(BadArgument, match="cannot be read"):
            spread.run(asked, some_settings(), tmp_path / "out", profiles=["./none.json"], watch=quiet)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path: Path, asked: Request) -> None:
    with (
        Spread("nowhere", workers_of(tmp_path / "nowhere")) as spread,
        pytest.raises(BadArgument, match="no such file or folder"),
    ):
        spread.run(asked, some_settings(), tmp_path / "out", watch=quiet)


def test_a_worker_leaves_a_job_that_it_is_told_to_stop(model: Path) -> None:
    worker = Worker(str(model), "float32", "cpu")
    worker.job = 7
    worker._watch(1.0, 2.0, "a")
    assert worker.at() == (1.0, "a")
    worker.stop(7)
    with pytest.raises(Stopped):
        worker._watch(1.5, 2.0, "b")
    worker.job = 8
    worker._watch(2.0, 2.0, "c")


def test_compare_and_tune_give_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crews: list[InProcess] = []

    def hire(source: str, **given: Any) -> InProcess:
        assert (given["address"], given["workers"]) == ("", 2)
        crews.append(workers_of(Path(source)))
        return crews[-1]

    monkeypatch.setattr(cluster, "RayCrew", hire)
    spread = {"ray": True, "ray_workers": 2}
    given: dict[str, Any] = {"methods": "snapkv", "lengths": LENGTH, "tasks": "perplexity", "device": "cpu"}
    given |= {"dtype": "float32"}
    here = foveate.compare(model, out=tmp_path / "a", samples=2, repeats=0, **given)
    there = foveate.compare(model, out=tmp_path / "b", samples=2, repeats=0, **spread, **given)
    assert [measured(r) for r in here.records] == [measured(r) for r in there.records]
    assert there.records[0].command.endswith(f"--device cpu --ray local --ray-workers 2 --out {tmp_path / 'b'}")
    assert there.report.is_file()
    given |= {"trials": 3, "max_loss": 0.5, "samples": 2}
    one = foveate.tune(model, out=tmp_path / "c", **given)
    other = foveate.tune(model, out=tmp_path / "d", **spread, **given)
    assert one.setting == other.setting
    assert one.trials == other.trials
    for name in ("c", "d"):
        assert (tmp_path / name / "tuned.json").is_file()
    assert [measured(r) for r in read(tmp_path / "c")] == [measured(r) for r in read(tmp_path / "d")]
    assert [crew.closed for crew in crews] == [True, True]


# -- who does what -----------------------------------------------------------------------------------------------------


class Fake:
    """A worker without a model. `dies` names jobs ("measure 100 perplexity") and how often each costs a worker."""

    def __init__(self, dies: dict[str, int] | None = None, machine: str = "m", dtype: str = "float32") -> None:
        self.dies, self.facts = {} if dies is None else dies, Facts(dtype, "cpu", machine, {})
        self.until = 0

    def do(self, job: int, method: str, *args: Any) -> Any:
        words = " ".join([method, *(str(a) for a in args if isinstance(a, int | str))])
        if self.dies.get(words, 0):
            self.dies[words] -= 1
            raise Died("killed")
        if job <= self.until:
            raise Stopped
        return getattr(self, method)(*args)

    def join(self) -> Facts:
        return self.facts

    def prepare(self, order: Any) -> dict[str, Any]:
        return {"samples": 1}

    def plan(self, order: Any, have: list[Record]) -> Work:
        done = {(r.cell.length, r.cell.task) for r in have}
        asked = order.request
        groups = {(n, t.name): 10.0 for n in asked.lengths for t in asked.tasks if (n, t.name) not in done}
        return Work(groups, dict.fromkeys({n for n, _ in groups}, 5.0) if asked.repeats else {})

    def costs(self, order: Any, have: list[Record], length: int) -> dict[Any, Any]:
        return {}

    def measure(self, order: Any, have: list[Record], length: int, name: str, known: Any) -> list[Record]:
        return [
            Record(
                cell=order.request.cell(setting, length, task(name)),
                scores=[1.0],
                outcomes=[{}],
                kv_bytes=1,
                kv_bytes_dense=1,
            )
            for setting in order.settings
        ]

    def at(self) -> tuple[float, str]:
        return (3.0, "")

    def stop(self, job: int) -> None:
        self.until = job

    def leave(self) -> None:
        pass


def plain(**changes: Any) -> Request:
    tasks = tuple(task(name) for name in TASKS)
    base = Request(model="m", lengths=(100, 200), tasks=tasks, samples=1, repeats=1, corpus=Corpus("c", "Text."))
    return replace(base, **changes)


def start(crew: InProcess, out: Path, request: Request | None = None, watch: Any = quiet) -> list[Record]:
    with Spread("m", crew) as spread:
        return spread.run(request or plain(), some_settings("snapkv"), out, watch=watch)


def test_times_are_taken_by_one_worker_while_no_other_is_there(tmp_path: Path) -> None:
    crew = InProcess(3, lambda _: Fake(), pick=-1)
    start(crew, tmp_path)
    methods = [method for _, method, _ in crew.log]
    last = len(methods) - 1 - methods[::-1].index("costs")
    assert methods[: last + 1] == ["join", "prepare", "plan", "costs", "costs"]
    assert {(worker, beside) for worker, _, beside in crew.log[: last + 1]} == {(0, 0)}
    assert methods.count("join") == 3
    assert {worker for worker, method, _ in crew.log if method == "measure"} == {0, 1, 2}


def test_whoever_is_still_opening_the_model_is_sent_away_before_times_are_taken(tmp_path: Path) -> None:
    crew = InProcess(2, lambda _: Fake())
    with Spread("m", crew) as spread:
        spread.run(plain(repeats=0, lengths=(100,)), some_settings("snapkv"), tmp_path, watch=quiet)
        spread.joining[crew.submit(1, "join")] = 1
        spread.facts.pop(1, None)
        spread.run(plain(lengths=(200,)), some_settings("snapkv"), tmp_path / "b", watch=quiet)
    assert set(crew.dismissed) == {1}


def test_without_times_all_workers_start_at_once(tmp_path: Path) -> None:
    crew = InProcess(9, lambda _: Fake())
    start(crew, tmp_path, plain(repeats=0))
    assert [method for _, method, _ in crew.log[:6]].count("join") >= 1
    assert len(crew.workers) == 6  # no more than there are groups


def test_a_group_whose_worker_died_is_given_to_another(tmp_path: Path) -> None:
    dies = {"measure 100 perplexity": 1, "costs 200": 1}
    crew = InProcess(2, lambda _: Fake(dies))
    records = start(crew, tmp_path)
    assert len(records) == len(read(tmp_path)) == 2 * 3 * 2
    assert not any(dies.values())


def test_a_group_that_costs_two_workers_ends_the_run(tmp_path: Path) -> None:
    crew = InProcess(2, lambda _: Fake({"measure 200 perplexity": 1}))
    with pytest.raises(
        FoveateError, match=r"200 tokens, perplexity: 2 workers died at it \(killed\); what is complete"
    ):
        start(crew, tmp_path)
    done = {(r.cell.length, r.cell.task, r.cell.method) for r in read(tmp_path)}
    assert {(100, name, method) for name in TASKS for method in ("dense", "snapkv")} <= done
    assert not [cell for cell in done if cell[:2] == (200, "perplexity")]
    assert crew.closed
    assert len(start(InProcess(2, lambda _: Fake()), tmp_path)) == 12  # and goes on from there


def test_workers_that_die_over_the_model(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"2 workers died while they opened m \(killed\)"):
        start(InProcess(2, lambda _: Fake({"join": 1})), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("repeats", "fits"), [(1, False), (0, True)])
def test_workers_on_machines_of_two_kinds(tmp_path: Path, repeats: int, fits: bool) -> None:
    crew = InProcess(2, lambda number: Fake(machine=f"machine {number}"), pick=-1)
    if fits:
        assert len(start(crew, tmp_path, plain(repeats=repeats))) == 12
    else:
        with pytest.raises(FoveateError, match="differ in their machine, machine 0 and machine 1: take machines of"):
            start(crew, tmp_path, plain(repeats=repeats))


def test_workers_with_two_precisions(tmp_path: Path) -> None:
    crew = InProcess(2, lambda number: Fake(dtype=f"float{16 * (number + 1)}"), pick=-1)
    with pytest.raises(FoveateError, match="differ in their dtype, float16 and float32"):
        start(crew, tmp_path, plain(repeats=0))


def test_ctrl_c_leaves_whole_groups_and_ends_the_workers(tmp_path: Path) -> None:
    left = [3]

    class Tired(Fake):
        def measure(self, *args: Any) -> list[Record]:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return super().measure(*args)

    crew = InProcess(2, lambda _: Tired())
    with pytest.raises(KeyboardInterrupt):
        start(crew, tmp_path)
    assert crew.closed
    assert not crew.stopped  # they are ended, not asked
    assert len(read(tmp_path)) == 2 * 2


def test_a_watch_that_ends_the_run_frees_the_workers_for_the_next(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def watch(done: float, total: float, what: str) -> None:
        if total and done > 25:
            raise Enough

    crew = InProcess(2, lambda _: Fake())
    with Spread("m", crew) as spread:
        with pytest.raises(Enough):
            spread.run(plain(), some_settings("snapkv"), tmp_path, watch=watch)
        assert crew.stopped
        kept = len(read(tmp_path))
        assert 0 < kept < 12
        joins = sum(method == "join" for _, method, _ in crew.log)
        assert len(spread.run(plain(), some_settings("snapkv"), tmp_path, watch=quiet)) == 12
        assert sum(method == "join" for _, method, _ in crew.log) == joins  # the model was kept


def test_progress_tells_of_all_workers(tmp_path: Path) -> None:
    said: list[tuple[float, float, str]] = []
    start(InProcess(2, lambda _: Fake(), pick=-1), tmp_path, watch=lambda *step: said.append(step))
    words = [what for _, _, what in said]
    assert words[0] == "a worker opens the model and writes samples"
    assert "1 opening the model" in words
    assert "100 tokens, niah_multikey_1, 2 workers" in words or "100 tokens, niah_single_1, 2 workers" in words
    assert [done for done, _, _ in said] == sorted(done for done, _, _ in said)
    assert said[-1] == (70.0, 70.0, "done")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_spread(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, tokenizer = small()
    out = tmp_path / "out"
    with pytest.raises(BadArgument, match=r"model='LlamaForCausalLM': with ray every worker opens the model by itself"):
        foveate.compare(opened, tokenizer=tokenizer, ray=True, out=out)
    with pytest.raises(BadArgument, match=r"ray_workers=2: give ray"):
        foveate.compare(model, ray_workers=2, out=out)
    with pytest.raises(BadArgument, match=r"ray_workers=0: give at least 1"):
        foveate.compare(model, ray=True, ray_workers=0, out=out)
    with pytest.raises(BadArgument, match=r"device='cuda:1': with ray give auto"):
        foveate.tune(model, ray=True, device="cuda:1", out=out)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FoveateError, match=r"needs ray: install foveate with the extra 'ray' \(foveate\[ray\]\)"):
        foveate.compare(model, ray=True, out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["compare", "--ray"], ["compare", "--ray", "local"]),
        (["compare", "--ray", "smollm2"], ["compare", "--ray", "local", "smollm2"]),
        (["tune", "--ray", "--out", "x"], ["tune", "--ray", "local", "--out", "x"]),
        (["tune", "--ray", "--out=a:b"], ["tune", "--ray", "local", "--out=a:b"]),
        (["compare", "--ray", "10.0.0.1:6379", "m"], ["compare", "--ray", "10.0.0.1:6379", "m"]),
        (["compare", "--ray", "auto"], ["compare", "--ray", "auto"]),
        (["compare", "--ray=auto"], ["compare", "--ray=auto"]),
    ],
)
def test_a_bare_option(words: list[str], meant: list[str]) -> None:
    assert with_ray_named(words) == meant
