"""Ray itself: one start with two actors on the processor. Who does what is tested in `test_scale`, without Ray."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.small import LENGTH, saved

from foveate.errors import BadArgument
from foveate.evaluate.cluster import RayCrew
from foveate.evaluate.record import Record, read
from foveate.evaluate.request import Request
from foveate.evaluate.scale import Here, Spread
from foveate.evaluate.setting import parse_budgets, parse_methods, settings_of
from foveate.models import load
from foveate.tasks import corpus, task

ray: Any = pytest.importorskip("ray", reason="Ray is not installed (extra 'ray')")


def measured(record: Record) -> tuple[Any, ...]:
    return (record.cell, record.scores, record.outcomes, record.kv_bytes, record.kv_bytes_peak, record.pairs_read)


def test_two_actors_measure_what_one_process_does_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    model = saved(tmp_path / "small")
    settings = settings_of(parse_methods("snapkv"), parse_budgets("0.6"))
    tasks = (replace(task("perplexity"), targets=8), replace(task("perplexity"), name="other", targets=4))
    asked = Request(model="small", lengths=(LENGTH,), tasks=tasks, samples=2, seed=3, repeats=0, corpus=corpus())
    with Spread("small", RayCrew(str(model), dtype="float32", device="cpu", workers=2)) as spread:
        got = spread.run(asked, settings, tmp_path / "spread", watch=lambda *step: None)
        assert spread.facts
        assert all(facts.dtype == "float32" for facts in spread.facts.values())
        with pytest.raises(BadArgument, match="lengths=9000: small has 2048 positions"):  # an error from over there
            spread.run(replace(asked, lengths=(9000,)), settings, tmp_path / "long", watch=lambda *step: None)
        elsewhere = spread.ask(lambda model, tokenizer: os.getpid())
        assert elsewhere != os.getpid()
        os.kill(elsewhere, signal.SIGKILL)
        other = spread.run(replace(asked, seed=4), settings, tmp_path / "spread", watch=lambda *step: None)
        assert spread.ask(lambda model, tokenizer: os.getpid()) != elsewhere
    assert not ray.is_initialized()
    assert {r.cell.seed for r in other} == {4}
    assert len(read(tmp_path / "spread")) == 2 * len(got) == 8
    here = Here("small", load(model, dtype="float32", device="cpu"))
    assert [measured(r) for r in got] == [
        measured(r) for r in here.run(asked, settings, tmp_path / "here", watch=lambda *step: None)
    ]
