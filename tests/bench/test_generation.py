"""Benches on the processor: contexts made without a prompt, floors, rows that cannot be had, the record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.cli.program import invoke

from foveate import compat
from foveate.bench.clock import Timing, clock, rates
from foveate.bench.early import of_each_kind
from foveate.bench.generation import PLAIN, Bench, read_bytes, weight_bytes
from foveate.bench.pairs import dense_pairs
from foveate.bench.prompt import filled, plain
from foveate.engine.apply import apply, resolve
from foveate.errors import BadArgument
from foveate.methods.base import METHODS
from foveate.methods.profile import load_profile, save_profile
from foveate.models import ModelShape, tiny
from foveate.models.named import NAMED, named

FAMILIES = ["llama", "gemma3", "deepseek-v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_cache_is_one_that_read_a_prompt(family: str) -> None:
    """Same lengths, same bytes, same kind of answers as after a forward over as many tokens."""
    model = tiny(family, kv_heads=4)
    with apply(model, "snapkv", budget=0.5, window=8) as handle, torch.no_grad():
        made = filled(handle.binding, 120, rows=2)
        read = handle.cache()
        model(input_ids=torch.randint(0, 256, (2, 120)), past_key_values=read, use_cache=True)
        for a, b in zip(made.couriers(), read.couriers(), strict=True):
            assert (a.store.lengths == b.store.lengths).all()
            assert a.columns == b.columns
        assert made.nbytes == read.nbytes
        out = model(input_ids=torch.zeros(2, 1, dtype=torch.int64), past_key_values=made, use_cache=True)
        assert out.logits.isfinite().all()


@pytest.mark.parametrize("method", ["xkv", "kivi", "retrieval-attention"])
def test_a_filled_cache_is_packed_joined_and_indexed(method: str) -> None:
    """As a prompt leaves it: layers that are held together, what stands in the host's memory, what is made of it."""
    model = tiny("llama", layers=4, kv_heads=2)
    settings = {"xkv": {"budget": 0.4}, "retrieval-attention": {"sink": 4, "recent": 16, "k": 8, "queries": 32}}
    with apply(model, method, **settings.get(method, {})) as handle, torch.no_grad():
        made, read, dense = filled(handle.binding, 240), handle.cache(), 0
        model(input_ids=torch.randint(0, 256, (1, 240)), past_key_values=read, use_cache=True)
        for a, b in zip(made.couriers(), read.couriers(), strict=True):
            assert (a.nbytes, a.host_nbytes) == (b.nbytes, b.host_nbytes)
            assert {n: {k: x.shape for k, x in v.items()} for n, v in a.prepared.items()} == {
                n: {k: x.shape for k, x in v.items()} for n, v in b.prepared.items()
            }
            dense += 240 * 2 * 2 * 16 * 4
        assert made.nbytes < 0.8 * dense
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=made, use_cache=True)
        assert out.logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_cache(family: str) -> None:
    model = tiny(family)
    cache = plain(model, 50)
    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 51
    assert out.logits.isfinite().all()


def test_bytes_read_are_those_of_the_selection() -> None:
    """Dense reads all that it holds; Quest reads its pages, the first layers and the bounds."""
    model = tiny("llama", layers=4, kv_heads=4)
    shape = ModelShape.of(model)
    slot = shape.kv_bytes_per_slot(0)
    with torch.no_grad():
        with apply(model, "dense") as handle:
            cache = filled(handle.binding, 100)
            assert read_bytes(handle.binding, cache, 1) == pytest.approx(4 * 101 * slot, rel=1e-6)
            assert cache.get_seq_length() == 100
        with apply(model, "quest", page=4, tokens=20, share="group", dense_layers=2) as handle:
            cache = filled(handle.binding, 100)
            bounds = 2 * (cache.layers[2].store.nbytes - cache.layers[0].store.nbytes)
            got = read_bytes(handle.binding, cache, 1)
            assert 2 * 101 * slot + 2 * 16 * slot < got < 2 * 101 * slot + 2 * 24 * slot + 2 * bounds
        with apply(model, "tokenselect", init=2, local=8, k=10) as handle:  # all keys between vote
            cache = filled(handle.binding, 100)
            assert read_bytes(handle.binding, cache, 1) == 4 * (20 * slot + (101 - 8 - 2) * 4 * 16 * 4)
            assert cache.meter is None


def test_rows() -> None:
    model = tiny("llama", kv_heads=4)
    shape = ModelShape.of(model)
    applied = [resolve(name, shape, budget) for name, budget in (("dense", None), ("snapkv", 0.25))]
    rows = list(Bench(prompt=True, steps=2).run(model, applied, [200]))
    assert [row.method for row in rows] == [PLAIN, "dense", "snapkv"]
    first, dense, sparse = rows
    assert first.kv_bytes == shape.dense_kv_bytes(200 + 10)
    assert sparse.kv_bytes < 0.4 * dense.kv_bytes and sparse.read_bytes < 0.4 * dense.read_bytes
    for row in rows:
        assert row.prefill is not None and row.decode is not None and row.decode.repeats == 2
        assert row.weight_bytes == weight_bytes(model) and row.floor_s > 0
        json.dumps(row.as_json(), allow_nan=False)


def test_a_method_that_cannot_be_had_is_a_row_that_says_why() -> None:
    model = tiny("llama", max_positions=256)
    applied = [resolve("snapkv", ModelShape.of(model), 0.25)]
    (row,) = Bench(steps=1, baseline=False).run(model, applied, [20])
    assert row.decode is None and "budget" in row.refused


def test_clock() -> None:
    assert Timing.of([3.0, 1.0, 2.0]).median == 2.0
    assert Timing.of([1.0]).repeats == 1
    timing = clock(lambda: torch.ones(1000).sum(), torch.device("cpu"), repeats=5)
    assert 0 < timing.low <= timing.median <= timing.high
    machine = rates(torch.device("cpu"))
    assert machine.bytes_per_s > 1e8 and machine.flops > 1e8
    assert machine.floor(machine.bytes_per_s) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in NAMED if name != "qwen3-8b"])
def test_named_shapes(name: str) -> None:
    """Their geometry is the published one; only a layer is built here."""
    with torch.device("meta"):
        shape = ModelShape.of(NAMED[name]())
    tokens = {"llama3-8b": 131072, "deepseek-v2-lite": 27 * 576 * 2, "smollm2-135m": 23040}
    assert shape.dense_kv_bytes(1) // (1 if shape.dtype.itemsize == 2 else 2) == tokens[name]


def test_names_that_are_none() -> None:
    with pytest.raises(BadArgument, match="llama3-8b"):
        named("llama4")
    with pytest.raises(BadArgument, match="1 to 30"):
        named("smollm2-135m", layers=31)


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    words = "bench e2e smollm2-135m --layers 1 --cpu --lengths 96 --methods dense,kivi --steps 2 --json"
    done = invoke(capsys, [*words.split(), "--out", out])
    assert done.code == 0, done.err
    data = json.loads(out.read_text())
    assert json.loads(done.out)["rows"] == data["rows"]
    assert [row["method"] for row in data["rows"]] == [PLAIN, "dense", "kivi"]
    assert data["command"].startswith("foveate bench e2e smollm2-135m") and "--cpu" in data["command"]
    assert {"device", "versions", "rates", "shape", "layers"} <= set(data)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["decode", "llama4"], "llama3-8b"),
        (["decode", "smollm2-135m", "--lengths", "3"], "16 tokens"),
        (["prefill", "smollm2-135m", "--methods", "nosuch"], "nosuch"),
        (["e2e", "smollm2-135m", "--steps", "0"], "1 or more"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = invoke(capsys, ["bench", *arguments, "--cpu"])
    assert done.code == 2
    assert says in done.err and len(done.err.strip().splitlines()) <= 2


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.calibrated))
def test_random_weights_need_no_calibration(name: str, tmp_path: Path) -> None:
    """Every method that wants a profile makes one up for the bench, and the row says so."""
    model = tiny("llama", layers=4, kv_heads=4)
    method = METHODS[name]()
    made = method.stand_in(ModelShape.of(model))
    assert made is not None and made.arbitrary
    assert load_profile(save_profile(made, tmp_path / "profile.json")) == made
    applied = [resolve(method, ModelShape.of(model), profile=made)]
    (row,) = Bench(steps=1, baseline=False).run(model, applied, [100])
    assert row.arbitrary == (name,) and row.as_json()["arbitrary"] == [name]
    assert row.decode is not None or "budget" in row.refused, row.refused


def test_pairs_of_a_prompt_are_counted() -> None:
    """Density is that of the spans, counting is no part of the time, and the floor falls with what is read."""
    model = tiny("llama", kv_heads=4)
    shape = ModelShape.of(model)
    applied = [resolve(name, shape, budget) for name, budget in (("dense", None), ("streaming-llm", 40))]
    dense, sparse = Bench(prompt=True, steps=1, baseline=False).run(model, applied, [200])
    span = sum(min(i + 1, 40) for i in range(200)) / (200 * 201 / 2)
    assert dense.density == 1 and sparse.density == pytest.approx(span, rel=0.02)
    assert 0 < sparse.prefill_floor_s < dense.prefill_floor_s
    got = sparse.as_json()
    assert got["prefill_of_floor"] == pytest.approx(got["prefill_ms"] / got["prefill_floor_ms"])
    layer = shape.layers[0]
    assert dense_pairs(layer, 200) == layer.num_heads * 200 * 201 // 2
    assert dense_pairs(replace(layer, window=8), 20) == layer.num_heads * sum(min(i + 1, 8) for i in range(20))


def test_a_method_that_breaks_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", kv_heads=4)
    applied = [resolve(name, ModelShape.of(model), budget) for name, budget in (("snapkv", 0.5), ("dense", None))]

    def broken(*given: object) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr(METHODS["snapkv"], "score", broken)
    first, second = Bench(steps=1, baseline=False).run(model, applied, [100])
    assert first.refused == "ValueError: no such luck" and second.decode is not None


def test_the_first_prompt_ends_behind_a_layer_of_each_kind() -> None:
    """It only compiles; what is timed reads all layers."""
    model = tiny("gemma3", layers=8)
    applied, done = [resolve("snapkv", ModelShape.of(model), 0.5)], []
    hooks = [
        module.register_forward_hook(lambda *args, number=i: done.append(number))
        for i, module in enumerate(compat.attention_modules(model))
    ]
    (row,) = Bench(prompt=True, steps=0, repeats=2, baseline=False).run(model, applied, [100])
    assert row.prefill is not None and row.prefill.repeats == 2
    assert done == [*range(4), *range(8), *range(8)]
    done.clear()
    list(Bench(prompt=True, steps=0, baseline=False, profile=True).run(model, applied, [100]))
    assert done == [*range(8), *range(8)]
    for hook in hooks:
        hook.remove()
    assert of_each_kind("aaaaab") == 6 and of_each_kind("ab") == 4


@pytest.mark.parametrize("how", [Bench(prompt=True, limit=1e-6), Bench(steps=3, limit=1e-6)])
def test_a_row_that_takes_too_long_is_given_up(how: Bench) -> None:
    model = tiny("llama")
    rows = list(how.run(model, [resolve("dense", ModelShape.of(model), None)], [100]))
    assert len(rows) == 2
    assert all("more than the limit" in row.refused and row.decode is None for row in rows)
    assert not any(module._forward_pre_hooks for module in model.modules())
    (row, _) = replace(how, limit=60.0).run(model, [resolve("dense", ModelShape.of(model), None)], [100])
    assert not row.refused and row.decode is not None
