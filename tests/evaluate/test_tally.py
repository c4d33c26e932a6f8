"""A run that is killed at any moment loses at most one batch of one cell, and ends as if nobody had killed it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.small import Brief, small
from tests.evaluate.test_runner import request, start

from foveate.evaluate import batch as batching
from foveate.evaluate import runner as running
from foveate.evaluate.answer import Answer
from foveate.evaluate.tally import BATCHES, Batches, Tally
from foveate.models import Loaded

METHODS = "snapkv, kivi, streaming-llm"


class Killed(BaseException):
    """What nobody catches."""


@pytest.fixture(scope="module")
def opened() -> Loaded:
    return small()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.AT_ONCE, "cpu", (2, 1 << 20))


def asked(**changes: Any) -> Any:
    return request(tasks=(Brief("perplexity", 4),), samples=5, **changes)


def counted(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[int]:
    """Answers that are made from now on, by samples; after `stop` of them the run is killed."""
    made: list[int] = []
    plain = running.answer

    def answer(batch: Any, logits: Any, samples: Any, *rest: Any) -> list[Answer]:
        if stop is not None and len(made) == stop:
            raise Killed
        made.append(len(samples))
        return plain(batch, logits, samples, *rest)

    monkeypatch.setattr(running, "answer", answer)
    return made


def facts(records: list[Any]) -> list[Any]:
    return [(r.cell.key(), r.scores, r.outcomes, r.kv_bytes, r.pairs_read, r.pairs_prefill) for r in records]


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_kill_loses_one_batch(opened: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Four settings, five samples in batches of two: twelve answers; a second kill on the way changes nothing."""
    whole = start(opened, tmp_path / "whole", asked(), METHODS)
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        counted(patch, stop)
        with pytest.raises(Killed):
            start(opened, out, asked(), METHODS)
    assert (out / BATCHES).exists()
    with monkeypatch.context() as patch:
        again = counted(patch, 0 if stop == 11 else 1)
        with pytest.raises(Killed):
            start(opened, out, asked(), METHODS)
        done = stop + len(again)
    made = counted(monkeypatch)
    records = start(opened, out, asked(), METHODS)
    assert done + len(made) == 12
    assert facts(records) == facts(whole)
    assert not (out / BATCHES).exists()


def test_a_torn_line_is_measured_again(opened: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start(opened, tmp_path / "whole", asked(), METHODS)
    out = tmp_path / "torn"
    with monkeypatch.context() as patch:
        counted(patch, 5)
        with pytest.raises(Killed):
            start(opened, out, asked(), METHODS)
    data = (out / BATCHES).read_bytes()
    (out / BATCHES).write_bytes(data[:-20])
    made = counted(monkeypatch)
    records = start(opened, out, asked(), METHODS)
    assert len(made) == 12 - 4
    assert facts(records) == facts(whole)


def test_a_full_disk_takes_no_batches(opened: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no record is not worth stopping for, and is no refusal of the method whose batch could not be kept."""
    whole = start(opened, tmp_path / "whole", asked(), METHODS)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveate.evaluate.tally.os.write", lambda f, d: full() if b'"answers"' in d else write(f, d))
    records = start(opened, tmp_path / "full", asked(), METHODS)
    assert facts(records) == facts(whole)
    assert not (tmp_path / "full" / BATCHES).exists()


write = os.write


def test_batches_come_back_as_they_were(tmp_path: Path) -> None:
    turns = (Answer("a", 1.0, 2, 3, 4, 5, 0.5, None), Answer("b", 0.0, 1, 3, 3, 3, None, 0.25))
    tally = Tally(
        [Answer(["a", "b"], 0.5, 3, 3, 4, 5, 0.5, 0.25, turns), Answer([-0.5, -1.5], -1.0)], {"a": 1.5}, {"b": 2}
    )
    with Batches(tmp_path) as batches:
        batches.add("cell", 4, tally)
    found = Batches(tmp_path)
    assert found.get("cell", 4, 2) == tally
    assert found.get("cell", 4, 1) is None and found.get("cell", 0, 2) is None
    found.drop()
    assert not (tmp_path / BATCHES).exists() and found.get("cell", 4, 2) is None
