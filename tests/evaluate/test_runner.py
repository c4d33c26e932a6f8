from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.evaluate.small import LENGTH, Brief, small

from foveate.engine.apply import apply, compose
from foveate.engine.binding import Binding
from foveate.errors import BadArgument, FoveateError
from foveate.evaluate import batch as batching
from foveate.evaluate import runner as running
from foveate.evaluate.batch import Batch
from foveate.evaluate.record import DENSE, RECORDS, Record
from foveate.evaluate.request import Request
from foveate.evaluate.runner import run
from foveate.evaluate.setting import parse_budgets, parse_methods, settings_of
from foveate.models import Loaded
from foveate.models.shape import ModelShape
from foveate.tasks import corpus, task

METHODS = "snapkv, h2o, kivi, streaming-llm, quest, flexprefill"


@pytest.fixture(scope="module")
def opened() -> Loaded:
    return small()


def request(**changes: Any) -> Request:
    base = Request(
        model="small",
        lengths=(LENGTH,),
        tasks=(Brief("niah_single_1"), Brief("perplexity")),
        samples=3,
        seed=1,
        repeats=0,
        corpus=corpus(),
    )
    return replace(base, **changes)


def start(opened: Loaded, out: Path, asked: Request, methods: str = METHODS, budgets: str = "0.7", **more: Any):
    settings = settings_of(parse_methods(methods), parse_budgets(budgets))
    return run(opened.model, opened.tokenizer, asked, settings, out, **more)


def by_method(records: list[Record]) -> dict[str, Record]:
    return {r.cell.method: r for r in records if r.cell.task == "perplexity"}


@pytest.fixture(scope="module")
def finished(opened: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    out = tmp_path_factory.mktemp("run")
    return out, start(opened, out, request(repeats=1))


def test_one_record_per_cell_and_the_folder_holds_them(finished) -> None:
    out, records = finished
    assert len(records) == 7 * 2
    lines = [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]
    assert [line["cell"]["method"] for line in lines[:7]] == [
        DENSE,
        "snapkv",
        "h2o",
        "kivi",
        "streaming-llm",
        "quest",
        "flexprefill",
    ]
    assert {r.cell.key() for r in records} == {Record.from_json(json.dumps(line)).cell.key() for line in lines}
    assert [r.cell.budget for r in by_method(records).values()] == [None, *["0.7"] * 5, None]
    assert all(r.status == "done" and len(r.scores) == 3 for r in records)


def test_every_method_gets_the_same_samples(finished) -> None:
    _, records = finished
    for name in ("niah_single_1", "perplexity"):
        asked = {
            json.dumps([(o["index"], o["references"], o["depths"]) for o in r.outcomes])
            for r in records
            if r.cell.task == name
        }
        assert len(asked) == 1


def test_what_is_held_and_read_follows_the_budget(finished) -> None:
    records = by_method(finished[1])
    share = {name: r.kv_bytes / r.kv_bytes_dense for name, r in records.items()}
    assert share[DENSE] == 1
    for name in ("snapkv", "h2o", "kivi", "streaming-llm"):
        assert share[name] < 0.75, name
    for name in ("quest", "flexprefill"):
        assert share[name] >= 1, name
    read = {name: r.pairs_read for name, r in records.items()}
    assert read[DENSE] == read["kivi"] == 1
    assert read["quest"] == pytest.approx(0.7, abs=0.03)
    assert read["snapkv"] == pytest.approx(0.7, abs=0.03)
    prompt = {name: r.pairs_prefill for name, r in records.items()}
    assert prompt[DENSE] == prompt["snapkv"] == prompt["quest"] == 1
    assert prompt["streaming-llm"] < 0.95
    assert records[DENSE].scores != records["snapkv"].scores


def test_costs_are_measured_beside_dense(finished) -> None:
    for record in finished[1]:
        assert record.repeats == 1
        assert min(record.prefill_s, record.prefill_dense_s, record.decode_ms, record.decode_dense_ms) > 0
        assert record.kv_bytes_peak >= record.kv_bytes
        assert record.versions["torch"] == torch.__version__
        assert record.device
    costs = by_method(finished[1])
    # what evicts when the prompt is over held all of one layer on the way; a window never does
    assert costs["snapkv"].kv_bytes_peak > costs["snapkv"].kv_bytes
    assert costs[DENSE].prefill_s == costs[DENSE].prefill_dense_s
    assert costs[DENSE].decode_ms == costs[DENSE].decode_dense_ms


def test_two_runs_agree_in_everything_but_time(opened: Loaded, finished, tmp_path: Path) -> None:
    again = start(opened, tmp_path, request())
    for a, b in zip(finished[1], again, strict=True):
        assert (a.cell, a.scores, a.outcomes, a.kv_bytes, a.pairs_read) == (
            b.cell,
            b.scores,
            b.outcomes,
            b.kv_bytes,
            b.pairs_read,
        )


def test_finished_cells_are_not_run_again(opened: Loaded, finished, tmp_path: Path, monkeypatch) -> None:
    """A run that was cut behind its fifth cell ends as the whole one did, and measures only what is missing."""
    source, whole = finished
    lines = (source / RECORDS).read_bytes().splitlines(keepends=True)
    (tmp_path / RECORDS).write_bytes(b"".join(lines[:5]) + lines[5][: len(lines[5]) // 2])
    (tmp_path / "run.json").write_bytes((source / "run.json").read_bytes())
    answered: list[str] = []
    original = running.answer
    monkeypatch.setattr(running, "answer", lambda b, *rest: answered.append(b.cache.owner.id) or original(b, *rest))
    records = start(opened, tmp_path, request(repeats=1))
    assert answered == ["quest", "flexprefill", DENSE, "snapkv", "h2o", "kivi", "streaming-llm", "quest", "flexprefill"]
    assert (tmp_path / RECORDS).read_bytes().startswith(b"".join(lines[:5]))
    assert [r.scores for r in records] == [r.scores for r in whole]
    assert [r.outcomes for r in records] == [r.outcomes for r in whole]
    # dense was timed before the cut, and those times stand
    assert [r.prefill_s for r in records if r.cell.method == DENSE] == [
        r.prefill_s for r in whole if r.cell.method == DENSE
    ]
    answered.clear()
    assert start(opened, tmp_path, request(repeats=1)) == records
    assert answered == []


def test_other_settings_in_the_same_folder_are_refused(opened: Loaded, finished) -> None:
    before = (finished[0] / RECORDS).read_bytes()
    with pytest.raises(BadArgument, match=r"samples=4: the run in .* has 3"):
        start(opened, finished[0], request(repeats=1, samples=4))
    assert (finished[0] / RECORDS).read_bytes() == before


def test_what_cannot_be_met_is_recorded_with_its_floor(opened: Loaded, tmp_path: Path) -> None:
    records = start(opened, tmp_path, request(tasks=(Brief("perplexity"),), samples=1), "quest, snapkv", "0.1")
    found = by_method(records)
    assert found["snapkv"].status == "done"
    assert found["quest"].status == "refused"
    assert 0.6 < found["quest"].floor < 0.8  # two of three layers are dense
    assert "quest" in found["quest"].refused
    at_floor = f"{found['quest'].floor + 0.005:.3f}"
    (record,) = [
        r
        for r in start(opened, tmp_path, request(tasks=(Brief("perplexity"),), samples=1), "quest", at_floor)
        if r.cell.method == "quest"
    ]
    assert record.status == "done"


def test_a_refusal_is_looked_at_again(opened: Loaded, tmp_path: Path, monkeypatch) -> None:
    asked = request(tasks=(Brief("perplexity"),), samples=1)
    with monkeypatch.context() as patch:
        patch.setattr(
            running,
            "check",
            lambda bound, shape, lengths: (
                bound.refuse(FoveateError("not today")) if bound.setting.method != DENSE else bound
            ),
        )
        records = start(opened, tmp_path, asked, "snapkv")
    assert [r.status for r in records] == ["done", "refused"]
    records = start(opened, tmp_path, asked, "snapkv")
    assert [r.status for r in records] == ["done", "done"]


@pytest.mark.parametrize("method", ["snapkv", "h2o", "kivi"])
@torch.inference_mode()
def test_a_shared_prompt_gives_what_a_prompt_of_its_own_gives(opened: Loaded, method: str) -> None:
    model, tokenizer = opened
    shape = ModelShape.of(model)
    some = task("niah_single_1").generate(tokenizer, LENGTH, 3, seed=5)
    with apply(model, DENSE) as handle:
        binding = handle.bind(method, budget=0.5)
        assert binding.shares_prefill
        shared = Batch(
            model, Binding(model, compose(DENSE), {}, handle, capture=binding.prompt_needs).cache(), 3, shape
        )
        shared.prompt([s.context_ids for s in some])
        forked = shared.fork(binding)
        own = Batch(model, binding.cache(), 3, shape)
        own.prompt([s.context_ids for s in some])
        dense = Batch(model, handle.cache(), 3, shape)
        dense.prompt([s.context_ids for s in some])
        # apart from a few integers per layer that a forward leaves behind
        assert abs(forked.cache.nbytes - own.cache.nbytes) <= 64 * shape.num_layers
        assert own.cache.nbytes < 0.6 * dense.cache.nbytes
        got, want, whole = (b.prompt([s.question_ids for s in some]) for b in (forked, own, dense))
        assert_close(got, want, 1e-5)
        assert float((got - whole).abs().max()) > 1e-3  # something was lost, so the store did compress
        for a, b in zip(forked.cache.couriers(), own.cache.couriers(), strict=True):
            assert (a.store.lengths == b.store.lengths).all()
            for x, y in zip(a.store.bands, b.store.bands, strict=True):
                assert torch.equal(x.slot_positions(), y.slot_positions())


def test_the_question_is_seen_only_when_asked_for(opened: Loaded, tmp_path: Path, monkeypatch) -> None:
    sealed: list[int] = []
    original = batching.Batch.prompt
    monkeypatch.setattr(
        batching.Batch, "prompt", lambda self, rows: sealed.append(len(rows[0])) or original(self, rows)
    )
    asked = request(tasks=(Brief("niah_single_1"),), samples=1)
    sample = task("niah_single_1").generate(opened.tokenizer, LENGTH, 1, seed=1)[0]
    context, question = len(sample.context_ids), len(sample.question_ids)
    (_, unseen) = start(opened, tmp_path / "unseen", asked, "snapkv", "0.3")
    assert sealed == [context, question, question]  # one shared context, the question once for each of two methods
    sealed.clear()
    (_, seen) = start(opened, tmp_path / "seen", replace(asked, question_seen=True), "snapkv", "0.3")
    assert sealed == [context + question]
    assert seen.cell.question_seen
    assert not unseen.cell.question_seen
    assert seen.kv_bytes < unseen.kv_bytes  # an unseen question stays exact


@pytest.mark.parametrize(("length", "words"), [(4096, "has 2048 positions"), (200, "needs at least")])
def test_lengths_that_cannot_be_had_write_nothing(opened: Loaded, tmp_path: Path, length: int, words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        start(opened, tmp_path / "out", request(lengths=(length,)))
    assert not (tmp_path / "out").exists()


def test_a_method_that_fails_on_the_way_is_refused_and_the_others_go_on(
    opened: Loaded, tmp_path: Path, monkeypatch
) -> None:
    original = running.answer

    def failing(batch, *rest):
        if batch.cache.owner.id == "snapkv":
            raise FoveateError("broken here")
        return original(batch, *rest)

    monkeypatch.setattr(running, "answer", failing)
    asked = request(tasks=(Brief("perplexity"),), samples=2)
    found = by_method(start(opened, tmp_path, asked, "snapkv,kivi"))
    assert (found["snapkv"].status, found["snapkv"].refused) == ("refused", "broken here")
    assert found["kivi"].status == "done"


def test_progress_ends_where_it_said(opened: Loaded, tmp_path: Path) -> None:
    seen: list[tuple[float, float, str]] = []
    start(opened, tmp_path, request(repeats=1, samples=2), "snapkv", watch=lambda *step: seen.append(step))
    shares = [done / total for done, total, _ in seen if total]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[-2] > 0.9  # what was announced is what was done


def test_the_model_is_left_as_it_was(opened: Loaded, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    before = opened.model(ids).logits
    start(opened, tmp_path, request(tasks=(Brief("perplexity"),), samples=1), "snapkv")
    assert torch.equal(opened.model(ids).logits, before)
    assert "_foveate_stack" not in opened.model.__dict__


def test_what_does_not_fit_side_by_side_is_read_in_halves(
    opened: Loaded, finished, tmp_path: Path, monkeypatch
) -> None:
    read, widest = Batch._read, []

    def narrow(self, rows, phase):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        widest.append(len(rows))
        return read(self, rows, phase)

    monkeypatch.setattr(Batch, "_read", narrow)
    again = by_method(start(opened, tmp_path / "narrow", request()))
    assert widest and max(widest) <= 2
    for method, record in by_method(finished[1]).items():
        assert again[method].status == record.status
        assert [o["index"] for o in again[method].outcomes] == [o["index"] for o in record.outcomes]
        assert again[method].scores == pytest.approx(record.scores, abs=1e-3)
        assert again[method].pairs_read == pytest.approx(record.pairs_read, rel=0.05)


def test_a_prompt_that_does_not_fit_is_refused_alone(opened: Loaded, tmp_path: Path, monkeypatch) -> None:
    fork = Batch.fork

    def full(self, binding=None):
        if binding is not None and binding.id != DENSE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fork(self, binding)

    monkeypatch.setattr(Batch, "fork", full)
    found = by_method(start(opened, tmp_path / "none", request(), "snapkv"))
    assert found[DENSE].status == "done" and len(found) == 2
    assert "memory" in found["snapkv"].refused
