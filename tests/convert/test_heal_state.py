"""A healing that is stopped, killed or out of room goes on from where it was, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.convert.healable import byte_tokenizer, pair, same, small_text, values

from foveate.convert.healing.heal import heal
from foveate.convert.healing.recipe import Healing, Progress
from foveate.convert.healing.text import TokenText, token_text
from foveate.errors import BadArgument, FoveateError

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = byte_tokenizer()
SETTINGS: dict[str, Any] = {
    "tokens": 2048, "length": 64, "batch": 2, "accumulation": 2, "lr": 3e-3, "needles": 0.0, "generated": 0.25,
    "pool": 3, "evaluate_on": 128, "evaluate_every": 1000,
}  # fmt: skip
NAME = "healing-state.pt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TokenText:
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CACHE", str(folder / "cache"))
        return small_text(folder, 7)


def healed(text: TokenText, student: Any, teacher: Any, out: Path | None = None, **settings: Any) -> Healing:
    given = {"save_minutes": 0, "report_every": 1, **SETTINGS, **settings}
    return heal(student, teacher, text, tokenizer=TOKENIZER, out=out, **given)


def at(step: int, act: Callable[[], Any]) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.step == step:
            act()

    return watch


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise RuntimeError("the power is gone")


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"optimizer": "muon"}, {"trainable": "lora"}, {"precision": "bf16"}, {"out": 0}],
                         ids=["adamw", "muon", "lora", "masters", "a step after the state"])  # fmt: skip
def test_what_was_killed_goes_on_to_the_bit(how: dict[str, Any], text: TokenText, tmp_path: Path, seed: int) -> None:
    """Same weights, same evaluations as a run that nothing happened to; also where the last state is older."""
    teacher, student = pair(seed)
    settings = {key: value for key, value in how.items() if key != "out"}
    whole = healed(text, student, teacher, **settings)
    late = {"save_minutes": 1e9} if "out" in how else {}
    _, broken = pair(seed)
    started = values(broken)
    with pytest.raises(RuntimeError, match="power"):
        healed(text, broken, teacher, tmp_path, watch=at(4, crash), **settings)
    with pytest.raises(RuntimeError, match="power"):
        healed(text, broken, teacher, tmp_path, watch=at(6, crash), **settings, **late)
    assert {name: each.dtype for name, each in broken.named_parameters()} == {k: v.dtype for k, v in started.items()}
    _, fresh = pair(seed)
    record = healed(text, fresh, teacher, tmp_path, **settings)
    assert same(values(fresh), values(student))
    assert record.evaluations == whole.evaluations
    assert record.mix == whole.mix
    assert record.teacher_perplexity == whole.teacher_perplexity
    assert [each["loss"] for each in record.curve] == [each["loss"] for each in whole.curve]
    assert record.resumed == ([3 * 256] if late else [3 * 256, 5 * 256])
    assert record.tokens == 2048 == sum(record.mix.values())


def test_a_process_that_was_killed(text: TokenText, tmp_path: Path, seed: int) -> None:
    """For real, and where neither rich nor typer is installed."""
    program = f"""
        import os, signal, sys
        for name in ("rich", "typer", "gguf", "peft"):
            sys.modules[name] = None
        from pathlib import Path
        from tests.convert.healable import pair, small_text
        from tests.convert.test_heal_state import at, healed
        folder = Path({str(tmp_path)!r})
        os.environ["FOVEATE_CACHE"] = str(folder / "cache")
        teacher, student = pair({seed})
        text = small_text(folder, 3)
        healed(text, student, teacher, folder / "out", watch=at(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
        read = token_text(tmp_path / "documents", TOKENIZER, held_out=0.1)
    teacher, student = pair(seed)
    healed(read, student, teacher)
    _, fresh = pair(seed)
    record = healed(read, fresh, teacher, tmp_path / "out")
    assert record.resumed == [4 * 256]
    assert same(values(fresh), values(student))


def test_what_is_done_is_done(text: TokenText, tmp_path: Path, seed: int) -> None:
    """The same call again trains nothing and gives the same."""
    teacher, student = pair(seed)
    record = healed(text, student, teacher, tmp_path)
    stamp = (tmp_path / NAME).stat().st_mtime_ns
    _, fresh = pair(seed)
    again = healed(text, fresh, teacher, tmp_path, watch=lambda progress: crash())
    assert same(values(fresh), values(student))
    assert again == record
    assert (tmp_path / NAME).stat().st_mtime_ns == stamp
    # and so does one whose student is the healed one already
    assert healed(text, student, teacher, tmp_path) == record


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_ctrl_c(trainable: str, text: TokenText, tmp_path: Path, seed: int) -> None:
    """The step is finished, the state is whole, the words say how to go on, and it goes on to the bit."""
    teacher, student = pair(seed)
    healed(text, student, teacher, trainable=trainable)
    _, broken = pair(seed)
    before = signal.getsignal(signal.SIGINT)
    settings = {"save_minutes": 1e9, "report_every": 3, "trainable": trainable}
    with pytest.raises(KeyboardInterrupt) as stopped:
        healed(text, broken, teacher, tmp_path, watch=at(3, interrupt), **settings)
    said = f"stopped after 768 of 2048 tokens; the same call with out={str(tmp_path)!r} goes on from there"
    assert str(stopped.value) == said
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(each.name for each in tmp_path.iterdir()) in ([NAME], [".healing.lock", NAME])
    assert not any("lora" in name for name, _ in broken.named_parameters())
    record = healed(text, broken, teacher, tmp_path, **{**settings, "report_every": 1})
    assert record.resumed == [768]
    assert same(values(broken), values(student))


def test_ctrl_c_between_two_reports(
    text: TokenText, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is heard after the step."""
    from foveate.convert.healing.mixture import Mixture

    teacher, student = pair(seed)
    batch = Mixture.batch
    count = iter(range(100))
    monkeypatch.setattr(Mixture, "batch", lambda *given: (next(count) == 4 and interrupt(), batch(*given))[1])
    with pytest.raises(KeyboardInterrupt, match="stopped after 768 of 2048"):
        healed(text, student, teacher, tmp_path, report_every=100)
    assert torch.load(tmp_path / NAME, weights_only=True)["step"] == 3


def test_ctrl_c_without_a_folder(text: TokenText, seed: int) -> None:
    teacher, student = pair(seed)
    with pytest.raises(KeyboardInterrupt, match="nothing was saved, since no folder was given as out"):
        healed(text, student, teacher, watch=at(3, interrupt))
    assert not student.training


# -- a full disk -------------------------------------------------------------------------------------------------------


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "torch.save", "shutil.disk_usage"])
def test_a_full_disk_leaves_the_state_before(
    where: str, text: TokenText, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with a warning, and a later save may do; nothing half-written is left."""
    teacher, student = pair(seed)
    healed(text, student, teacher)
    _, other = pair(seed)
    old: list[bytes] = []

    def fill(progress: Progress) -> None:
        if progress.step == 4:
            old.append((tmp_path / NAME).read_bytes())
            monkeypatch.setattr(where, full)
        if progress.step == 6:
            assert (tmp_path / NAME).read_bytes() == old[0]
            assert [each.name for each in tmp_path.iterdir() if not each.name.startswith(".healing.lock")] == [NAME]
            monkeypatch.undo()

    with pytest.warns(UserWarning, match=r"cannot be saved \(No space left on device\); the state before it is kept"):
        healed(text, other, teacher, tmp_path, watch=fill)
    assert same(values(other), values(student))
    assert torch.load(tmp_path / NAME, weights_only=True)["step"] == 8


def test_ctrl_c_on_a_full_disk(text: TokenText, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so."""
    teacher, student = pair(seed)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(KeyboardInterrupt, match=r"cannot be saved .*; there is none before it"):
        healed(text, student, teacher, tmp_path, watch=at(3, interrupt), save_minutes=1e9)
    assert not (tmp_path / NAME).exists()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_another_healing_is_not_gone_on_with(text: TokenText, tmp_path: Path, seed: int) -> None:
    teacher, student = pair(seed)
    with pytest.raises(KeyboardInterrupt):
        healed(text, student, teacher, tmp_path, watch=at(2, interrupt), trainable="attention")
    held = (tmp_path / NAME).read_bytes()
    stranger, _ = pair(seed + 1)
    _, changed = pair(seed)
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    for words, given in (
        (r"lr=0\.003, seed=0\)", {"lr": 1e-3, "seed": 1}),
        (r"trainable='attention'", {"trainable": "all"}),
        (r"\(teacher=", {"teacher": stranger}),
        (r"\(student=", {"student": changed}),
    ):
        models = {"student": pair(seed)[1], "teacher": teacher, "trainable": "attention", **given}
        with pytest.raises(BadArgument, match=f"^out=.*holds a healing with other settings .*{words}") as error:
            healed(text, out=tmp_path, **models)
        assert "\n" not in str(error.value)
    assert (tmp_path / NAME).read_bytes() == held


def test_a_broken_file(text: TokenText, tmp_path: Path, seed: int) -> None:
    teacher, student = pair(seed)
    (tmp_path / NAME).write_bytes(b"PK\x03\x04 not a state")
    with pytest.raises(FoveateError, match=r"healing-state\.pt: cannot be read .*; remove it to begin again"):
        healed(text, student, teacher, tmp_path)


def test_two_at_once(text: TokenText, tmp_path: Path, seed: int) -> None:
    teacher, student = pair(seed)
    _, other = pair(seed)

    def second() -> None:
        with pytest.raises(BadArgument, match=r"^out=.*: another process is healing there"):
            healed(text, other, teacher, tmp_path)

    healed(text, student, teacher, tmp_path, watch=at(2, second))


def test_a_folder_that_cannot_be(text: TokenText, tmp_path: Path, seed: int) -> None:
    teacher, student = pair(seed)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadArgument, match=r"^out=.*cannot be made"):
        healed(text, student, teacher, tmp_path / "file" / "folder")


def test_a_broken_loss_is_not_saved(text: TokenText, tmp_path: Path, seed: int) -> None:
    teacher, student = pair(seed)

    def spoil() -> None:
        with torch.no_grad():
            student.lm_head.weight.fill_(float("nan"))

    with pytest.raises(FoveateError, match=rf"the loss is nan after 1024 tokens.*{NAME} holds the last good state"):
        healed(text, student, teacher, tmp_path, watch=at(3, spoil))
    assert torch.load(tmp_path / NAME, weights_only=True)["step"] < 4
