"""The page in a real browser: the plots are drawn, labels do not collide, the controls work, nothing is fetched.

A probe script is added to a copy of the page; it measures what the browser laid out and leaves its findings in the
document, which the browser then prints.
"""

from __future__ import annotations

import html as markup
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.report.synthetic import make_records

from foveate.evaluate.record import Record
from foveate.report import MethodCard, write_report
from foveate.report.diff import Run, diff, write_diff
from foveate.report.summary import overall

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]
PROBE = """
<script>
addEventListener("load", () => {
  const all = (s, root = document) => [...root.querySelectorAll(s)];
  const rect = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const visible = (e) => e.getBoundingClientRect().width > 0;
  const plot = (svg) => ({
    box: rect(svg), kind: svg.dataset.plot,
    points: all(".pt .mark", svg).map(rect),
    labels: all(".label", svg).map((t) => [t.textContent, ...rect(t)]),
    texts: all("text", svg).map((t) => [t.textContent, ...rect(t)]),
    cells: all(".heat, .blank", svg).map((c) => [c.getAttribute("class"), getComputedStyle(c).fill, ...rect(c)]),
    colours: [...new Set(all(".pt .mark", svg).map((m) => getComputedStyle(m).fill))],
  });
  const found = { errors: window.probeErrors };
  found.width = innerWidth;
  found.scroll = document.documentElement.scrollWidth;
  found.scatter = all("svg.scatter").filter(visible).map(plot);
  found.maps = all("svg.heatmap").filter(visible).map(plot);
  const panels = () => all(".panel").filter(visible).map((p) => p.id);
  found.panels = [panels()];
  for (const button of all('.tabs[data-group$="-lengths"] button').filter(visible)) {
    button.click();
    found.panels.push(panels());
  }
  const uses = all('.tabs[data-group="uses"] button');
  uses.forEach((button) => { button.click(); found.panels.push(panels()); });
  if (uses.length) uses[0].click();
  all('.tabs[data-group$="-lengths"] button').filter(visible)[0]?.click();

  const tip = document.getElementById("tip");
  const point = all("svg.scatter").filter(visible)[0].querySelector(".pt");
  point.dispatchEvent(new PointerEvent("pointerenter", { clientX: 300, clientY: 300 }));
  found.tip = { shown: visible(tip), text: tip.textContent, want: point.dataset.tip, lit: all(".pt.lit").length };
  found.tip.box = rect(tip);
  point.dispatchEvent(new PointerEvent("pointerleave"));
  found.tip.gone = tip.hidden;

  const table = all(".table").filter(visible)[0];
  const rows = () => all("tbody tr", table).filter((r) => !r.hidden);
  const column = (i) => rows().map((r) => r.cells[i]?.dataset.sort ?? "");
  found.sorted = {};
  for (const i of [0, 2, 4]) {
    const head = table.querySelectorAll("thead th")[i];
    head.click(); const up = column(i); head.click();
    found.sorted[i] = [up, column(i)];
  }
  const search = table.querySelector("[data-filter=search]");
  const set = (name, value) => {
    const input = table.querySelector(`[data-filter=${name}]`);
    if (input.type === "checkbox") input.checked = value; else input.value = value;
    input.dispatchEvent(new Event("input"));
  };
  set("search", "snap 0.25");
  found.searched = rows().map((r) => r.dataset.text);
  set("search", ""); set("front", true);
  found.front = rows().map((r) => [r.dataset.text, r.dataset.front]);
  set("front", false); set("clean", true);
  found.clean = rows().map((r) => r.dataset.loss);
  set("clean", false);
  found.all = rows().length;

  const cells = all(".cells").filter(visible)[0];
  const left = () => all("tbody tr", cells).filter((r) => !r.hidden);
  const pick = (name, value) => {
    const input = cells.querySelector(`[data-pick=${name}]`);
    if (!input) return;
    input.value = value;
    input.dispatchEvent(new Event("input"));
  };
  found.cells = { all: left().length, picks: all("[data-pick]", cells).map((s) => s.dataset.pick) };
  pick("method", "snapkv"); pick("length", "2048");
  found.cells.picked = left().map((r) => [r.dataset.method, r.dataset.length]);
  found.cells.said = cells.querySelector(".picked").textContent;
  pick("method", ""); pick("slot", "keep");
  found.cells.slots = [...new Set(left().map((r) => r.dataset.method))];
  cells.querySelector("[data-clear]").click();
  found.cells.cleared = left().length;
  const head = cells.querySelectorAll("thead th")[4];
  head.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  found.cells.sorted = left().map((r) => r.cells[4]?.dataset.sort ?? "").filter(Boolean).map(Number);
  found.cells.focusable = head.tabIndex === 0 && all("select, button", cells).every((e) => e.tabIndex === 0);
  const families = all('.tabs[data-group="use0-lengths"] button').filter((b) => b.dataset.show.includes("family"));
  found.families = families.map((button) => {
    button.click();
    return [button.textContent, panels(), all("svg.scatter").filter(visible).length];
  });
  all('.tabs[data-group="use0-lengths"] button')[0].click();
  found.curves = all("svg.curve").filter(visible).map(plot);
  found.fetched = performance.getEntriesByType("resource").map((e) => e.name);
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
# A window has a least width of its own, wider than a telephone; a frame has none.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<script>addEventListener("message", (e) => {
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = e.data;
  document.body.append(out);
});</script>
<iframe src="probed.html" style="border:0;width:%dpx;height:%dpx"></iframe>"""
WATCH = '<script>window.probeErrors = []; addEventListener("error", (e) => probeErrors.push(e.message));</script>'
TASKS_RUN = ["needle", "niah_multiquery", "vt", "qa_1", "turns", "perplexity_positions", "ppl"]
CARDS = [MethodCard("snapkv", "SnapKV", "arXiv:2404.14469", ("keep",), "Keeps what the last window looks at.")]
CARDS += [MethodCard("kivi", "KIVI", "arXiv:2402.02750", ("format",), "Keys by channel, values by token.")]


def browse(page: Path, folder: Path, *flags: str) -> str:
    """Runs the browser on a page with a fresh profile and returns what it printed."""
    assert BROWSER is not None
    profile = folder / f"profile{len(list(folder.glob('profile*')))}"
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def probe(page: Path, folder: Path, width: int, height: int = 1200) -> dict[str, Any]:
    """What the page looks like in a frame of this size."""
    text = page.read_text(encoding="utf-8")
    copy = page.with_name("probed.html")
    copy.write_text(text.replace("<head>", "<head>" + WATCH).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME % (width, height), encoding="utf-8")
    dom = browse(frame, folder, f"--window-size={max(width, 800)},{height}", "--dump-dom")
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-1000:]
    return json.loads(markup.unescape(found[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def records() -> list:
    records = make_records(61, questions=(True, False), budgets=(0.25, 0.5, 0.75), tasks=TASKS_RUN[:-1])
    cell = replace(records[0].cell, method="needs-a-gpu", budget="0.5")
    reason = "the kernels of this method need an accelerator with compute capability 8.0, and this machine has none; "
    return [*records, Record(cell=cell, status="refused", refused=reason + "run it on such a machine")]


@pytest.fixture(scope="module")
def page(folder: Path, records: list) -> Path:
    return write_report(records, CARDS, folder / "run", {"samples": 15})


@pytest.fixture(scope="module", params=[1280, 390], ids=["desktop", "telephone"])
def seen(request: pytest.FixtureRequest, page: Path, folder: Path) -> dict[str, Any]:
    return probe(page, folder, request.param)


def apart(a: list[float], b: list[float]) -> bool:
    return a[0] >= b[2] - 0.5 or b[0] >= a[2] - 0.5 or a[1] >= b[3] - 0.5 or b[1] >= a[3] - 0.5


def within(inner: list[float], outer: list[float]) -> bool:
    return (
        inner[0] >= outer[0] - 1 and inner[1] >= outer[1] - 1 and inner[2] <= outer[2] + 1 and inner[3] <= outer[3] + 1
    )


def test_no_script_error_and_nothing_fetched(seen: dict[str, Any]):
    assert seen["errors"] == []
    assert seen["fetched"] == []


def test_the_page_is_no_wider_than_the_screen(seen: dict[str, Any]):
    assert seen["width"] in (1280, 390)
    assert seen["scroll"] <= seen["width"]


def test_every_point_is_drawn_inside_its_plot(seen: dict[str, Any], records: list):
    view = overall(records)[0]
    want = {
        "bytes": sum(row.cells > 0 for row in view.rows),
        "decode": sum(row.decode_ms is not None for row in view.rows),
    }
    assert [plot["kind"] for plot in seen["scatter"]] == ["bytes", "decode"]
    for plot in seen["scatter"]:
        assert plot["box"][2] - plot["box"][0] > 300
        assert len(plot["points"]) == want[plot["kind"]]
        for point in plot["points"]:
            assert point[2] - point[0] > 4
            assert within(point, plot["box"])
        assert len(plot["colours"]) >= 8, "the style sheet gives every method its colour"
        assert "rgb(0, 0, 0)" not in plot["colours"], "an unstyled mark is black"


def test_no_label_collides_and_every_text_is_inside(seen: dict[str, Any]):
    for plot in seen["scatter"]:
        labels = plot["labels"]
        assert len(labels) >= 6
        for i, (name, *box) in enumerate(labels):
            for other, *place in labels[:i]:
                assert apart(box, place), (name, other)
            # A label may touch the corner of a marker's box, never its middle.
            for x1, y1, x2, y2 in plot["points"]:
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                assert not (box[0] < x < box[2] and box[1] < y < box[3]), name
    for plot in seen["scatter"] + seen["maps"]:
        assert [text for text, *box in plot["texts"] if not within(box, plot["box"])] == []
    for plot in seen["scatter"]:
        ticks = [box for text, *box in plot["texts"] if re.fullmatch(r"[\d.,]+%?", text)]
        assert len(ticks) >= 8
        for i, box in enumerate(ticks):
            assert all(apart(box, other) for other in ticks[:i]), "tick labels run into each other"


def test_maps_are_drawn_in_colour(seen: dict[str, Any], records: list):
    view = overall(records)[0]
    assert len(seen["maps"]) == sum(row.cells > 0 for row in view.rows)
    fills = set()
    for plot in seen["maps"]:
        assert len(plot["cells"]) == 5 * 3
        for _, fill, *box in plot["cells"]:
            fills.add(fill)
            assert within(box, plot["box"])
            assert box[2] - box[0] > 15
    assert len(fills) >= 4


def test_tabs_show_one_panel_at_a_time(seen: dict[str, Any]):
    names = ["all", "1024", "2048", "4096", *(f"family{i}" for i in range(6))]
    assert seen["panels"][0] == ["use0-all"]
    assert seen["panels"][1:11] == [[f"use0-{name}"] for name in names]
    assert seen["panels"][11:] == [["use0-family5"], ["use1-all"]]


def test_a_pointer_on_a_point_shows_its_figures_and_its_method(seen: dict[str, Any]):
    tip = seen["tip"]
    assert tip["shown"]
    assert tip["text"] == tip["want"]
    assert "95% CI" in tip["text"]
    assert tip["lit"] == 3 or tip["text"].startswith("dense"), "all budgets of the method light up"
    assert within(tip["box"], [0, 0, seen["width"], 10_000])
    assert tip["gone"]


def test_columns_sort_both_ways_with_empty_cells_last(seen: dict[str, Any]):
    for column, (up, down) in seen["sorted"].items():
        known_up, known_down = [v for v in up if v], [v for v in down if v]
        key = str.lower if column == "0" else float
        assert [key(v) for v in known_up] == sorted(map(key, known_up))
        assert [key(v) for v in known_down] == sorted(map(key, known_up), reverse=True)
        assert up == known_up + [""] * (len(up) - len(known_up))
        assert down == known_down + [""] * (len(down) - len(known_down))


def test_filters_hide_rows(seen: dict[str, Any]):
    assert set(seen["searched"]) == {"snapkv 0.25", "snapkv|kivi 0.25"}
    assert seen["front"]
    assert all(flag == "1" for _, flag in seen["front"])
    assert all(flag == "0" for flag in seen["clean"])
    assert max(len(seen["front"]), len(seen["clean"])) < seen["all"] == 1 + 9 * 3 + 1


def test_every_cell_can_be_picked_and_sorted(seen: dict[str, Any], records: list):
    cells = seen["cells"]
    mine = [r for r in records if r.cell.question_seen]
    assert cells["all"] == cells["cleared"] == len(mine)
    assert cells["picks"] == ["method", "slot", "budget", "family", "task", "length"]
    assert cells["picked"] == [["snapkv", "2048"]] * (3 * len(TASKS_RUN))
    assert cells["said"] == f"{len(cells['picked'])} of {len(mine)}: method snapkv, length 2,048"
    assert set(cells["slots"]) == {"snapkv", "snapkv|kivi"}
    assert cells["sorted"] == sorted(cells["sorted"])
    assert cells["focusable"]


def test_families_have_plots_of_their_own(seen: dict[str, Any]):
    names = ["needle", "perplexity", "ppl", "qa", "tracing", "turns"]
    assert seen["families"] == [[name, [f"use0-family{i}"], 2] for i, name in enumerate(names)]


def test_curves_are_drawn_inside_their_plots(seen: dict[str, Any], records: list):
    rows = sum(row.cells > 0 and not row.dense for row in overall(records)[0].rows)
    assert len(seen["curves"]) == 3 * rows, "turns, depths, and perplexity at the first length"
    for plot in seen["curves"]:
        assert plot["box"][2] - plot["box"][0] > 120
        assert [text for text, *box in plot["texts"] if not within(box, plot["box"])] == []
        ticks = [box for text, *box in plot["texts"] if re.fullmatch(r"[\d.,]+%?", text)]
        for i, box in enumerate(ticks):
            assert all(apart(box, other) for other in ticks[:i]), "tick labels run into each other"


def test_a_page_of_differences(folder: Path, records: list):
    later = [replace(r, scores=[s * 0.5 for s in r.scores]) if r.cell.method == "kivi" else r for r in records]
    runs = [Run(name, tuple(some), {}) for name, some in (("a", records), ("b", later))]
    page = write_diff(diff(*runs), folder / "diff")
    copy = page.with_name("measured.html")
    script = (
        "<script>addEventListener('load', () => { const pick = document.querySelector('[data-pick=verdict]');"
        "pick.value = 'noise'; pick.dispatchEvent(new Event('input'));"
        "const rows = [...document.querySelectorAll('.cells tbody tr')].filter((r) => !r.hidden);"
        "document.title = [probeErrors.length, document.documentElement.scrollWidth <= innerWidth,"
        "rows.length > 0 && rows.every((r) => r.dataset.method === 'kivi')].join(' '); });</script></body>"
    )
    text = page.read_text(encoding="utf-8").replace("<head>", "<head>" + WATCH).replace("</body>", script)
    copy.write_text(text, encoding="utf-8")
    dom = browse(copy, folder, "--window-size=1280,1200", "--dump-dom")
    found = re.search("<title>(.*?)</title>", dom)
    assert found is not None and found[1] == "0 true true"


def test_the_plots_are_painted(folder: Path):
    """Pixels, not elements: each plot region of the screenshot holds many colours, among them saturated ones."""
    page = write_report(make_records(62, budgets=(0.3,)), CARDS, folder / "small")
    size = (1280, 3000)
    shot = folder / "page.png"
    found = probe(page, folder, *size)
    browse(page, folder, f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == size[0]
    regions = [plot["box"] for plot in found["scatter"] + found["maps"] if plot["box"][3] < pixels.shape[0]]
    assert len(regions) == 2 + 10, "two plots, and a map for dense and each of nine methods"
    for left, top, right, bottom in regions:
        part = pixels[int(top) : int(bottom), int(left) : int(right)]
        saturation = part.max(axis=2) - part.min(axis=2)
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 30
        assert (saturation > 60).mean() > 0.002
        assert part.std() > 5


def test_dark_mode_is_dark_and_still_legible(page: Path, folder: Path):
    shot = folder / "dark.png"
    browse(page, folder, "--window-size=1280,1400", f"--screenshot={shot}", "--blink-settings=preferredColorScheme=0")
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    assert np.median(pixels) < 60
    assert (pixels > 180).mean() > 0.005


def test_without_script_everything_is_still_there(page: Path, folder: Path):
    text = page.read_text(encoding="utf-8")
    bare = page.with_name("bare.html")
    bare.write_text(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL), encoding="utf-8")
    copy = bare.with_name("measured.html")
    script = (
        "<script>addEventListener('load', () => { document.title = [...document.querySelectorAll('.panel')]"
        ".filter((p) => p.getBoundingClientRect().height > 300).length; });</script></body>"
    )
    copy.write_text(bare.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    dom = browse(copy, folder, "--window-size=1280,1200", "--dump-dom")
    assert "<title>20</title>" in dom, "two uses of ten panels each, none hidden"
