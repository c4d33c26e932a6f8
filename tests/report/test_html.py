"""The page: self-contained, safe with any text, complete, written whole or not at all."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.synthetic import HOSTILE, MODEL, make_records

from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.record import DENSE
from foveate.report import MethodCard, render, summary_json, write_report
from foveate.report.cards import fill
from foveate.report.recommend import recommend
from foveate.report.summary import overall

VOID = {"meta", "link", "input", "br", "img"}
CARDS = [
    MethodCard(
        "snapkv", "SnapKV", "arXiv:2404.14469", ("keep",), "Keeps what the last <window> looks at.", {"window": 32}
    ),
    MethodCard("kivi", "KIVI", "https://arxiv.org/abs/2402.02750", ("format",), "Quantises keys and values."),
    MethodCard("quest", "Quest", "javascript:alert(1)", ("decode",), HOSTILE),
]


class Page(HTMLParser):
    """Elements, text and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def of(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and (not css or css in (a.get("class") or "").split())]


@pytest.fixture(scope="module")
def html() -> str:
    return render(make_records(51, questions=(True, False)), CARDS, {"samples": 15, "note": HOSTILE})


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_tags_are_balanced(page: Page):
    assert page.open == []


def test_nothing_is_loaded_from_anywhere(html: str, page: Page):
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "poster", "data", "xlink:href", "action", "formaction", "background"):
            assert name not in attributes, (tag, name)
        if "href" in attributes and tag != "a":
            assert attributes["href"] == "data:,"
    assert not re.search(r"url\((?!#)", html), "only urls inside the page"
    assert "@import" not in html
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_no_text_of_a_model_or_card_becomes_markup(html: str, page: Page):
    assert HOSTILE not in html
    assert page.scripts == 1
    assert page.of("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    shown = " ".join(page.text.split())
    assert HOSTILE in shown, "it is shown as the text that it is"
    links = {a.get("href") for a in page.of("a")}
    assert links == {"https://arxiv.org/abs/2404.14469", "https://arxiv.org/abs/2402.02750", "records.jsonl"}


def test_everything_of_the_run_is_on_the_page(page: Page):
    records = make_records(51, questions=(True, False))
    shown = " ".join(page.text.split())
    for advice in recommend(records):
        assert advice.sentence in shown
    assert MODEL in shown
    assert "foveate compare --methods all --budgets 0.25,0.5 --out 'runs/a b'" in shown
    for fact in ("2-core CPU, 8 GiB", "2.13.0", "5.23.0", "samples", "Keeps what the last <window> looks at."):
        assert fact in shown
    assert "not below 0.29 at 1,024, 2,048, 4,096 tokens" in shown
    for view in overall(records):
        for row in view.rows:
            assert row.name in shown or row.label in shown


def test_each_length_and_use_has_its_plots_and_its_table(page: Page):
    panels = page.of("div", "panel")
    names = ["all", 1024, 2048, 4096, "family0", "family1", "family2", "family3"]
    assert [a["id"] for a in panels] == [f"use{u}-{n}" for u in (0, 1) for n in names]
    scatter = page.of("svg", "scatter")
    assert len(scatter) == len(panels) * 2 * 2, "two costs, two page widths"
    assert len(page.of("div", "table")) == len(panels) + 2, "and one of every cell for each use"


def test_points_and_fronts_are_those_of_the_summary():
    records = make_records(52, lengths=(2048,), tasks=["needle"], loss_task=False)
    (view,) = overall(records)
    page = Page(render(records))
    points = page.of("g", "pt")
    timed = [row for row in view.rows if row.decode_ms is not None]
    measured = [row for row in view.rows if row.cells]
    assert len(points) == 2 * (len(measured) + len(timed))
    on_front = page.of("g", "on-front")
    assert len(on_front) == 2 * (sum(r.front_bytes for r in view.rows) + sum(r.front_decode for r in view.rows))
    tips = {(a["data-tip"] or "").splitlines()[0] for a in points}
    assert tips == {row.name for row in measured}
    assert "Not measured: flex-prefill 0.25, flex-prefill 0.5." in " ".join(page.text.split())


def test_sort_keys_are_numbers_or_empty(page: Page):
    cells = [a for a in page.of("td") if "data-sort" in a]
    assert len(cells) > 500
    for attributes in page.of("tr"):
        if "data-front" in attributes:
            assert attributes["data-front"] in ("0", "1")
    numeric = [a["data-sort"] for a in cells if re.match(r"[\d.-]", a["data-sort"] or "")]
    assert len(numeric) > 300
    assert all(math.isfinite(float(value or "nan")) for value in numeric)


def test_a_run_without_timings_needles_or_dense_still_makes_a_page():
    bare = make_records(53, timings=False, dense=False, tasks=["vt"], lengths=(1024,), loss_task=False)
    page = Page(render(bare))
    shown = " ".join(page.text.split())
    assert page.open == []
    assert "no dense baseline" in shown
    assert "Not measured in this run." in shown
    assert "No task of this run hides a single needle" in shown
    losses = Page(render(make_records(54, tasks=[])))
    assert "Loss (lower is better)" in losses.text


def test_one_record_makes_a_page():
    record = next(r for r in make_records(55) if r.cell.method == DENSE)
    assert Page(render([record])).open == []
    refused = next(r for r in make_records(55) if r.status == "refused")
    assert "not below 0.29" in Page(render([refused])).text


def test_no_records_is_a_clear_error():
    with pytest.raises(BadArgument, match="nothing to report yet"):
        render([])


def test_the_page_is_written_whole(tmp_path: Path):
    records = make_records(56, lengths=(1024,))
    path = write_report(records, CARDS, tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    first = path.read_text(encoding="utf-8")
    assert first.endswith("</html>")
    write_report(records[:9], CARDS, tmp_path / "run")
    assert path.read_text(encoding="utf-8") != first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FoveateError, match="cannot be written"):
        write_report(records, CARDS, tmp_path / "file")


def test_the_same_records_make_the_same_page():
    assert render(make_records(57), CARDS) == render(make_records(57), CARDS)


def test_compositions_are_described_by_their_parts():
    (view,) = overall(make_records(58))
    filled = {card.label: card for card in fill(CARDS, view)}
    assert [part.name for part in filled["snapkv|kivi"].parts] == ["SnapKV", "KIVI"]
    assert filled["snapkv"].settings == {"window": 32, "kernel": 5}
    assert [part.name for part in filled["h2o"].parts] == ["h2o"]
    assert [row.budget for row in filled["h2o"].rows] == ["0.25", "0.5"]
    assert "dense" not in filled
    own = [*CARDS, MethodCard("snapkv|kivi", "Both")]
    assert [part.name for part in {c.label: c for c in fill(own, view)}["snapkv|kivi"].parts] == ["Both"]


@pytest.mark.parametrize(
    ("paper", "link"),
    [
        ("2404.14469", "https://arxiv.org/abs/2404.14469"),
        ("arXiv:2404.14469v2", "https://arxiv.org/abs/2404.14469"),
        ("SnapKV (arXiv:2404.14469)", "https://arxiv.org/abs/2404.14469"),
        ("https://example.org/paper", "https://example.org/paper"),
        ("https://example.org/a b", None),
        ("javascript:alert(1)", None),
        ("", None),
    ],
)
def test_only_real_addresses_become_links(paper: str, link: str | None):
    assert MethodCard("x", "X", paper).link == link


def test_summary_and_page_agree():
    records = make_records(59)
    shown = " ".join(Page(render(records)).text.split())
    for view in summary_json(records)["views"]:
        assert view["recommendation"]["sentence"] in shown
