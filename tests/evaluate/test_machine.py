from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.devices import device, spread
from tests.evaluate.small import Brief, small

from foveate import compat
from foveate.evaluate.machine import describe
from foveate.evaluate.record import Record
from foveate.evaluate.request import Request
from foveate.evaluate.runner import run
from foveate.evaluate.setting import parse_budgets, parse_methods, settings_of
from foveate.tasks import corpus


def test_where_a_model_lies() -> None:
    alone = SimpleNamespace(device=torch.device("cuda", 1))
    assert compat.devices(alone) == [torch.device("cuda", 1)]
    assert compat.devices(SimpleNamespace(device=alone.device, hf_device_map={"": 1})) == [torch.device("cuda", 1)]
    places = {"a": 1, "b": "cuda:0", "c": torch.device("cuda", 1), "d": "cpu", "e": "disk"}
    found = compat.devices(SimpleNamespace(device=torch.device("cuda", 0), hf_device_map=places))
    assert found == [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]


def test_devices_that_are_alike_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [SimpleNamespace(name=name, total_memory=80 * 2**30) for name in ("H100", "H100", "A100")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts[device.index])
    gpus = [torch.device("cuda", i) for i in range(3)]
    assert describe(gpus[0]) == "H100, 80 GiB"
    assert describe(*gpus[:2]) == "2 x H100, 80 GiB"
    assert describe(*gpus) == "2 x H100, 80 GiB and A100, 80 GiB"


def test_a_comparison_over_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores what it scores on one device, and waits for all of them before it looks at the clock."""
    model, tokenizer = small()
    tasks = (Brief("perplexity"),)
    asked = Request(model="small", lengths=(300,), tasks=tasks, samples=1, seed=1, repeats=1, corpus=corpus())
    settings = settings_of(parse_methods("snapkv, quest"), parse_budgets("0.7"))

    def by_cell(records: list[Record]) -> dict[str, tuple[list[float], int]]:
        return {r.cell.key(): (r.scores, r.kv_bytes) for r in records}

    want = by_cell(run(model, tokenizer, asked, settings, tmp_path / "one"))
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    with spread(model) as apart:
        records = run(apart, tokenizer, asked, settings, tmp_path / "several")
    assert all(r.device.startswith("3 x lazy, ") for r in records)
    assert waited[:3] == [device(0), device(1), device(2)] and len(waited) % 3 == 0
    got = by_cell(records)
    assert got.keys() == want.keys()
    for key, (scores, held) in want.items():
        assert got[key][1] == held
        assert got[key][0] == pytest.approx(scores, rel=1e-4, abs=1e-4)
