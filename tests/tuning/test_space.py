"""What is searched follows from what methods declare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from optuna.trial import FixedTrial

from foveate.errors import BadArgument
from foveate.methods import METHODS
from foveate.methods.base import Method, tries
from foveate.tuning.space import NONE, SHARES, SLOTS, START, Space, parameters


@dataclass(frozen=True, kw_only=True)
class Made(Method):
    """A method that nobody registered."""

    id = "made"
    name = "Made"
    paper = ""
    slots = frozenset({"keep"})
    search = tries(width=(2, 4, 8), factor=(0.5, 1.5), fixed=(3,))

    width: int = 4
    factor: float = 1.0
    fixed: int = 1
    way: Literal["up", "down"] = "down"
    flag: bool = True
    free: int = 7


def test_parameters_come_from_the_fields() -> None:
    found = {p.field: p for p in parameters(Made)}
    assert {name: p.values for name, p in found.items()} == {
        "budget": SHARES,
        "width": (2, 4, 8),
        "factor": (0.5, 1.5),
        "fixed": (3,),
        "way": ("up", "down"),
        "flag": (False, True),
    }
    assert found["width"].ordered and found["budget"].ordered
    assert not found["factor"].ordered and not found["way"].ordered
    assert SHARES[found["budget"].start] == START
    assert (found["width"].first, found["way"].first, found["flag"].first) == (1, "down", True)


def test_a_method_without_a_budget_gets_none() -> None:
    assert {p.field: p.values for p in parameters(METHODS["flexprefill"])}["budget"] == (None,)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_value_that_is_tried_can_be_had(name: str) -> None:
    """Each value with the others at their start: none is refused by the method itself."""
    found = parameters(METHODS[name])
    start = {p.field: p.values[p.start] for p in found}
    METHODS[name](**start)
    for each in found:
        for value in each.values:
            # a multiple of another parameter may not fit its start; then it fits some other value of it
            others = [p for p in found if p is not each]
            tried = [start | {each.field: value}]
            tried += [start | {each.field: value, p.field: v} for p in others for v in p.values]
            assert any(_made(name, values) for values in tried), (each.label, value)
        if each.ordered:
            assert list(each.values) == sorted(each.values)


def _made(name: str, values: dict[str, Any]) -> bool:
    try:
        METHODS[name](**values)
    except BadArgument:
        return False
    return True


@pytest.mark.parametrize("target", list(SLOTS))
def test_all_are_the_papers_methods_that_can_save_the_target(target: str) -> None:
    expected = {n for n, cls in METHODS.items() if cls.paper and cls.slots & set(SLOTS[target])}
    space = Space.of(target)
    assert set(space.methods) == expected
    assert "dense" not in space.methods and "random" not in space.methods


@pytest.mark.parametrize("target", list(SLOTS))
def test_first_trials_are_each_method_alone(target: str) -> None:
    space = Space.of(target)
    made = [space.suggest(FixedTrial(start)) for start in space.starts(3)]
    assert sorted(composition.id for composition in made) == sorted(space.methods)
    for composition in made:
        (method,) = composition.methods
        if method.budgeted and method.budget is not None:
            assert str(method.budget) == str(START)
    assert space.starts(3) == space.starts(3)


def test_slots_compose() -> None:
    space = Space.of("kv-bytes", "snapkv,kivi")
    starts = {s["keep"]: s for s in space.starts(0)}
    both = {**starts["snapkv"], **starts[NONE], "keep": "snapkv"}
    composition = space.suggest(FixedTrial(both))
    assert composition.id == "snapkv|kivi"
    assert composition.methods[1].budget is None
    with pytest.raises(BadArgument, match="every slot is empty"):
        space.suggest(FixedTrial({"keep": NONE, "format": NONE}))


def test_a_clash_is_refused_by_the_composition() -> None:
    space = Space.of("kv-bytes", "h2o,kivi")
    starts = {s["keep"]: s for s in space.starts(0)}
    with pytest.raises(BadArgument, match="h2o"):
        space.suggest(FixedTrial({**starts["h2o"], **starts[NONE], "keep": "h2o"}))


@pytest.mark.parametrize(
    ("target", "methods", "words"),
    [
        ("speed", "all", "kv-bytes, decode, prefill"),
        ("kv-bytes", "nosuch", "no such method"),
        ("kv-bytes", "snapkv|kivi", "compositions are searched"),
        ("kv-bytes", "quest", "cannot save kv-bytes"),
        ("prefill", "", "at least one method"),
    ],
)
def test_refusals(target: str, methods: str, words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        Space.of(target, methods)


def test_without() -> None:
    space = Space.of("kv-bytes", "snapkv,h2o,kivi").without({"kivi", "h2o"})
    assert space.methods == ["snapkv"]
    assert space.suggest(FixedTrial(space.starts(0)[0])).id == "snapkv"
