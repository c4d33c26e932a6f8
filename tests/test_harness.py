"""lm-evaluation-harness with a method at work, on tasks that are written here: nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.cli.program import errors, invoke
from tests.evaluate.small import saved, small

from foveate.errors import BadArgument, Refused
from foveate.models import Loaded

harness: Any = pytest.importorskip("foveate.harness", reason="lm-eval is not installed (extra 'harness')")

TEXT = "The orchard keeps its records in a long green book that nobody reads before the first frost. "
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" red", " blue", " green"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def opened() -> Loaded:
    return small()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": TEXT * (2 + number) + f"Colour {number}:", "answer": number % 3} for number in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "rows.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    whole = harness.TaskManager  # without the thousands of tasks that come with the harness
    monkeypatch.setattr(harness, "TaskManager", lambda **given: whole(**given, include_defaults=False))


def requests() -> list[tuple[None, list[int], list[int]]]:
    """Three continuations behind each of five contexts of two lengths."""
    draw = random.Random(0)
    made = []
    for length in (90, 40, 90, 90, 40):
        context = [draw.randrange(3, 250) for _ in range(length)]
        made += [(None, context, [draw.randrange(3, 250) for _ in range(n)]) for n in (1, 3, 5)]
    return made


def scored(opened: Loaded, method: str, **options: Any) -> tuple[list[tuple[float, bool]], Any]:
    lm = harness.FoveateLM(opened.model, method, tokenizer=opened.tokenizer, **options)
    try:
        return lm._loglikelihood_tokens(requests(), disable_tqdm=True), lm.held
    finally:
        lm.handle.remove()


def test_dense_is_what_the_harness_itself_measures(opened: Loaded) -> None:
    plain = harness.HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal", batch_size=4)
    want = plain._loglikelihood_tokens(requests(), disable_tqdm=True)
    got, held = scored(opened, "dense", batch_size=4)
    assert [same for _, same in got] == [same for _, same in want]
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) < 1e-4
    assert held.prompts == 5  # each context is read once, whatever the number of its continuations
    assert not held.saves


def test_a_context_longer_than_the_model_is_cut_as_the_harness_cuts_it(opened: Loaded) -> None:
    plain = harness.HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal", max_length=60)
    lm = harness.FoveateLM(opened.model, tokenizer=opened.tokenizer, max_length=60)
    want, got = (each._loglikelihood_tokens(requests(), disable_tqdm=True) for each in (plain, lm))
    lm.handle.remove()
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) < 1e-4


@pytest.mark.parametrize(
    ("method", "holds", "reads"),
    [
        ("snapkv(budget=0.4, window=8)", 0.7, 0.5),
        ("quest(budget=0.5, dense_layers=0)", 9, 0.9),
        ("kivi(bits=2, group=16, residual=16)", 0.9, 9),
    ],
)
def test_the_method_is_at_work(opened: Loaded, method: str, holds: float, reads: float) -> None:
    dense, _ = scored(opened, "dense")
    got, held = scored(opened, method)
    shares = held.to_json()
    assert shares["kv_bytes"] < holds
    assert shares["pairs_decode"] < reads
    assert held.saves
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, dense, strict=True)) > 1e-3
    beside, _ = scored(opened, method, batch_size=3)  # rows side by side are as rows alone
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, beside, strict=True)) < 1e-3


def test_tasks_of_both_kinds(opened: Loaded, tasks: Path) -> None:
    found = {}
    for method in ("dense", "snapkv(budget=0.3, window=8)"):
        names = "local_choice,local_answer"
        found[method] = harness.evaluate(opened.model, names, method, tokenizer=opened.tokenizer, include=tasks)
        assert set(found[method]["results"]) == {"local_choice", "local_answer"}
        assert 0 <= found[method]["results"]["local_choice"]["acc,none"] <= 1
        assert found[method]["held"]["prompts"] == 3 + 3
        json.dumps(found[method], allow_nan=False)
    dense, less = found.values()
    assert (dense["saves"], less["saves"]) == (False, True)
    assert dense["held"]["kv_bytes"] > 0.99
    assert less["held"]["kv_bytes"] < 0.5
    assert less["settings"] == [{"id": "snapkv", "settings": {"budget": "0.3", "window": 8}}]
    assert "_foveate_stack" not in opened.model.__dict__


def test_generation_is_under_the_method(opened: Loaded) -> None:
    lm = harness.FoveateLM(opened.model, "snapkv", budget=0.3, tokenizer=opened.tokenizer)
    ids = opened.tokenizer(TEXT * 3, return_tensors="pt").input_ids
    out = lm._model_generate(ids, ids.shape[1] + 5, ["zzz"])
    lm.handle.remove()
    assert out.shape[1] == ids.shape[1] + 5
    assert lm.held.to_json()["kv_bytes"] < 0.5
    assert lm.held.to_json()["pairs_decode"] < 0.5


def test_whole_texts_are_for_dense_alone(opened: Loaded) -> None:
    class Text:
        args = (TEXT,)

    plain = harness.HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal")
    lm = harness.FoveateLM(opened.model, tokenizer=opened.tokenizer)
    got, want = (each.loglikelihood_rolling([Text()], disable_tqdm=True) for each in (lm, plain))
    assert got == pytest.approx(want, abs=1e-3)
    lm.handle.remove()
    lm = harness.FoveateLM(opened.model, "snapkv(budget=0.5)", tokenizer=opened.tokenizer)
    with pytest.raises(Refused, match="snapkv cannot act where whole texts are scored"):
        lm.loglikelihood_rolling([Text()])
    lm.handle.remove()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "snpakv"}, "no such method"),
        ({"method": "snapkv,kivi"}, "give one method"),
        ({"method": "dense", "budget": 0.5}, "no method of dense takes it"),
        ({"method": "snapkv", "budget": "0.5,0.3"}, "give one"),
        ({"method": "retrieval(budget=0.5)"}, "give methods alone"),
        ({"batch_size": "auto"}, "give a number"),
    ],
)
def test_what_cannot_be(opened: Loaded, given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgument, match=said):
        harness.FoveateLM(opened.model, tokenizer=opened.tokenizer, **given)


def test_the_program(capsys: pytest.CaptureFixture[str], tasks: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "small")
    words = ["harness", model, "--tasks", "local_choice", "--include", tasks, "--limit", 2, "--dtype", "float32"]
    done = invoke(capsys, [*words, "--method", "snapkv(budget=0.3)", "--json", "--out", tmp_path / "found.json"])
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data == json.loads((tmp_path / "found.json").read_text())
    assert data["held"]["prompts"] == 2
    assert data["held"]["kv_bytes"] < 0.5
    plain = invoke(capsys, [*words, "--method", "snapkv(budget=4096)"])
    assert plain.out.startswith("local_choice  acc  ")
    assert "of dense" in plain.out
    assert any("too short for its settings" in line for line in plain.err.splitlines())
    wrong = invoke(capsys, [*words[:2], "--tasks", "nothing", "--include", tasks])
    assert wrong.code == 2
    assert any("tasks='nothing': give names" in line for line in errors(wrong))
