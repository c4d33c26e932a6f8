from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.cli.program import errors, invoke

from foveate.cli.calibrate import Workbench, calibration_arguments
from foveate.errors import BadArgument
from foveate.methods import METHODS
from foveate.methods.profile import load_profile

RECIPES = {name: inspect.signature(cls.calibrate).parameters.get("recipe") for name, cls in METHODS.items()}
CALIBRATED = next(name for name, recipe in RECIPES.items() if "GateRecipe" in str(recipe))
"""A method whose calibration can be told how many steps to make."""


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile") / "made" / "profile.json"


def test_a_profile_is_made_and_taken(capsys, model: Path, profile: Path, tmp_path: Path) -> None:
    done = invoke(capsys, ["calibrate", model, "--for", CALIBRATED, "--out", profile, "--steps", "2", "--json"])
    assert done.code == 0, done.err
    said = json.loads(done.out)
    made = load_profile(profile)
    assert (said["method"], said["model"]) == (made.method, made.model) == (CALIBRATED, made.model)
    assert made.provenance["steps"] == 2
    assert made.provenance["seconds"] > 0
    arguments = ["--methods", CALIBRATED, "--budgets", "0.7", "--profile", profile, "--lengths", 1200, "--samples", 1]
    arguments += ["--tasks", "perplexity", "--repeats", 0, "--out", tmp_path / "run", "--json"]
    done = invoke(capsys, ["compare", model, *arguments])
    assert done.code == 0, done.err
    (row,) = [r for r in json.loads(done.out)["views"][0]["rows"] if r["method"] == CALIBRATED]
    assert row["calibration_s"] == made.provenance["seconds"]
    assert row["kv_share"] < 0.75


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--for", "nothing"], "no such method"),
        (["--for", "snapkv"], "this method needs no calibration"),
        (["--for", CALIBRATED, "--stpes", "3"], "--stpes=3: the calibration of"),
        (["--for", CALIBRATED, "--steps"], "--steps='': give a value"),
        (["--for", CALIBRATED, "--steps", "0"], "steps=0: give at least 1"),
        (["--for", CALIBRATED, "extra"], "arguments='extra'"),
    ],
)
def test_bad_arguments_write_nothing(capsys, model: Path, tmp_path: Path, more: list[str], said: str) -> None:
    done = invoke(capsys, ["calibrate", model, "--out", tmp_path / "profile.json", *more])
    assert done.code == 2
    assert done.out == ""
    (line,) = errors(done)
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said_before_the_work(capsys, model: Path, tmp_path: Path) -> None:
    done = invoke(capsys, ["calibrate", model, "--for", CALIBRATED, "--out", tmp_path])
    assert done.code == 2
    assert "give a file that can be written" in done.err


@dataclass(frozen=True)
class Recipe:
    rate: float = 1.0
    name: str = "a"


class Calibrator:
    id = "calibrator"

    def calibrate(self, probe: Any, data: Any = None, *, recipe: Recipe | None = None, rounds: int = 3) -> None: ...


def test_options_become_keywords() -> None:
    method = Calibrator()
    assert calibration_arguments(method, []) == {}
    got = calibration_arguments(method, ["--rate=0.5", "--rounds", "7", "--name", "b"])
    assert got == {"recipe": Recipe(0.5, "b"), "rounds": 7}
    with pytest.raises(BadArgument, match="--rate, --name, --rounds"):
        calibration_arguments(method, ["--ratte", "1"])


def test_progress_adds_up() -> None:
    seen: list[tuple[float, float, str]] = []
    bench = Workbench(None, None, 0, lambda *step: seen.append(step))  # type: ignore[arg-type]
    report = bench.progress(4, "gates")
    report(1, "loss 2")
    report(3, "")
    assert seen == [(0, 4, "gates"), (1, 4, "gates, loss 2"), (4, 4, "gates")]
