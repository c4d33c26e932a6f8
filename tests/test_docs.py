"""Every example of README and docs runs, every command in them exists, and what is generated is in step."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foveate

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str, str]]:
    """(line, words behind the language, text) of the fenced blocks of a page, without what generate.py put in."""
    text = page.read_text()
    generated = [
        m.span() for m in re.finditer(r"<!-- (source|records|bench|sweep|claims): .*?<!-- end -->", text, re.DOTALL)
    ]
    return [
        (text.count("\n", 0, m.start()) + 2, m[2].strip(), m[3])
        for m in FENCE.finditer(text)
        if m[1] == language and not any(a <= m.start() < b for a, b in generated)
    ]


@pytest.fixture(scope="module")
def load() -> Any:
    """`foveate.load` that opens each model once for all pages. Examples leave the model as it was, or say so."""
    opened: dict[str, Any] = {}
    original = foveate.load

    def load_once(name: str, **options: Any) -> Any:
        if name not in opened:
            opened[name] = original(name, **options)
        return opened[name]

    return load_once


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_python_examples_run(page: Path, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(foveate, "load", load)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, words, code in blocks(page, "python"):
        assert words == "run", f"{page.name}:{line}: an example that is not run may be wrong; mark it 'python run'"
        # the blank lines put a traceback's line numbers where they are in the page
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def commands() -> list[tuple[str, str]]:
    return [
        (f"{page.name}:{start + offset}", line.removeprefix("$ "))
        for page in PAGES
        for start, _, text in blocks(page, "console")
        for offset, line in enumerate(text.splitlines())
        if line.startswith("$ ")
    ]


@pytest.mark.parametrize(("where", "command"), commands())
def test_commands_exist(where: str, command: str, tmp_path: Path) -> None:
    """Each documented `make` target is known, each `foveate` command takes the options that the page gives it."""
    program, *words = shlex.split(command)
    if program == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{where}: {done.stderr}"
        return
    assert program == "foveate", where
    shown = subprocess.run(
        [sys.executable, "-c", "from foveate.cli import main; main()", *words[: 1 + (words[0] == "bench")], "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert shown.returncode == 0, f"{where}: {shown.stderr}"
    for option in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown.stdout), f"{where}: {option} is unknown"


def test_generated_parts_are_in_step() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "papers" / "snapkv" / "index.html").read_text()
    assert "LLM Knows What You are Looking for" in page
    assert "<th>tier</th>" in (tmp_path / "site" / "papers" / "index.html").read_text()


def test_pages_link_to_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            found = page.parent / target
            assert found.exists() or target.startswith("papers/"), f"{page.name}: {target}"
