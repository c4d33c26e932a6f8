"""The catalog says what is true of the code: what it calls working imports, is registered and is tested."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from foveate.errors import BadArgument
from foveate.methods import METHODS
from foveate.papers import Paper, catalog, paper, papers

# The packages that design and code have, or will have, a paper in.
HOMES = {"adapters", "applications", "bench", "cache", "convert", "diffusion", "evaluate", "heads", "inspect", "layers"}
HOMES |= {"methods", "parallel", "spatial", "tasks", "train"}
FIRST = {"streaming-llm", "snapkv", "h2o", "duo-attention", "kivi", "flexprefill", "quest", "delta-attention"}
HERE = "tests/papers/test_catalog.py"


def probe(**fields: object) -> Paper:
    """A paper that works, except for what the fields say."""
    good = Paper(
        id="probe",
        name="Probe",
        title="A probe",
        home="layers",
        tier=1,
        module="foveate.errors",
        tests=(f"{HERE}::test_a_paper_works_when_module_and_tests_are_there",),
    )
    return replace(good, **fields)


def test_every_entry_is_read_once_and_in_order() -> None:
    ids = [entry.id for entry in papers()]
    files = sorted(catalog.ENTRIES.iterdir())
    assert ids == [file.stem for file in files]
    assert {file.suffix for file in files} == {".toml"}
    assert len(ids) == len(set(ids)) >= 176


@pytest.mark.parametrize("entry", papers(), ids=lambda entry: entry.id)
def test_facts_are_well_formed(entry: Paper) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.id)
    assert entry.name.strip() == entry.name != ""
    assert entry.title.strip() == entry.title != ""
    assert entry.tier in (1, 2, 3)
    assert set(re.split(r"[+/]", entry.home)) <= HOMES
    if entry.arxiv is not None:
        assert re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv)
        # numbered by the month of the preprint, which may be a year from the publication
        assert entry.year is not None
        assert abs(2000 + int(entry.arxiv[:2]) - entry.year) <= 1
    for node in entry.tests:
        assert re.fullmatch(r"tests/[\w/]+/test_\w+\.py(::Test\w+)?::test_\w+", node), node


@pytest.mark.parametrize("entry", [p for p in papers() if p.module], ids=lambda entry: entry.id)
def test_what_has_a_module_works_and_is_described(entry: Paper) -> None:
    assert entry.missing is None
    assert entry.status == "works"
    assert entry.what is not None
    assert len(entry.what.split()) >= 40


@pytest.mark.parametrize("id", sorted(FIRST))
def test_the_first_methods_work(id: str) -> None:
    assert paper(id).status == "works"


@pytest.mark.parametrize("id", sorted(id for id, method in METHODS.items() if method.slots))
def test_every_method_of_a_paper_has_its_entry(id: str) -> None:
    entry = paper(id)
    assert (entry.arxiv or "") == METHODS[id].paper
    assert entry.module == METHODS[id].__module__


def test_a_paper_works_when_module_and_tests_are_there() -> None:
    assert probe().missing is None
    assert probe().status == "works"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"module": None}, "not implemented yet"),
        ({"module": "foveate.no_such_module"}, "foveate.no_such_module does not import"),
        ({"home": "methods"}, "registers no method called probe"),
        ({"home": "cache+methods"}, "registers no method called probe"),
        ({"tests": ()}, "no test is named"),
        ({"tests": (f"{HERE}::test_that_nobody_wrote",)}, "no such test: tests/papers/test_catalog.py::test_that"),
        ({"tests": ("tests/papers/test_nowhere.py::test_x",)}, "no such test: tests/papers/test_nowhere.py::test_x"),
        ({"tests": (f"{HERE}::probe",)}, "no such test"),
    ],
)
def test_a_paper_is_planned_when_something_is_missing(fields: dict[str, object], reason: str) -> None:
    entry = probe(**fields)
    assert reason in (entry.missing or "")
    assert entry.status == "planned"


def test_an_installed_package_has_no_tests_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_repository", lambda: None)
    assert probe(tests=(f"{HERE}::test_that_nobody_wrote",)).status == "works"
    assert probe(tests=()).status == "planned"


class TestInAClass:
    def test_is_found(self) -> None:
        assert probe(tests=(f"{HERE}::TestInAClass::test_is_found",)).missing is None
        assert probe(tests=(f"{HERE}::TestInAClass::test_is_not_there",)).missing is not None


def test_an_unknown_id_names_its_neighbours() -> None:
    with pytest.raises(BadArgument, match=r"paper='snapvk'.*snapkv"):
        paper("snapvk")
    with pytest.raises(BadArgument, match="foveate papers"):
        paper("zzzzzzzzzzzzzz")


def test_an_entry_under_another_name_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "right.toml").write_text('id = "wrong"\nname = "N"\ntitle = "T"\nhome = "methods"\ntier = 1\n')
    monkeypatch.setattr(catalog, "ENTRIES", tmp_path)
    catalog._load.cache_clear()
    try:
        with pytest.raises(BadArgument, match=r"right\.toml"):
            papers()
    finally:
        monkeypatch.undo()
        catalog._load.cache_clear()
