"""Several processes heal one student together: what they make is what one process makes of the same text."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.convert.healable import byte_tokenizer, pair, small_text, values

from foveate.convert.healing.heal import heal

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as `torchrun` starts them, stopped by the first one's Ctrl-C, and started again: in float64 the weights
    are those of one process that takes both batches."""
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    text = small_text(tmp_path, 3)
    teacher, student = pair(seed, dtype=torch.float64)
    settings = {"tokens": 1536, "length": 64, "accumulation": 2, "lr": 1e-3, "needles": 0.0, "evaluate_on": 512}
    record = heal(student, teacher, text, tokenizer=byte_tokenizer(), batch=2, report_every=2, **settings)
    program = f"""
        import os, signal, sys
        from pathlib import Path
        from tests.convert.healable import byte_tokenizer, pair, values
        from foveate.convert.healing.heal import heal
        from foveate.convert.healing.text import token_text
        import torch
        folder, rank = Path({str(tmp_path)!r}), int(os.environ["RANK"])
        text = token_text(folder / "documents", byte_tokenizer(), held_out=0.1)
        stops = True
        def watch(progress):
            if stops and progress.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
        def run():
            teacher, student = pair({seed}, dtype=torch.float64)
            record = heal(student, teacher, text, tokenizer=byte_tokenizer(), batch=1, report_every=2,
                          out=folder / "out", watch=watch, **{settings!r})
            torch.save([values(student), record.json()], folder / f"rank-{{rank}}.pt")
        try:
            run()
        except KeyboardInterrupt as stopped:
            assert "goes on from there" in str(stopped), stopped
        else:
            raise SystemExit("not stopped")
        stops = False
        torch.distributed.barrier()
        run()
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in running:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    made = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, each in values(student).items():
        assert torch.equal(made[0][0][name], made[1][0][name])
        torch.testing.assert_close(made[0][0][name], each, rtol=0, atol=1e-9)
    for _, found in made:
        assert (found["processes"], found["tokens"], found["resumed"]) == (2, 1536, [512])
        assert found["mix"] == record.mix
        for one, other in zip(found["evaluations"], record.evaluations, strict=True):
            assert one["kl"] == pytest.approx(other.kl, rel=1e-6)
            assert one["perplexity"] == pytest.approx(other.perplexity, rel=1e-6)
        for one, other in zip(found["curve"], record.curve, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
