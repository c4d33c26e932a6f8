"""Writes into README.md and docs/*.md what comes from elsewhere: listings from src/, tables and pictures from results/.

A page says what it wants between two comments, and everything between them is replaced:

    <!-- source: src/foveate/methods/snapkv.py -->   the file, as a listing
    <!-- records: results/demo -->                   heading, table, picture, and how it was measured
    <!-- bench: results/bench/decode.json -->        a bench's rows as a table, and how they were measured
    <!-- bench: results/bench/decode.json#h2o,sale --> the rows of these methods alone, beside dense; of a bench of
                                                      kernels those of these families
    <!-- sweep: results/sweep -->                    tables and pictures of a sweep
    <!-- claims: results/sweep -->                   what papers claim beside what a sweep and results/bench show
    <!-- turns: results/turns -->                    several questions about one context, turn by turn
    <!-- conversions: results/convert -->            ladders of converted models, and these beside methods
    <!-- end -->

A folder of records that is not there leaves the part empty, so nothing stands in a page that was not measured.
`python docs/generate.py` writes; with `--check` it only says which pages are out of step, and exits with 1.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench_page import bench_part
from claims_page import claims_part
from conversions_page import conversions_part
from foveate.evaluate.record import MANIFEST, RECORDS, Record, read
from foveate.papers import papers
from foveate.report import quantities as q
from foveate.report.recommend import recommend_view
from foveate.report.scatter import SIZES, Cost, Scatter, Size
from foveate.report.series import marks
from foveate.report.summary import Row, View, overall
from foveate.report.terminal import refused_lines
from grid import benches, load
from kernels_page import kernels_part
from sweep_page import COSTS, SIZE, drawn, picture_name, sweep_part
from turns_page import turns_part

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PICTURES = ROOT / "docs" / "images"
PART = re.compile(
    r"(<!-- (source|records|bench|sweep|claims|turns|conversions): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL
)
BESIDE = "needles"
"""The folder beside a sweep with settings and compositions of their own, on needles with more samples."""
STYLE = ROOT / "src" / "foveate" / "report" / "page.css"
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"'
# The rules of the report's style sheet that a scatter plot needs.
DRAWN = [
    "grid",
    "frame",
    "tick",
    "axis",
    "band",
    "dense-line",
    "front",
    "ring",
    "sd",
    "mark",
    "partial",
    "trail",
    "whisker",
    "on-front",
    "leader",
    "label",
    "hit",
]
RULE = re.compile(rf"^\.(?:{'|'.join(DRAWN)}|s\d)\b[^\n]*\}}$", re.MULTILINE)
THEME = re.compile(r"^:root \{.*?^\}\n|^@media \(prefers-color-scheme: dark\) \{.*?^\}\n", re.DOTALL | re.MULTILINE)


def listing(name: str) -> str:
    """A file as a code block."""
    path = ROOT / name
    return f"```python\n{path.read_text(encoding='utf-8').rstrip()}\n```\n" if path.is_file() else ""


def measured(name: str, page: Path) -> str:
    """Table, picture and provenance of the first use in a folder of records."""
    if not (ROOT / name / RECORDS).is_file():
        return ""
    records = read(ROOT / name)
    view = overall(records)[0]
    picture = PICTURES / f"{Path(name).name}.svg"
    link = picture.relative_to(page.parent).as_posix()
    return "\n".join(
        [
            "## Measured",
            "",
            *table(view),
            "",
            *(f"Refused: {row}, {why}.\n" for row, why in refused_lines(view)),
            "",
            f"**{recommend_view(view).sentence}**",
            "",
            f"![Quality against bytes held: {view.model}]({link})",
            "",
            provenance(view, records),
            "",
        ]
    )


def table(view: View) -> Iterator[str]:
    """One view as a Markdown table."""
    yield "| method | budget | KV held | peak | pairs read | prefill | decode | quality | against dense |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for row in view.rows:
        if row.cells:
            yield f"| {' | '.join(cells(view, row))} |"


def cells(view: View, row: Row) -> Iterator[str]:
    value, difference = view.of(row), view.versus_dense(row)
    sign = 1 if view.quality == "score" else -1
    name = row.label.replace("|", "\\|")
    yield f"**{name}**" if row.front_bytes or row.front_decode else name
    yield row.budget or q.MISSING
    yield q.percent(row.kv_share)
    yield q.percent(row.peak_share)
    yield q.percent(row.pairs_read)
    yield q.times(row.prefill_ratio)
    yield q.times(row.decode_ratio)
    yield f"{q.quality(value)} ({q.spread(value)})" if value else q.MISSING
    yield q.signed(sign * difference.difference) if difference else q.MISSING


def benched(name: str) -> str:
    """The rows of a bench as a Markdown table, those that could not be had below it."""
    file, _, some = name.partition("#")
    path = ROOT / file
    if not path.is_file():
        return ""
    data = json.loads(path.read_text(encoding="utf-8"))
    of_kernels = data["kind"] == "kernels"
    if some:
        asked, key = set(some.split(",")), "family" if of_kernels else "method"
        if unknown := asked - {row[key] for row in data["rows"]}:
            raise SystemExit(f"{name}: no row of {', '.join(sorted(unknown))} is there")
        data["rows"] = [row for row in data["rows"] if row[key] in asked | {"dense"}]
    return kernels_part(data) if of_kernels else bench_part(data)


def provenance(view: View, records: list[Record]) -> str:
    """How the figures came about, in three sentences."""
    lengths = ", ".join(f"{n:,}" for n in view.lengths)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(records[-1].versions.items()))
    seen = "question seen" if view.question_seen else "question not seen"
    devices = " and ".join(sorted({record.device for record in records if record.device}))
    return (
        f"{view.model}, {lengths} tokens, {seen}, tasks {', '.join(view.tasks)}, {view.samples} samples; "
        f"{devices}; {versions}. Shares and times are relative to dense; bold rows are on a Pareto front; "
        f"intervals are 95 %. `{records[-1].command}`"
    )


def swept(name: str, page: Path) -> str:
    """Tables and pictures of a sweep, with the needles of many samples that lie beside it."""
    sweep, beside = load(ROOT / name), load((ROOT / name).with_name(BESIDE))
    images = PICTURES.relative_to(page.parent).as_posix()
    return "" if sweep is None else sweep_part(sweep, ROOT / name / MANIFEST, images, beside)


def claimed(name: str) -> str:
    """What papers claim, beside what a sweep and the benches show."""
    sweep, beside = load(ROOT / name), load((ROOT / name).with_name(BESIDE))
    return "" if sweep is None else claims_part(sweep, benches(ROOT / "results" / "bench"), papers(), beside)


def in_turns(name: str) -> str:
    """Several questions about one context."""
    return turns_part(read(ROOT / name)) if (ROOT / name / RECORDS).is_file() else ""


def converted(name: str) -> str:
    """Ladders of converted models, and these beside methods."""
    return conversions_part(ROOT / name) if (ROOT / name).is_dir() else ""


def draw(name: str) -> str:
    """The scatter of quality against held bytes of a folder of records, over all lengths."""
    return picture(overall(read(ROOT / name))[0], "bytes", SIZES[0])


def picture(view: View, cost: Cost, size: Size, among: Sequence[View] = ()) -> str:
    """A scatter as a picture of its own, light or dark as the reader's system is. Methods are marked as in all pictures
    of the views `among` which it is."""
    svg = str(Scatter(view, marks([view, *among]), cost, size).svg())
    css = STYLE.read_text(encoding="utf-8")
    style = f"<style>{''.join(THEME.findall(css))}{chr(10).join(RULE.findall(css))}</style>"
    paper = '<rect width="100%" height="100%" rx="12" style="fill:var(--card)"/>'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size.width}" height="{size.height}" {FONT} '
    return svg.replace("<svg ", frame, 1).replace(">", f">{style}{paper}", 1) + "\n"


def fill(page: Path) -> str:
    """The text of a page with its parts made anew."""

    def part(match: re.Match[str]) -> str:
        if match[2] in ("records", "sweep"):
            made = {"records": measured, "sweep": swept}[match[2]](match[3], page)
        else:
            made = {
                "source": listing,
                "bench": benched,
                "claims": claimed,
                "turns": in_turns,
                "conversions": converted,
            }[match[2]](match[3])
        return f"{match[1]}{made}{match[4]}"

    return PART.sub(part, page.read_text(encoding="utf-8"))


def pictures() -> dict[Path, str]:
    """Every picture that a page asks for."""
    asked = {(m[2], m[3]) for page in PAGES for m in PART.finditer(page.read_text(encoding="utf-8"))}
    found = {
        PICTURES / f"{Path(name).name}.svg": draw(name)
        for kind, name in asked
        if kind == "records" and (ROOT / name / RECORDS).is_file()
    }
    for sweep in (load(ROOT / name) for kind, name in asked if kind == "sweep"):
        if sweep is None:
            continue
        for view in sweep.views:
            for cost in COSTS:
                if (shown := drawn(view, cost)) is not None:
                    found[PICTURES / picture_name(view, cost)] = picture(shown, cost, SIZE, sweep.views)
    return found


def main() -> int:
    made = {page: fill(page) for page in PAGES} | pictures()
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of step; run: make records")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
