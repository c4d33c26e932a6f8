from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.cli.program import PLAIN, errors, finish, invoke, spawn
from tests.evaluate.small import LENGTH, small

import foveate
from foveate.evaluate.record import RECORDS, read
from foveate.methods import METHODS, Profile
from foveate.methods.profile import save_profile


def words(model: Path, out: Path, *more: object) -> list[object]:
    return [
        "compare",
        model,
        "--out",
        out,
        "--methods",
        "snapkv,quest(dense_layers=0)",
        "--budgets",
        "0.6",
        "--lengths",
        f"{LENGTH},{LENGTH + 60}",
        "--tasks",
        "niah_single_1,perplexity",
        "--samples",
        "2",
        "--repeats",
        "1",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, finish(spawn(words(model, Path("run")), folder))


def test_the_table_goes_to_stdout_and_the_run_to_its_folder(finished, model: Path) -> None:
    folder, done = finished
    assert done.code == 0, done.err
    assert "snapkv" in done.out
    assert "report: run/report.html" in done.out
    records = read(folder / "run")
    assert len(records) == 3 * 4
    assert (folder / "run" / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "run" / "run.json").read_text())["settings"]["samples"] == 2
    assert not [line for line in done.err.splitlines() if not line.startswith("foveate: ")]
    assert records[0].command == " ".join(
        [
            f"foveate compare {model} --methods 'snapkv,quest(dense_layers=0)' --budgets 0.6",
            f"--lengths {LENGTH},{LENGTH + 60} --tasks niah_single_1,perplexity --samples 2 --repeats 1 --out run",
        ]
    )


def test_json(finished, model: Path) -> None:
    """The same command again runs nothing, and gives what was measured."""
    folder, _ = finished
    before = (folder / "run" / RECORDS).read_bytes()
    done = finish(spawn(words(model, Path("run"), "--json"), folder))
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["cells"] == 12
    assert data["report"] == "run/report.html"
    assert {row["method"] for row in data["views"][0]["rows"]} == {"dense", "snapkv", "quest"}
    assert (folder / "run" / RECORDS).read_bytes() == before


def records_after(process: subprocess.Popen[str], file: Path, lines: int) -> bytes:
    """Wait until the run has written so many records."""
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        data = file.read_bytes() if file.exists() else b""
        if data.count(b"\n") >= lines:
            return data
        time.sleep(0.02)
    raise AssertionError(f"the run ended or hung before {lines} records: {process.poll()}")


def test_a_killed_run_goes_on_where_it_was(model: Path, finished, tmp_path: Path) -> None:
    process = spawn(words(model, Path("run")), tmp_path)
    written = records_after(process, tmp_path / "run" / RECORDS, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    torn = (tmp_path / "run" / RECORDS).read_bytes()
    assert 4 <= torn.count(b"\n") < 12
    with (tmp_path / "run" / RECORDS).open("ab") as file:
        file.write(b'{"schema": 1, "cell": {"mod')  # what a kill in the middle of a write leaves
    done = finish(spawn(words(model, Path("run")), tmp_path))
    assert done.code == 0, done.err
    final = (tmp_path / "run" / RECORDS).read_bytes()
    assert final.startswith(torn)
    assert final.startswith(written)
    keys = [json.dumps(json.loads(line)["cell"], sort_keys=True) for line in final.splitlines()]
    assert len(keys) == len(set(keys)) == 12
    whole = {r.cell.key(): r for r in read(finished[0] / "run")}
    for record in read(tmp_path / "run"):
        assert record.scores == whole[record.cell.key()].scores
        assert record.outcomes == whole[record.cell.key()].outcomes


def test_ctrl_c_leaves_one_line_and_valid_records(model: Path, tmp_path: Path) -> None:
    process = spawn(words(model, Path("run")), tmp_path)
    records_after(process, tmp_path / "run" / RECORDS, 2)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert done.out == ""
    last = done.err.strip().splitlines()[-1]
    count = len(read(tmp_path / "run"))
    assert last == f"foveate: stopped; {count} cells are in run: the same command with --out run goes on from there"
    assert "Traceback" not in done.err
    assert not (tmp_path / "run" / "report.html").exists()


# -- what cannot be ----------------------------------------------------------------------------------------------------


def bad(capsys, model: object, out: Path, *more: object) -> str:
    """The line of a command that must fail before it writes anything."""
    done = invoke(capsys, ["compare", model, "--out", out, *more])
    assert done.code == 2
    assert done.out == ""
    assert not out.exists()
    (line,) = errors(done)
    return line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "snpakv"], "methods='snpakv': no such method; there are"),
        (["--methods", "snapkv(windw=3)"], "snapkv has the parameters"),
        (["--methods", "snapkv(budget=0.5)|h2o(budget=0.5)"], "both fill the slot 'keep'"),
        (["--tasks", "nihs"], "tasks='nihs': no such task or group"),
        (["--budgets", "0"], "budget=0: give a whole number of tokens, at least 1"),
        (["--budgets", "0.0"], "budget=0.0: a ratio lies above 0"),
        (["--budgets", "1.5"], "budget=1.5: a ratio lies above 0 and at most at 1"),
        (["--lengths", "9000"], "lengths=9000: small has 2048 positions; give at most that"),
        (["--lengths", "64"], "lengths=64: niah_single_1 needs at least"),
        (["--lengths", "1k"], "lengths='1k': give whole numbers"),
        (["--lengths", "-5"], "lengths=-5"),
        (["--samples", "0"], "samples=0: give at least 1"),
        (["--repeats", "-1"], "repeats=-1: give 0"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "cuda:77"], "device='cuda:77'"),
        (["--methods", "duo-attention"], "run `foveate calibrate` first"),
        (["--methods", "snapkv,none.json"], "method='none.json': cannot be read"),
        (["--profile", "none.json"], "profile='none.json': cannot be read"),
    ],
)
def test_bad_arguments(capsys, model: Path, tmp_path: Path, more: list[str], said: str) -> None:
    given = {"--methods": "snapkv", "--tasks": "niah_single_1", "--lengths": str(LENGTH), "--samples": "1"}
    given |= dict(zip(more[::2], more[1::2], strict=True))
    line = bad(capsys, model, tmp_path / "out", *(word for pair in given.items() for word in pair))
    assert said.replace("small", str(model)) in line


@pytest.mark.parametrize(
    ("name", "said"), [("smolm2", "did you mean 'smollm2'?"), ("./nowhere", "no such file or folder")]
)
def test_unknown_models(capsys, tmp_path: Path, monkeypatch, name: str, said: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in bad(capsys, name, tmp_path / "out")


def test_an_empty_corpus(capsys, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "holds no text" in bad(capsys, model, tmp_path / "out", "--corpus", tmp_path / "empty.txt")
    assert "no such file or folder" in bad(capsys, model, tmp_path / "out", "--corpus", tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("Only this sentence stands here.")
    said = bad(
        capsys, model, tmp_path / "out", "--corpus", tmp_path / "short.txt", "--tasks", "perplexity", "--lengths", 1500
    )
    assert "short.txt" in said


def test_a_profile_of_another_model(capsys, model: Path, tmp_path: Path) -> None:
    name = next(name for name, cls in METHODS.items() if cls.calibrated)
    file = save_profile(Profile(name, "llama-1x1-000000000000", {}), tmp_path / "other.json")
    said = bad(capsys, model, tmp_path / "out", "--methods", name, "--profile", file, "--lengths", LENGTH)
    assert f"this profile of {name} was made on another model" in said
    said = bad(capsys, model, tmp_path / "out", "--methods", "snapkv", "--profile", file, "--lengths", LENGTH)
    assert "no method of this comparison takes it" in said


def test_a_model_that_a_method_cannot_take(capsys, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dynamic"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (copy / "config.json").write_text(json.dumps(config))
    said = bad(
        capsys, copy, tmp_path / "out", "--methods", "streaming-llm", "--lengths", LENGTH, "--tasks", "perplexity"
    )
    assert "streaming-llm: positions cannot be re-counted" in said


def test_a_folder_that_cannot_be_written(capsys, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    done = invoke(capsys, ["compare", model, "--out", file / "run", "--lengths", LENGTH, "--tasks", "perplexity"])
    assert done.code == 2
    assert f"{file}" in done.err.splitlines()[-1]
    assert file.read_text() == "in the way"


def test_a_disk_that_is_full_from_the_start(capsys, model: Path, tmp_path: Path, monkeypatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    assert f"{tmp_path}: no space left to write" in bad(capsys, model, tmp_path / "a" / "out", "--methods", "snapkv")


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
from foveate.cli import main
main()
"""


def test_a_full_disk(model: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 6000 bytes: the records that fit stay, and the next run goes on behind them."""
    arguments = [str(word) for word in words(model, Path("run"))]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments], cwd=tmp_path, env=PLAIN, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert "no space left to write; free some and run the same command again to resume" in last
    assert "Traceback" not in done.stderr
    data = (tmp_path / "run" / RECORDS).read_bytes()
    assert len(data) <= 6000
    assert data.endswith(b"\n")
    assert 1 <= len(read(tmp_path / "run")) < 12


# -- from Python -------------------------------------------------------------------------------------------------------


def test_compare_from_python(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = small()
    got = foveate.compare(
        model,
        tokenizer=tokenizer,
        methods=[METHODS["snapkv"](window=8)],
        budgets=[0.5, 0.3],
        lengths=LENGTH,
        tasks="perplexity",
        samples=2,
        repeats=0,
    )
    assert [(r.cell.method, r.cell.settings, r.cell.budget) for r in got.records] == [
        ("dense", {}, None),
        ("snapkv", {"window": 8}, "0.5"),
        ("snapkv", {"window": 8}, "0.3"),
    ]
    assert got.records[0].cell.model == "llama"
    assert got.out.parent == Path("runs")
    assert got.report.is_file()
    assert "snapkv" in got.table
    assert got.summary["cells"] == 3
    page = got.report.read_text()
    assert "pooling width along the keys" not in page  # cards carry the summary, not every argument
    assert "When the prompt is over" in page
    with pytest.raises(foveate.BadArgument, match="tokenizer"):
        foveate.compare(model)
    with pytest.raises(foveate.BadArgument, match="holds a run already"):
        foveate.compare(model, tokenizer=tokenizer, methods="snapkv", lengths=LENGTH, out=got.out, resume=False)
    assert torch.is_grad_enabled()
    assert os.listdir("runs") == [got.out.name]
