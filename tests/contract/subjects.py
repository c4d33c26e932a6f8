"""What the contract is tried on. Methods come from the registry, their small settings from their own test files.

A method's file `tests/methods/test_<name>.py` may state

- `SMALL`: settings under which the method changes something on prompts of 60 to 200 tokens of a tiny model;
- `FULL`: what to add to `SMALL` so that nothing is dropped or rounded; a full budget unless stated;
- `profile_for(shape)`: a profile for any model, for calibrated methods;
- `FAMILY`: of the tiny models on which it must run, where that is not a plain decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

import foveate
from foveate.errors import FoveateError, Refused
from foveate.methods import METHODS, Composition, Method, Profile
from foveate.models.shape import ModelShape
from foveate.models.tiny import FAMILIES, tiny

Test = Callable[..., None]

GROUPS = {1: (4, 4), 2: (4, 2), 3: (6, 2), 8: (8, 1)}
"""Query heads and kv heads by the size of a group."""


@dataclass(frozen=True)
class Case:
    """A registered method with settings that act on a tiny model."""

    cls: type[Method]
    small: Mapping[str, Any] = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)
    profile_for: Callable[[ModelShape], Profile] | None = None
    family: str = "llama"

    @property
    def id(self) -> str:
        return self.cls.id

    def method(self, **changes: Any) -> Method:
        """The method with its small settings."""
        return self.cls(**{**self.small, **changes})

    def whole(self) -> Method:
        """The method when it leaves nothing out."""
        return self.cls(**{**self.small, **self.full})

    @property
    def holds_less(self) -> bool:
        """Whether its small settings make the cache smaller than a dense one."""
        return bool({"keep", "format"} & self.method().fills)


def test_module(cls: type[Method]) -> str:
    """The test file that a method comes with, named like its own file."""
    return f"tests.methods.test_{cls.__module__.rpartition('.')[2]}"


def case_of(cls: type[Method]) -> Case:
    name = test_module(cls)
    stated = vars(import_module(name)) if find_spec(name) else {}
    full = {"budget": 1.0} if cls.budgeted else {}
    family = stated.get("FAMILY", Case.family)
    return Case(cls, stated.get("SMALL", {}), stated.get("FULL", full), stated.get("profile_for"), family)


ALL_CASES = {name: case_of(cls) for name, cls in sorted(METHODS.items()) if cls.__module__.startswith("foveate.")}
CASES = {name: case for name, case in ALL_CASES.items() if case.profile_for or not case.cls.calibrated}


@cache
def model(family: str = "llama", group: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny model, made once, with at least two layers of full attention: some methods leave the first alone."""
    heads, kv_heads = GROUPS[group]
    layers = 4 if family == "gemma3" else 3
    return tiny(family, layers=layers, heads=heads, kv_heads=kv_heads, dtype=dtype, seed=seed)


class NotHere(Exception):
    """Method and model do not fit, and said so in one line."""


def precise(case: Case, family: str | None = None, group: int = 2) -> nn.Module:
    """A model whose rounding is too small to matter: where numbers are packed into few bits, the last bit of a float32
    decides now and then which code it is, and where attention is edited, which token is over a threshold."""
    return model(
        family or case.family, group, torch.float64 if {"format", "weights"} & case.cls.slots else torch.float32
    )


@contextmanager
def applied(model: nn.Module, case: Case, method: Method | Composition | None = None) -> Iterator[foveate.Handle]:
    """The case's method on a model. A refusal is checked and ends the test; a model of its family takes it."""
    try:
        handle = foveate.apply(model, method or case.method(), profile=profiles(case, model))
    except Refused as error:
        assert_refusal(error)
        assert model.config.model_type != case.family.replace("-", "_"), f"refused: {error}"
        raise NotHere from error
    with handle:
        yield handle


def profiles(case: Case, model: nn.Module) -> Profile | None:
    return None if case.profile_for is None else case.profile_for(ModelShape.of(model))


def assert_refusal(error: BaseException) -> None:
    """One line that says something."""
    assert isinstance(error, FoveateError), f"{type(error).__name__}: {error}"
    text = str(error)
    assert "\n" not in text.strip(), text
    assert len(text) > 20, text


def each_method(**only: Any) -> Callable[[Test], Test]:
    """Parametrise `case` over every registered method, or those whose class attributes are as given."""
    wanted = [case for case in CASES.values() if all(getattr(case.cls, key) == value for key, value in only.items())]
    return lambda test: pytest.mark.parametrize("case", wanted, ids=lambda case: case.id)(where_it_fits(test))


def each_subject() -> Callable[[Test], Test]:
    """Parametrise `case`, `family`, `group`: every method on every family, and with every group size on llama."""
    places = [(family, 2) for family in FAMILIES] + [("llama", group) for group in GROUPS if group != 2]
    subjects = [
        pytest.param(case, *place, id=f"{case.id}-{place[0]}-{place[1]}") for case in CASES.values() for place in places
    ]
    return lambda test: pytest.mark.parametrize(("case", "family", "group"), subjects)(where_it_fits(test))


def where_it_fits(test: Test) -> Test:
    """Where method and model refuse each other, the refusal is the whole test."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with suppress(NotHere):
            test(*args, **kwargs)

    return run
