"""Reads the catalog: one small TOML file per paper in `entries/`, named after the paper's id."""

from __future__ import annotations

import ast
import difflib
import importlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from foveate.errors import BadArgument
from foveate.papers.claim import Claim

ENTRIES = Path(__file__).parent / "entries"
"""The folder of the catalog's entries."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One paper, benchmark or system of the literature.

    Attributes:
        id: the short name used everywhere: file names, `foveate.apply`, records.
        name: what the field calls it.
        title: the paper's title.
        home: the package of Foveate in which it lives or will live; several are joined by `+`.
        tier: 1 is built first, 3 last.
        arxiv: its number on arXiv; None when it is not there.
        year: of the first publication.
        module: import path of the implementation; None while there is none.
        tests: pytest node ids of the tests of what the paper promises.
        what: one paragraph on what it does; present once it is implemented.
        claim: its headline claim and how that is looked at here; None where it claims nothing that we looked up.
    """

    id: str
    name: str
    title: str
    home: str
    tier: int
    arxiv: str | None = None
    year: int | None = None
    module: str | None = None
    tests: tuple[str, ...] = ()
    what: str | None = None
    claim: Claim | None = None

    @property
    def url(self) -> str | None:
        """Where the paper can be read."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    @cached_property
    def missing(self) -> str | None:
        """What keeps the paper from counting as working, in one sentence; None when nothing does.

        A paper works when its module imports, a method of its id is registered (for a paper whose home is
        `methods`), and each of its tests exists. Tests are looked up where the test tree lies beside the package;
        an installed package comes without it, and there the entry is believed: the repository's own tests fail on
        an entry that names a test that is not there.
        """
        if self.module is None:
            return "not implemented yet"
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.module} does not import: {error}"
        if "methods" in self.home.split("+"):
            from foveate.methods import METHODS  # imports torch: only asked for here, not to list the catalog

            if self.id not in METHODS:
                return f"{self.module} registers no method called {self.id}"
        if not self.tests:
            return "no test is named"
        root = _repository()
        absent = [node for node in self.tests if root is not None and node not in _tests(root, node.split("::")[0])]
        return f"no such test: {', '.join(absent)}" if absent else None

    @property
    def status(self) -> Literal["works", "planned"]:
        """`works` when nothing is `missing`, else `planned`."""
        return "works" if self.missing is None else "planned"


@cache
def _load() -> dict[str, Paper]:
    found = {}
    for file in sorted(ENTRIES.glob("*.toml")):
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
        claim = Claim.of(fields["id"], fields["claim"]) if "claim" in fields else None
        entry = Paper(**{**fields, "tests": tuple(fields.get("tests", ())), "claim": claim})
        if entry.id != file.stem:
            raise BadArgument("id", entry.id, f"{file.name} must carry the id {file.stem}")
        found[entry.id] = entry
    return found


def papers() -> list[Paper]:
    """All papers of the catalog, sorted by id."""
    return list(_load().values())


def paper(id: str) -> Paper:
    """One paper of the catalog.

    Raises:
        BadArgument: if the catalog has no paper of that id; the message names the nearest ones.
    """
    found = _load().get(id)
    if found is None:
        near = difflib.get_close_matches(id, _load(), n=3)
        raise BadArgument(
            "paper", id, f"did you mean {', '.join(near)}?" if near else "`foveate papers` lists them all"
        )
    return found


def _repository() -> Path | None:
    """The root of the working copy that this package is run from; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "tests").is_dir() else None


@cache
def _tests(root: Path, file: str) -> frozenset[str]:
    """Node ids of the test functions that a test file defines, without parameters. Read, not imported."""
    path = root / file
    if not path.is_file():
        return frozenset()
    return frozenset(f"{file}::{name}" for name in _functions(ast.parse(path.read_text(encoding="utf-8")).body))


def _functions(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _functions(node.body, f"{prefix}{node.name}::")
