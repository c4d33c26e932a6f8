from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tests.cli.program import PLAIN, finish, invoke, spawn

from foveate.methods import METHODS
from foveate.models import BUILTIN
from foveate.papers import papers


def test_methods_json_lists_every_method(capsys) -> None:
    done = invoke(capsys, ["methods", "--json"])
    rows = json.loads(done.out)
    assert done.code == 0
    assert done.err == ""
    assert [row["id"] for row in rows] == list(METHODS)
    for row in rows:
        cls = METHODS[row["id"]]
        assert set(row) == {"id", "name", "paper", "slots", "needs_calibration", "parameters"}
        assert (row["name"], row["paper"], set(row["slots"])) == (cls.name, cls.paper, cls.slots)
        assert row["needs_calibration"] is cls.calibrated
        assert set(row["parameters"]) == {f.name for f in fields(cls) if f.name != "budget" or cls.budgeted}
        made = cls(**row["parameters"])
        assert made == cls()


def test_methods_for_people(capsys) -> None:
    done = invoke(capsys, ["methods"])
    for cls in METHODS.values():
        assert f"{cls.id}  {cls.name}, arXiv {cls.paper}".removesuffix(", arXiv ") in done.out


def test_papers_json_lists_the_catalog(capsys) -> None:
    done = invoke(capsys, ["papers", "--json"])
    rows = json.loads(done.out)
    assert [row["id"] for row in rows] == [paper.id for paper in papers()]
    assert all(set(row) == {"id", "title", "arxiv", "home", "status", "module", "tests"} for row in rows)
    states = {row["id"]: row["status"] for row in rows}
    assert states["snapkv"] == "works"
    assert set(states.values()) == {"works", "planned"}
    some = json.loads(invoke(capsys, ["papers", "--json", "--status", "works"]).out)
    assert some == [row for row in rows if row["status"] == "works"]
    assert invoke(capsys, ["papers", "--status", "wroks"]).code == 2


def test_models_says_what_is_there(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    rows = json.loads(invoke(capsys, ["models", "--json"]).out)
    assert [row["name"] for row in rows] == list(BUILTIN)
    assert all(row["cached"] is False and row["folder"] is None and row["disk_bytes"] > 0 for row in rows)
    from foveate.models.gguf_weights import key

    (tmp_path / "models" / key(BUILTIN["smollm2"].gguf_sha256)).mkdir(parents=True)
    (row,) = [r for r in json.loads(invoke(capsys, ["models", "--json"]).out) if r["name"] == "smollm2"]
    assert row["cached"] is True
    assert "ready" in invoke(capsys, ["models"]).out


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys\nfrom foveate.cli import main\ntry: main(['compare', '--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=PLAIN, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--question-seen" in done.stdout


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    process = spawn(["papers", "--json"], tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert process.stderr is not None
    assert process.stderr.read() == ""


@pytest.mark.parametrize("words", [["compare", "--nothing"], ["compre"], ["show"], ["calibrate", "x"]])
def test_wrong_usage_is_one_line(tmp_path: Path, words: list[str]) -> None:
    done = finish(spawn(words, tmp_path))
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.strip().splitlines()
    assert line.startswith("foveate: ")
    assert "--help" in line
