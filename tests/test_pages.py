"""What the pages of the sweep and of the claims make of records, and that they stay empty without any."""

from __future__ import annotations

import importlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.report.synthetic import Character, make_records

from foveate.evaluate.record import Log, Record
from foveate.papers import Check, Claim, Paper

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["niah_single_2", "niah_multikey_1", "fwe"]
METHODS = [
    Character("oracle", 0.0, 1, 1),
    Character("random", 0.9, 1, 1),
    Character("quest", 0.05, 1, 1),
    Character("snapkv", 0.3, 1, 1),
    Character("h2o", 0.3, 1, 1, floor=0.2),
    Character("duo-attention", 0.1, 1, 1, floor=0.4),
]


@pytest.fixture(scope="module")
def pages() -> Any:
    """The modules that make the pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        names = ("generate", "grid", "bounds", "sweep_page", "claims_page")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def synthetic(**options: Any) -> list[Record]:
    records = make_records(
        3,
        **{
            "lengths": (1024, 2048),
            "budgets": (0.125, 0.25, 0.5),
            "samples": 60,
            "questions": (False,),
            "methods": METHODS,
            "tasks": TASKS,
            "timings": False,
            **options,
        },
    )
    return [replace(r, cell=replace(r.cell, task="perplexity")) if r.cell.task == "ppl" else r for r in records]


@pytest.fixture(scope="module")
def sweep(pages: Any) -> Any:
    further = make_records(
        3,
        lengths=(1024,),
        budgets=(0.25,),
        samples=60,
        questions=(False,),
        methods=[METHODS[3]],
        tasks=["qa_1"],
        loss_task=False,
    )
    return pages.grid.Sweep.of([*synthetic(), *further])


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_the_grid_leaves_out_what_only_some_ran(sweep: Any) -> None:
    assert sweep.tasks == (*TASKS, "perplexity")
    assert sweep.scored == tuple(TASKS)
    assert sweep.lengths == (1024, 2048)
    assert {record.cell.task for record in sweep.grid} == set(sweep.tasks)


def test_a_table_per_length_has_every_row_and_its_floors(pages: Any, sweep: Any, tmp_path: Path) -> None:
    text = pages.sweep_page.sweep_part(sweep, tmp_path / "run.json", "images")
    for length in ("1,024", "2,048"):
        table = text.split(f"## {length} tokens\n")[1].split("\n## ")[0]
        assert len(lines_of(table, "| ")) == 2 + 3 * len(METHODS)
        assert "| h2o | 0.125 | not below 0.2 |" in table
        assert table.count("| duo-attention | 0.125 | not below 0.4 |") == 1
    assert "sweep-1024-bytes.svg" in text and "sweep-2048-pairs.svg" in text
    assert "| qa_1 |" in text.split("## Dense on every task")[1]


def test_bounds_are_never_on_a_front(sweep: Any) -> None:
    rows = [row for view in sweep.views for row in view.rows]
    assert not [row for row in rows if row.method in ("oracle", "random") and (row.front_bytes or row.front_pairs)]
    assert any(row.front_bytes for row in rows) and any(row.front_pairs for row in rows)


def test_cases_outside_the_bounds_are_all_there_are(pages: Any, sweep: Any) -> None:
    """Against means taken by hand from the records."""

    def mean(method: str, budget: str, length: int) -> float | None:
        scores = [
            s
            for r in sweep.grid
            if (r.cell.method, r.cell.budget, r.cell.length) == (method, budget, length) and r.cell.task in TASKS
            for s in r.scores
        ]
        return sum(scores) / len(scores) if scores else None

    found = {(c.key[0], c.key[2], c.length, c.bound) for c in pages.bounds.cases(sweep, TASKS) if c.unexpected}
    expected = set()
    for method in ("quest", "snapkv", "h2o", "duo-attention"):
        for budget in ("0.125", "0.25", "0.5"):
            for length in (1024, 2048):
                mine = mean(method, budget, length)
                best, least = (mean(bound, budget, length) for bound in ("oracle", "random"))
                if mine is not None and best is not None and mine > best:
                    expected.add((method, budget, length, "oracle"))
                if mine is not None and least is not None and mine < least:
                    expected.add((method, budget, length, "random"))
    assert found == expected


def test_a_quarter_needs_the_samples_and_the_bytes(pages: Any, sweep: Any) -> None:
    part = "\n".join(pages.sweep_page.quarter(sweep, None))
    rows = lines_of(part, "| ")[1:]
    assert rows and all("no detectable loss" in row or "| loss |" in row for row in rows)
    assert not [row for row in rows if "0.5)" in row or "oracle" in row]  # half is more than a quarter
    few = pages.grid.Sweep.of(synthetic(samples=40))
    assert lines_of("\n".join(pages.sweep_page.quarter(few, None)), "| ") == []


def test_pictures_show_complete_rows_that_save(pages: Any, sweep: Any) -> None:
    view = sweep.views[0]
    for cost in ("bytes", "pairs"):
        shown = pages.sweep_page.drawn(view, cost)
        assert all(row.complete for row in shown.rows)
        svg = pages.generate.picture(shown, cost, pages.sweep_page.SIZE, sweep.views)
        assert svg.startswith("<svg ") and svg.count('class="pt') == len(shown.rows)
    assert "random" not in {row.method for row in pages.sweep_page.drawn(view, "bytes").rows}


def test_a_row_that_lacks_cells_says_so(pages: Any, tmp_path: Path) -> None:
    records = [r for r in synthetic() if (r.cell.method, r.cell.length, r.cell.task) != ("quest", 1024, "fwe")]
    text = pages.sweep_page.sweep_part(pages.grid.Sweep.of(records), tmp_path / "run.json", "images")
    assert text.count("(3 of 4 cells)") == 3


# -- claims ------------------------------------------------------------------------------------------------------------


def check(**fields: Any) -> Check:
    return Check(**{"measure": "quality", "method": "quest", "budget": "0.25", "holds": 0.98, "part": 0.9, **fields})


def test_a_share_of_dense_is_the_ratio_of_means(pages: Any, sweep: Any) -> None:
    found = pages.claims_page.look(check(tasks=("fwe",), lengths=(1024,)), sweep, [])

    def scores(method: str, budget: str | None) -> list[float]:
        (record,) = (
            r
            for r in sweep.grid
            if (r.cell.method, r.cell.budget, r.cell.length, r.cell.task) == (method, budget, 1024, "fwe")
        )
        return record.scores

    assert found.why.startswith("n=60")  # fewer than a hundred
    found = pages.claims_page.look(check(tasks=("fwe", "niah_single_2"), lengths=(1024,)), sweep, [])
    assert found.n == 120
    assert found.low < found.value < found.high
    both = pages.claims_page.look(check(), sweep, [])
    assert both.n == 360 and both.lengths == (1024, 2048)
    assert scores("quest", "0.25") != scores("dense", None)


def test_verdicts_follow_the_rule(pages: Any) -> None:
    def verdict(value: float, low: float, high: float, budget: str = "0.25", **fields: Any) -> str:
        return pages.claims_page.Finding(check(**fields), "", value, low, high, 100, budget).verdict

    assert verdict(0.99, 0.95, 1.03) == "holds"
    assert verdict(0.99, 0.85, 1.13) == "holds in part"  # the worse end is below what holds in part
    assert verdict(0.97, 0.93, 1.01) == "holds in part"
    assert verdict(0.89, 0.85, 0.99) == "does not hold here"
    assert verdict(1.0, 0.99, 1.01, budget="0.5") == "holds in part"  # at a larger budget than claimed
    assert verdict(0.3, 0.3, 0.3, measure="bytes", holds=0.385, part=0.69) == "holds"
    assert verdict(0.7, 0.7, 0.7, measure="bytes", holds=0.385, part=0.69) == "does not hold here"
    assert pages.claims_page.Finding(check(), why="not run").verdict == "not testable here"


def test_bytes_do_not_save_a_claim(pages: Any) -> None:
    finding, verdict = pages.claims_page.Finding, pages.claims_page.verdict
    good = finding(check(), "", 1.0, 0.99, 1.01, 100, "0.25")
    bad = finding(check(), "", 0.5, 0.4, 0.6, 100, "0.25")
    part = finding(check(), "", 0.95, 0.93, 0.97, 100, "0.25")
    none = finding(check(), why="not run")
    light = finding(check(measure="bytes", holds=0.3, part=0.6), "", 0.2, 0.2, 0.2, 100, "0.25")
    assert verdict([good, light]) == "holds"
    assert verdict([bad, light]) == "does not hold here"
    assert verdict([part, light]) == verdict([good, bad]) == verdict([good, none]) == "holds in part"
    assert verdict([none, light]) == verdict([none]) == verdict([]) == "not testable here"
    assert verdict([bad, none]) == "does not hold here"


def test_a_refused_budget_gives_way_to_the_next_larger(pages: Any, sweep: Any) -> None:
    found = pages.claims_page.look(check(method="h2o", budget="0.125"), sweep, [])
    assert found.budget == "0.25" and not found.why
    floors = pages.grid.Sweep.of(synthetic(budgets=(0.125,)))
    assert "not below 0.2" in pages.claims_page.look(check(method="h2o", budget="0.125"), floors, []).why
    assert pages.claims_page.look(check(method="xkv"), sweep, []).why == "there are no records of it"


def test_cells_that_tell_nothing_are_left_out(pages: Any) -> None:
    records = synthetic(samples=100)
    same = [
        replace(r, kv_bytes=r.kv_bytes_dense, pairs_read=1.0, pairs_prefill=1.0) if r.cell.method == "quest" else r
        for r in records
    ]
    found = pages.claims_page.look(check(), pages.grid.Sweep.of(same), [])
    assert "leaves nothing out" in found.why
    hard = [replace(r, scores=[0.0] * 100) if (r.cell.method, r.cell.task) == ("dense", "fwe") else r for r in records]
    sweep = pages.grid.Sweep.of(hard)
    assert {task for _, task in sweep.hard} == {"fwe"}
    assert pages.claims_page.look(check(), sweep, []).n == 400


def test_times_are_those_of_the_longest_context(pages: Any) -> None:
    def row(method: str, length: int, ms: float, **more: Any) -> dict[str, Any]:
        times = {"decode_ms": ms, "decode_ms_low": ms * 0.9, "decode_ms_high": ms * 1.1, "decode_repeats": 9}
        return {"method": method, "length": length, "settings": {}, **times, **more}

    rows = [row("dense", 1000, 10), row("quest", 1000, 1), row("dense", 2000, 20), row("quest", 2000, 10)]
    bench = {"shape": "llama3-8b", "device": "NVIDIA H100, 79 GiB", "rows": rows}
    found = pages.claims_page.look(check(measure="decode", holds=0.5, part=0.7, budget=None), None, [bench])
    assert (found.value, found.n, found.lengths) == (0.5, 9, (2000,))
    assert found.low == pytest.approx(0.45 / 1.1) and found.high == pytest.approx(0.55 / 0.9)
    assert found.verdict == "holds"
    assert "no prefill time" in pages.claims_page.look(check(measure="prefill", holds=0.4, part=0.7), None, [bench]).why


def test_times_come_from_benches_of_every_kind(pages: Any, tmp_path: Path) -> None:
    """Prefill, decode and both at once, of any method; what a bench refused says so, CPUs and kernels do not count."""

    def bench(kind: str, device: str, **ms: float) -> None:
        rows = [
            {"method": name, "length": 131072, "settings": {}, "refused": ""} for name in ("dense", "quest", "sale")
        ]
        for name, value in ms.items():
            rows[0][f"{name}_ms"], rows[1][f"{name}_ms"] = 2 * value, value
        rows[2]["refused"] = "it took too long"
        data = {"kind": kind, "shape": "llama3-8b", "device": device, "rows": rows}
        (tmp_path / f"{len(list(tmp_path.iterdir()))}.json").write_text(json.dumps(data))

    def timed(method: str, measure: str) -> Any:
        asked = check(method=method, measure=measure, holds=0.6, part=0.8, budget=None)
        return pages.claims_page.look(asked, None, pages.grid.benches(tmp_path))

    bench("prefill", "an Intel CPU", prefill=1.0)
    bench("kernels", "NVIDIA H100", prefill=1.0)
    assert "no prefill time" in timed("quest", "prefill").why
    bench("decode", "NVIDIA H100", decode=3.0)
    assert timed("quest", "decode").value == 0.5 and "no prefill time" in timed("quest", "prefill").why
    bench("prefill", "NVIDIA H100", prefill=5.0)
    assert timed("quest", "prefill").verdict == "holds"
    for file in tmp_path.iterdir():
        file.unlink()
    bench("e2e", "NVIDIA H100", prefill=5.0, decode=3.0)
    assert timed("quest", "prefill").value == timed("quest", "decode").value == 0.5
    assert timed("sale", "prefill").why.endswith("it took too long at 131,072 tokens")


def test_the_claims_page_has_a_row_per_claim(pages: Any, sweep: Any) -> None:
    claim = Claim(says="It keeps all.", where="somewhere", checks=(check(),), why="The rest.")
    paper = Paper(id="quest", name="Quest", title="Quest", home="methods", tier=1, claim=claim)
    none = Paper(id="probe", name="Probe", title="Probe", home="methods", tier=1)
    text = pages.claims_page.claims_part(sweep, [], [paper, none])
    (line,) = lines_of(text, "| [")
    assert "It keeps all." in line and "Not tested: The rest." in line and "[Quest](papers/quest.md)" in line
    assert re.search(r"score kept at 0\.25: \*\*[\d.]+ \([\d.]+ to [\d.]+\)\*\*, n=360", line)
    assert [int(n) for n in re.findall(r"(\d+) (?:holds|does|not)", text)].count(1) == 1


# -- without records ---------------------------------------------------------------------------------------------------


def test_pages_are_empty_without_records(pages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "sweep.md"
    page.parent.mkdir()
    page.write_text(
        "<!-- sweep: results/sweep -->\nold\n<!-- end -->\n<!-- claims: results/sweep -->\nold\n<!-- end -->\n"
    )
    monkeypatch.setattr(pages.generate, "ROOT", tmp_path)
    monkeypatch.setattr(pages.generate, "PICTURES", page.parent / "images")
    monkeypatch.setattr(pages.generate, "PAGES", (page,))
    empty = "<!-- sweep: results/sweep -->\n<!-- end -->\n<!-- claims: results/sweep -->\n<!-- end -->\n"
    assert pages.generate.fill(page) == empty
    assert pages.generate.pictures() == {}
    records = synthetic(samples=random.Random(1).randint(8, 12), lengths=(1024,))
    with Log(tmp_path / "results" / "sweep", {"dtype": "bfloat16"}, "foveate compare") as log:
        log.extend([r for r in records if r.cell.method != "dense"])
    assert pages.generate.fill(page) == empty  # nothing to compare with
    with Log(tmp_path / "results" / "sweep", {"dtype": "bfloat16"}, "foveate compare") as log:
        log.extend([r for r in records if r.cell.method == "dense"])
    text = pages.generate.fill(page)
    assert "## 1,024 tokens" in text and "## Verdicts" in text and "`foveate compare`" in text
    assert {path.name for path in pages.generate.pictures()} == {"sweep-1024-bytes.svg", "sweep-1024-pairs.svg"}


def test_benches_on_a_cpu_are_left_out(pages: Any, tmp_path: Path) -> None:
    for name, device in (("a", "NVIDIA H100, 79 GiB"), ("b", "2-core CPU, 8 GiB")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [], "device": device}))
    assert [bench["device"] for bench in pages.grid.benches(tmp_path)] == ["NVIDIA H100, 79 GiB"]


def test_a_bench_of_kernels_is_shown_by_the_families_that_are_named(pages: Any) -> None:
    name = "results/bench/kernels-rivals-h100.json"
    titles = [line for line in pages.generate.benched(f"{name}#listed,latent").splitlines() if line.startswith("**")]
    assert titles == ["**Decoding over lists**", "**Decoding over latents**"]
    with pytest.raises(SystemExit, match="no row of dense"):
        pages.generate.benched(f"{name}#listed,dense")


def test_a_bench_is_shown_whole_or_by_the_methods_that_are_named(pages: Any) -> None:
    name = "results/bench/decode-llama3-8b.json"
    rows = [line.split(" |")[0] for line in pages.generate.benched(name).splitlines() if line.startswith("| ")]
    some = pages.generate.benched(f"{name}#h2o,quest")
    shown = [line.split(" |")[0] for line in some.splitlines() if line.startswith("| ")]
    assert [row.split("(")[0] for row in shown] == ["| method", "| dense", "| quest", "| h2o"]
    assert set(shown) < set(rows)
    with pytest.raises(SystemExit, match="no row of nosuch"):
        pages.generate.benched(f"{name}#h2o,nosuch")
    assert pages.generate.benched("results/bench/nosuch.json#h2o") == ""
