"""A converted model is saved whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tests.evaluate.small import small
from transformers import AutoModelForCausalLM

import foveate
from foveate.convert import saving
from foveate.convert.saving import save
from foveate.errors import BadArgument, FoveateError
from foveate.models import Loaded
from foveate.models.converted import container

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def made() -> Loaded:
    model, tokenizer = small(layers=2)
    return Loaded(container(model), tokenizer)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(made: Loaded, tmp_path: Path) -> None:
    model, tokenizer = made
    folder = save(model, tokenizer, tmp_path / "a" / "b", {"rungs": [1.5]})
    assert folder == tmp_path / "a" / "b"
    assert json.loads((folder / "ladder.json").read_text()) == {"rungs": [1.5]}
    again = foveate.load(folder, dtype="float32", device="cpu")
    assert torch.equal(logits(again.model), logits(model))
    assert again.tokenizer("some text")["input_ids"] == tokenizer("some text")["input_ids"]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(stock) is type(model)
    assert torch.equal(logits(stock), logits(model))
    assert names(tmp_path / "a") == ["b"]


def test_an_empty_folder_is_taken(made: Loaded, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (save(*made, tmp_path / "out") / "model.safetensors").is_file()


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [(_full_folder, "the folder is not empty"), (lambda path: path.write_text("mine"), "this is a file")],
    ids=["folder", "file"],
)
def test_what_is_there_stays(made: Loaded, tmp_path: Path, prepare: Any, said: str) -> None:
    prepare(tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(BadArgument, match=said):
        save(*made, tmp_path / "out")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_something_put_there_meanwhile_stays(made: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = made
    real = tokenizer.save_pretrained

    def slow(folder: Any, **options: Any) -> Any:
        _full_folder(tmp_path / "out")
        return real(folder, **options)

    monkeypatch.setattr(tokenizer, "save_pretrained", slow)
    with pytest.raises(BadArgument, match="something was put there meanwhile"):
        save(*made, tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["mine.txt"]


def test_no_room_is_known_before_writing(made: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FoveateError, match=r"no space left to write .* MB"):
        save(*made, tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (KeyboardInterrupt("stopped"), "stopped"),
        (RuntimeError("a fault of ours"), "a fault of ours"),
    ],
    ids=["full", "safetensors", "read-only", "ctrl-c", "bug"],
)
def test_a_failure_leaves_nothing(
    made: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    model, tokenizer = made

    def fail(folder: Any, **options: Any) -> None:
        assert (Path(folder) / "model.safetensors").is_file()
        raise error

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    disk = isinstance(error, (OSError, SafetensorError))
    with pytest.raises(FoveateError if disk else type(error), match=said) as caught:
        save(model, tokenizer, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_disk_that_fills_while_weights_are_written(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.evaluate.small import small\n"
        "from foveate.convert.saving import save\n"
        "from foveate.errors import FoveateError\n"
        "model, tokenizer = small(layers=1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    save(model, tokenizer, Path(sys.argv[1]) / 'out')\n"
        "except FoveateError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no space left to write" in done.stdout
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes(made: Loaded, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from foveate.convert.saving import staged\n"
        "with staged(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'model.safetensors').write_bytes(b'half')\n"
        "    print(partial, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    save(*made, tmp_path / "other")
    folder = save(*made, tmp_path / "out")  # beside a living one
    assert left.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    shutil.rmtree(folder)
    save(*made, tmp_path / "out")
    assert names(tmp_path) == ["other", "out"]
