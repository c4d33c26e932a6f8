"""Fixtures of all tests."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from hypothesis import settings
from tests.interpreter import quicken
from tests.turns import is_on_turn, place_of

# An example that is slow on a busy machine is not wrong.
settings.register_profile("foveate", deadline=None)
settings.load_profile("foveate")
quicken()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own: inputs differ from test to test and stay what they are from run to run."""
    return zlib.crc32(request.node.nodeid.encode())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="every method on every model, not those alone whose turn it is"
    )
    parser.addoption("--third", action="store_true", help="of what each method is put through, a third")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the combinations of method and model whose turn it is not (see `tests.turns`)."""
    if config.getoption("--whole"):
        return
    tried = [item for item in items if isinstance(item, pytest.Function) and "case" in _params(item)]
    ids = sorted({case.id for item in tried for case in [_params(item)["case"]] if hasattr(case, "id")})
    places: dict[str, list[tuple[str, int]]] = {}
    for item in tried:
        seen = places.setdefault(_name(item), [])
        if place_of(_params(item)) not in seen:
            seen.append(place_of(_params(item)))
    left = set()
    for item in tried:
        params, name = _params(item), _name(item)
        if not hasattr(params["case"], "id"):
            continue
        third = (ids.index(params["case"].id) + zlib.crc32(name.encode())) % 3 == 0
        if not is_on_turn(name, params, places[name], ids) or (config.getoption("--third") and not third):
            left.add(item)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def _params(item: pytest.Function) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _name(item: pytest.Function) -> str:
    return item.nodeid.partition("[")[0]
