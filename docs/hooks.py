"""Hooks of the documentation's build: one page per paper, made from the catalog and never committed."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from foveate.papers import Paper, papers


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds `papers/index.md` and a page for each entry of the catalog."""
    catalog = papers()
    files.append(File.generated(config, "papers/index.md", content=index(catalog)))
    for paper in catalog:
        files.append(File.generated(config, f"papers/{paper.id}.md", content=page(paper)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Takes the words for the tests (`python run`) off the code fences: the site's highlighter knows languages only."""
    return re.sub(r"^```(\w+) [\w =/.-]+$", r"```\1", markdown, flags=re.MULTILINE)


def index(catalog: list[Paper]) -> str:
    """The table of all papers, the working ones first."""
    working = [paper for paper in catalog if paper.status == "works"]
    planned = sorted((p for p in catalog if p.status == "planned"), key=lambda p: (p.tier, p.home, p.id))
    return "\n".join(
        [
            "# Papers",
            "",
            f"{len(catalog)} systems of the literature: {len(working)} work here, {len(planned)} are planned. A paper",
            "counts as working when its module imports, its method is registered and each test of what it promises",
            "exists. Tier 1 is built first.",
            "",
            "The same list on the command line: `foveate papers`.",
            "",
            *_section("Working", working),
            *_section("Planned", planned),
        ]
    )


def _section(title: str, catalog: list[Paper]) -> list[str]:
    if not catalog:
        return []
    rows = [
        f"| [{_cell(p.name)}]({p.id}.md) | {_cell(p.title)} | {p.year or ''} | {_cell(p.home)} | {p.tier} |"
        for p in catalog
    ]
    head = ["| name | title | year | home | tier |", "|---|---|---|---|---|"]
    return [f"## {title}", "", *head, *rows, ""]


def page(paper: Paper) -> str:
    """The page of one paper."""
    source = f"[arXiv {paper.arxiv}]({paper.url})" if paper.url else "not on arXiv"
    facts = [
        ("status", paper.status if paper.missing is None else f"{paper.status}: {paper.missing}"),
        ("source", f"{source}, {paper.year}" if paper.year else source),
        ("home", f"`foveate.{paper.module.removeprefix('foveate.')}`" if paper.module else f"`{paper.home}`"),
        ("tier", str(paper.tier)),
    ]
    lines = [f"# {paper.name}", "", f"*{paper.title}*", ""]
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts]
    lines += [rows[0], "|---|---|", *rows[1:], ""]
    if paper.what:
        lines += ["## What it does", "", paper.what, ""]
    if paper.tests:
        lines += ["## What is tested", "", *(f"- {_sentence(node)}" for node in paper.tests), ""]
    if paper.module and "methods" in paper.home.split("+"):
        lines += ["## Run it", "", "```console", f"$ foveate compare --methods {paper.id}", "```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(node: str) -> str:
    """`tests/a/test_b.py::test_full_budget_is_dense` -> `full budget is dense (tests/a/test_b.py)`."""
    file, *_, name = node.split("::")
    return f"{name.removeprefix('test_').replace('_', ' ')} (`{file}`)"
