"""The search from end to end on a small model: records, resume, the check and the file."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.cli.program import errors, invoke
from tests.evaluate.small import LENGTH, Brief, saved, small

import foveate
from foveate.engine.tuned import read_tuned
from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.record import read
from foveate.tuning import tune as tuning
from foveate.tuning.study import Goal
from foveate.tuning.tune import parse_loss
from foveate.tuning.verdict import Verdict, level_of


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuning.expand_tasks
    monkeypatch.setattr(tuning, "expand_tasks", lambda names: [Brief(task.name, 8) for task in whole(names)])


def tune(out: Path, **more: Any) -> foveate.Tuning:
    model, tokenizer = small()
    given: dict[str, Any] = {
        "methods": "snapkv,kivi",
        "tasks": "perplexity",
        "lengths": LENGTH,
        "samples": 5,
        "trials": 6,
        "max_loss": "3%",
    }
    return foveate.tune(model, tokenizer=tokenizer, out=out, **{**given, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune") / "run"


@pytest.fixture(scope="module")
def found(folder: Path) -> foveate.Tuning:
    with pytest.MonkeyPatch.context() as patch:
        whole = tuning.expand_tasks
        patch.setattr(tuning, "expand_tasks", lambda names: [Brief(task.name, 8) for task in whole(names)])
        return tune(folder)


def test_the_winner_is_checked_and_written(found: foveate.Tuning, folder: Path) -> None:
    assert found.file == folder / "tuned.json"
    assert found.setting is not None and found.setting in found.text
    assert found.verdict is not None and found.verdict.outcome.n == 5
    assert found.costs["kv-bytes"] == found.verdict.outcome.cost < 1
    assert found.costs["decode"] is not None
    tuned = read_tuned(found.file)
    assert tuned.evidence["verdict"] == found.verdict.to_json()
    assert tuned.evidence["command"].startswith("foveate tune")
    model, _ = small()
    with foveate.apply(model, found.file) as handle:
        assert handle.binding.composition == tuned.composition


def test_cells_are_ordinary_records(found: foveate.Tuning, folder: Path) -> None:
    searched, checked = read(folder), read(folder / "check")
    assert {record.cell.seed for record in searched} == {0, 1, 2}
    assert {record.cell.seed for record in checked} == {10_000}
    assert all(len(record.scores) == 2 for record in searched if record.status == "done")
    assert {record.cell.method for record in searched} >= {"dense", "snapkv", "kivi"}
    assert (folder / "check" / "report.html").is_file()
    assert sum(found.trials.values()) == 6


def test_the_same_call_goes_on(found: foveate.Tuning, folder: Path) -> None:
    before = {record.cell.key(): record for record in read(folder)}
    again = tune(folder, trials=2)
    assert sum(again.trials.values()) == 8
    after = {record.cell.key(): record for record in read(folder)}
    assert before.items() <= after.items()
    with pytest.raises(BadArgument, match=r"max_loss.*has 0\.03; give that"):
        tune(folder, max_loss=0.2)


def test_trials_that_the_clock_stopped_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuning.Work.chunk

    def late(self: Any, number: int, rows: Any) -> Any:
        whole(self, number, rows)
        raise tuning.Late

    monkeypatch.setattr(tuning.Work, "chunk", late)
    with pytest.raises(FoveateError, match="no trial ended within"):
        tune(tmp_path, trials=2)
    monkeypatch.setattr(tuning.Work, "chunk", whole)
    done = tune(tmp_path, trials=2)
    assert done.trials["stopped"] == 0
    assert sum(done.trials.values()) == 2


def test_what_the_clock_stopped_is_checked_if_nothing_else_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that kept the quality on half of their samples are candidates: fresh samples decide."""
    whole = tuning.Work.chunk

    def late(self: Any, number: int, rows: Any) -> Any:
        if number == 2:
            raise tuning.Late
        return whole(self, number, rows)

    monkeypatch.setattr(tuning.Work, "chunk", late)
    done = tune(tmp_path, trials=2, samples=8, max_loss="60%")
    assert done.trials["complete"] == 0 and done.trials["stopped"] >= 1
    assert done.checked and done.setting is not None and done.file is not None and done.file.exists()


def test_no_time_at_all(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="give more --minutes"):
        tune(tmp_path, minutes=1e-6)


def test_nothing_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every check fails there is no winner and no file, not even that of an earlier search."""

    class Over(Verdict):
        status = "over"  # type: ignore[assignment]

    monkeypatch.setattr(tuning, "Verdict", Over)
    (tmp_path / "tuned.json").write_text("{}")
    done = tune(tmp_path, samples=2, trials=4)
    assert (done.file, done.setting, done.costs) == (None, None, {})
    assert not (tmp_path / "tuned.json").exists()
    assert done.text.startswith("Nothing that was tried")
    costs = [verdict.outcome.cost for _, verdict in done.checked]
    assert 2 <= len(costs) <= tuning.CHECKS
    assert [verdict.outcome.difference.level for _, verdict in done.checked] == [level_of(i) for i in range(len(costs))]
    assert all(b > a for a, b in pairwise(costs))


def test_dense_that_can_do_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(FoveateError, match="dense scores 0"):
        tune(tmp_path, tasks="niah_single_1", trials=1, samples=1, note=said.append)
    assert "cannot show any loss" in said[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_loss": "0%"}, "share of dense's score above 0"),
        ({"max_loss": "much"}, "1% or 0.01"),
        ({"max_loss": 1}, "1% or 0.01"),
        ({"minutes": 0}, "above 0"),
        ({"samples": 0}, "at least 1"),
        ({"trials": 0}, "at least 1"),
        ({"target": "joy"}, "kv-bytes, decode, prefill"),
        ({"tasks": "perplexity,niah_single_1"}, "no common mean"),
        ({"methods": "duo-attention"}, "needs a profile"),
        ({"lengths": 9999}, "positions"),
    ],
)
def test_refusals_write_nothing(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        tune(tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_losses_as_people_write_them() -> None:
    assert parse_loss("1%") == parse_loss("0.01") == parse_loss(0.01) == 0.01


def test_stages_grow() -> None:
    stages = {chunks: Goal("decode", 0.01, chunks).stages for chunks in (1, 2, 3, 4, 9)}
    assert stages == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 9: [1, 2, 4, 8, 9]}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", saved(tmp_path / "model"), "--out", tmp_path / "run", "--methods", "kivi", "--tasks", "perplexity"]
    words += ["--lengths", LENGTH, "--samples", 2, "--trials", 2, "--max-loss", "5%"]
    done = invoke(capsys, [*words, "--json"])
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["setting"].startswith("kivi") and data["max_loss"] == 0.05
    assert Path(data["file"]).is_file()
    plain = invoke(capsys, words)
    assert plain.out.startswith("winner   kivi")
    wrong = invoke(capsys, [*words, "--target", "decode"])
    assert wrong.code == 2
    assert any("use another folder" in line for line in errors(wrong))
