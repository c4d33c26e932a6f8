from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.evaluate.small import small

from foveate.engine.apply import apply
from foveate.engine.tuned import Tuned
from foveate.errors import BadArgument, Refused
from foveate.evaluate.record import DENSE
from foveate.evaluate.setting import (
    ALL,
    bind,
    check,
    open_profiles,
    parse_budgets,
    parse_methods,
    parse_one,
    settings_of,
    text_of,
)
from foveate.methods import KIVI, METHODS, Budget, Profile, SnapKV
from foveate.methods.base import Composition
from foveate.methods.profile import fingerprint, save_profile
from foveate.models.shape import ModelShape


def rows(methods: object, budgets: object = "0.25,0.5") -> list[tuple[str, dict[str, object], str | None]]:
    settings = settings_of(parse_methods(methods), parse_budgets(budgets))  # type: ignore[arg-type]
    return [(s.method, s.settings, s.budget) for s in settings]


def test_dense_is_always_first_and_once() -> None:
    assert rows("snapkv")[0] == (DENSE, {}, None)
    assert rows("dense") == [(DENSE, {}, None)]
    assert rows("snapkv,dense", "0.5") == [(DENSE, {}, None), ("snapkv", {}, "0.5")]


def test_methods_are_crossed_with_budgets() -> None:
    assert rows("snapkv,quest")[1:] == [
        ("snapkv", {}, "0.25"),
        ("snapkv", {}, "0.5"),
        ("quest", {}, "0.25"),
        ("quest", {}, "0.5"),
    ]


def test_without_budgets_parameters_decide() -> None:
    assert rows("snapkv(capacity=64)", None)[1:] == [("snapkv", {"capacity": 64}, None)]


def test_a_budget_of_its_own_is_run_once() -> None:
    assert rows("snapkv(budget=0.125), kivi(bits=2, budget=None)")[1:] == [
        ("snapkv", {}, "0.125"),
        ("kivi", {"bits": 2}, None),
    ]
    assert rows([SnapKV(budget=0.125)])[1:] == [("snapkv", {}, "0.125")]


def test_a_method_that_takes_none_runs_once() -> None:
    fixed = [name for name, cls in METHODS.items() if not cls.budgeted]
    assert len(fixed) >= 2  # dense, and a method whose reads follow from a threshold
    for name in fixed:
        assert [row[2] for row in rows(name) if row[0] == name] == [None]


def test_compositions() -> None:
    assert rows("snapkv|kivi(budget=None)", "0.5")[1:] == [("snapkv|kivi", {}, "0.5")]
    assert rows([SnapKV(budget=0.25) | KIVI(bits=2)], None)[1:] == [
        ("snapkv|kivi", {"snapkv.budget": "0.25", "kivi.bits": 2}, None)
    ]
    with pytest.raises(BadArgument, match="snapkv and kivi would both take the budget"):
        parse_methods("snapkv|kivi")
    with pytest.raises(BadArgument, match="both fill the slot 'keep'"):
        parse_methods("snapkv(budget=0.5)|h2o(budget=0.5)")


def test_all_is_every_method() -> None:
    assert {row[0] for row in rows(ALL)} == set(METHODS)
    assert not any(entry.named for entry in parse_methods(ALL)[1:])


@pytest.mark.parametrize(
    "text",
    [
        "snapkv",
        "snapkv(window=16),kivi(bits=2, budget=None)",
        "snapkv(budget='0.5')|kivi(budget=None)",
        "all",
        "core",
        "dense",
    ],
)
def test_the_text_of_entries_reads_back(text: str) -> None:
    entries = parse_methods(text)
    again = parse_methods(text_of(entries))
    granted = parse_budgets("0.25")
    assert settings_of(again, granted) == settings_of(entries, granted)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snpakv", "no such method"),
        ("", "give at least one"),
        ("snapkv(windw=3)", "has the parameters"),
        ("snapkv(window=0)", "window=0"),
        ("snapkv(3)", "parameter=value"),
        ("snapkv(", "name"),
        ("snapkv(budget=1.5)", "at most at 1"),
    ],
)
def test_bad_methods_are_named(text: str, words: str) -> None:
    with pytest.raises(BadArgument, match=words) as caught:
        parse_methods(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", ["0", "0.0", "1.5", "-1", "-0.5", "many", "0.5x", "nan"])
def test_bad_budgets_are_refused(budget: str) -> None:
    with pytest.raises(BadArgument, match="budget="):
        parse_budgets(budget)


def test_budgets() -> None:
    assert parse_budgets("0.25, 25%,1024") == [Budget.ratio(0.25), Budget.tokens(1024)]
    assert parse_budgets([0.5, 64, Budget.bytes(100)]) == [Budget.ratio(0.5), Budget.tokens(64), Budget.bytes(100)]
    assert parse_budgets(None) == []
    assert parse_one("kivi(bits=8)") == KIVI(bits=8)


def settings(text: str, budgets: str = "0.5"):
    return settings_of(parse_methods(text), parse_budgets(budgets))[1:]


def test_a_named_method_that_lacks_its_profile_is_an_error_and_one_of_all_is_a_row() -> None:
    model, _ = small()
    calibrated = next(name for name, cls in METHODS.items() if cls.calibrated)
    with apply(model, DENSE) as handle:
        (named,) = settings(calibrated)
        with pytest.raises(BadArgument, match="foveate calibrate"):
            bind(handle, named, {})
        (other,) = [s for s in settings(ALL) if s.method == calibrated]
        bound = bind(handle, other, {})
    assert bound.binding is None
    assert "foveate calibrate" in str(bound.refused)


def test_a_method_that_the_architecture_cannot_take_says_why() -> None:
    model, _ = small()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    with apply(model, DENSE) as handle:
        (named,) = settings("streaming-llm", "0.9")
        with pytest.raises(Refused, match="positions cannot be re-counted"):
            bind(handle, named, {})
        (other,) = [s for s in settings(ALL, "0.9") if s.method == "streaming-llm"]
        assert "positions cannot be re-counted" in str(bind(handle, other, {}).refused)


def test_the_floor_is_that_of_the_length_asked_for() -> None:
    model, _ = small()
    shape = ModelShape.of(model)
    floors = {}
    with apply(model, DENSE) as handle:
        (setting,) = settings("quest", "0.05")  # two of three layers stay dense: at no length
        never = bind(handle, setting, {})
        assert never.binding is None
        (setting,) = settings("kivi", "0.25")  # its exact tail weighs less in longer prompts
        bound = bind(handle, setting, {})
        assert bound.binding is not None
        for length in (300, 600):
            floors[length] = check(bound, shape, [length, 2000]).floor
            got = check(never, shape, [length])
            assert got.binding is None
            assert f"at {length} tokens" in str(got.refused)
        assert check(bound, shape, [2000]).binding is not None
    assert floors[300] > floors[600] > 0.25


def test_profiles_must_fit(tmp_path) -> None:
    shape = ModelShape.of(small()[0])
    (setting,) = settings("duo-attention")
    mine = Profile("duo-attention", fingerprint(shape), {"gates": []})
    file = save_profile(mine, tmp_path / "mine.json")
    assert open_profiles([file], [setting], shape) == {"duo-attention": mine}
    with pytest.raises(BadArgument, match="another model"):
        open_profiles([Profile("duo-attention", "llama-1x1-x", {})], [setting], shape)
    with pytest.raises(BadArgument, match="no method of this comparison takes it"):
        open_profiles([mine], settings("snapkv"), shape)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(BadArgument, match="not a Foveate profile"):
        open_profiles([tmp_path / "other.json"], [setting], shape)
    with pytest.raises(BadArgument, match="cannot be read"):
        open_profiles([tmp_path / "none.json"], [setting], shape)


# -- tuned files -------------------------------------------------------------------------------------------------------


def tuned_file(folder: Path, model: object, *methods: object, profiles: Sequence[Profile] = ()) -> Path:
    made = Tuned(Composition(tuple(methods)), fingerprint(ModelShape.of(model)), profiles)  # type: ignore[arg-type]
    path = folder / "tuned.json"
    path.write_text(json.dumps(made.to_json()))
    return path


def test_a_tuned_file_is_run_as_it_was_tuned(tmp_path: Path) -> None:
    model, tokenizer = small()
    path = tuned_file(tmp_path, model, SnapKV(window=8, budget=0.4))
    wanted = ("snapkv", {"window": 8}, "0.4")
    for given in (str(path), path, f"quest, {path}", ["quest", path]):
        assert rows(given)[-1] == wanted, "the budgets of the comparison are not its own"
    assert [method for method, _, _ in rows(f"snapkv, {path}")] == [DENSE, "snapkv", "snapkv", "snapkv"]
    entries = parse_methods(f"quest, {path}")
    assert text_of(entries) == f"quest,{path}"
    (_, setting) = settings_of(parse_methods(path), [])
    with apply(model, DENSE) as handle:
        assert bind(handle, setting, {}, tokenizer).binding.composition == setting.composition  # type: ignore[union-attr]
    composed = tuned_file(tmp_path, model, SnapKV(window=8, budget=0.4), KIVI(bits=2))
    assert rows(composed)[-1] == ("snapkv|kivi", {"snapkv.window": 8, "snapkv.budget": "0.4", "kivi.bits": 2}, None)


def test_a_tuned_file_brings_its_profiles(tmp_path: Path) -> None:
    model, tokenizer = small()
    shape = ModelShape.of(model)
    gates = [[0.1] * layer.num_kv_heads for layer in shape.layers]
    own, other = (Profile("duo-attention", fingerprint(shape), {"gates": gates}, {"seconds": s}) for s in (3, 5))
    path = tuned_file(tmp_path, model, METHODS["duo-attention"](sparsity=0.5), profiles=[own])
    settings = settings_of(parse_methods([path, "duo-attention(sparsity=0.5)"]), [])
    given = open_profiles([other], settings, shape)
    with apply(model, DENSE) as handle:
        seconds = [bind(handle, setting, given, tokenizer).calibration_s for setting in settings[1:]]
    assert seconds == [3], "the same row twice is run once, as the file has it"
    with apply(model, DENSE) as handle:
        assert bind(handle, settings[1], {}, tokenizer).profiles == {"duo-attention": own}


def test_a_tuned_file_of_another_model_or_none(tmp_path: Path) -> None:
    model, tokenizer = small()
    path = tuned_file(tmp_path, small(layers=2)[0], SnapKV(window=8, budget=0.4))
    (_, setting) = settings_of(parse_methods(path), [])
    with apply(model, DENSE) as handle, pytest.raises(BadArgument, match=r"tuned\.json'?: it was tuned on"):
        bind(handle, setting, {}, tokenizer)
    with pytest.raises(BadArgument, match="cannot be read"):
        parse_methods("none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(BadArgument, match="is not a tuned file"):
        parse_methods(tmp_path / "other.json")
