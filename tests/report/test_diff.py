"""What changed between two runs: pairs where samples are the same, tests that fit, and no claim beyond them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console
from tests.report.synthetic import HOSTILE, METHODS, make_records
from tests.report.test_html import Page

from foveate.errors import BadArgument
from foveate.evaluate.record import MANIFEST, RECORDS, Record
from foveate.evaluate.statistics import holm, paired
from foveate.report.diff import Difference, Run, diff, diff_json, open_run, print_diff, render_diff, write_diff
from foveate.report.diff.unpaired import fisher, smallest_p, unpaired
from foveate.report.diff.verdict import verdict

SETTINGS = {"samples": 15, "corpus": "docs", "corpus_digest": "abc", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return make_records(71, lengths=(1024, 2048), budgets=(0.25, 0.5), methods=METHODS[:3], tasks=["vt", "needle"])


def run(records: list[Record], **settings: object) -> Run:
    return Run("run", tuple(records), {**SETTINGS, **settings})


def worse(record: Record, share: float) -> Record:
    """The record with this share of its hits lost."""
    rng = random.Random(record.cell.key())
    if record.status != "done" or not record.higher_is_better:
        return record
    return replace(record, scores=[0.0 if rng.random() < share else score for score in record.scores])


def test_a_run_does_not_differ_from_itself(records: list[Record]):
    found = diff(run(records), run(records))
    assert (found.facts, found.only_a, found.only_b, found.refusals, found.changed) == ((), (), (), (), ())
    assert all(cell.identical and cell.paired and cell.word == "identical" for cell in found.cells)
    done = [r for r in records if r.status == "done"]
    assert len(found.cells) == len(done)
    assert verdict(found)[0] == f"Nothing changed: every score of {len(done)} cells is the same."
    assert "KV bytes are the same in all cells." in verdict(found)
    assert all(cell.kv_bytes is not None and cell.kv_bytes.ratio == 1 for cell in found.cells)


def test_a_lost_method_is_found_and_named(records: list[Record]):
    later = [worse(r, 0.5) if r.cell.method == "snapkv" else r for r in records]
    found = diff(run(records), run(later))
    assert {row.label for row in found.rows if row.significant} == {"snapkv"}
    assert all(row.worse and row.difference < 0 for row in found.rows if row.significant)
    assert verdict(found)[0].startswith("Scores changed beyond noise in 2 of 12 rows (2 worse, 0 better)")
    # The other way round the same is a gain.
    back = diff(run(later), run(records))
    assert [row.difference for row in back.rows] == pytest.approx([-row.difference for row in found.rows])
    assert all(row.better for row in back.rows if row.significant)


def test_cells_are_tested_by_sample_and_corrected_for_their_number(records: list[Record]):
    later = [worse(r, 0.3) for r in records]
    found = diff(run(records), run(later))
    one = {r.cell.key(): r for r in records}
    two = {r.cell.key(): r for r in later}
    expected = {}
    for key in one:
        if one[key].status == "done":
            cell = one[key].cell
            result = paired(two[key].scores, one[key].scores)
            expected[cell.method, cell.budget, cell.length, cell.task] = (result.difference, result.n)
    assert len(found.cells) == len(expected)
    for cell in found.cells:
        assert cell.paired
        difference, n = expected[cell.label, cell.budget, cell.length, cell.task]
        assert (cell.difference, cell.n) == (pytest.approx(difference), n)
        assert cell.b.estimate - cell.a.estimate == pytest.approx(cell.difference)
    assert [cell.corrected for cell in found.cells] == holm([cell.p for cell in found.cells])


def test_a_rising_loss_is_worse(records: list[Record]):
    rng = random.Random(1)
    later = [
        r
        if r.higher_is_better or r.status != "done"
        else replace(r, scores=[s + rng.uniform(0.1, 0.3) for s in r.scores])
        for r in records
    ]
    found = diff(run(records), run(later))
    losses = [row for row in found.rows if not row.higher_is_better]
    assert losses and all(row.worse and row.difference > 0 for row in losses)
    assert not any(row.significant for row in found.rows if row.higher_is_better), "losses and scores are not mixed"


def test_other_samples_are_not_paired_and_that_is_said(records: list[Record]):
    cases: dict[str, Run] = {
        "seed": run([replace(r, cell=replace(r.cell, seed=9)) for r in records]),
        "corpus": run(records, corpus_digest="other"),
        "references": run([replace(r, outcomes=[{**o, "references": ["other"]} for o in r.outcomes]) for r in records]),
    }
    for name, later in cases.items():
        found = diff(run(records), later)
        assert not any(cell.paired for cell in found.cells), name
        assert any("compared without pairing" in sentence for sentence in verdict(found))
        assert verdict(found)[0].startswith("Nothing changed beyond noise in"), name
        assert not any(cell.identical for cell in found.cells)
    # Without run.json scored texts, which have no references, are not known to be the same.
    bare = [replace(r, outcomes=[{**o, "references": []} for o in r.outcomes]) for r in records]
    unknown = Run("run", tuple(bare), {})
    assert not any(cell.paired for cell in diff(unknown, unknown).cells)
    assert all(cell.paired for cell in diff(run(bare), run(bare)).cells)


def test_only_shared_samples_are_paired(records: list[Record]):
    more = [r if r.status != "done" else replace(r, scores=r.scores[:9], outcomes=r.outcomes[:9]) for r in records]
    found = diff(run(more, samples=9), run(records))
    assert {(cell.n, cell.n_b, cell.paired) for cell in found.cells} == {(9, 9, True)}
    assert [(fact.name, fact.a, fact.b) for fact in found.facts] == [("samples", "9", "15")]


def test_few_samples_are_said_to_show_nothing(records: list[Record]):
    few = [r if r.status != "done" else replace(r, scores=r.scores[:5], outcomes=r.outcomes[:5]) for r in records]
    found = diff(run(few), run([worse(r, 0.9) for r in few]))
    assert found.changed == ()
    assert any("n=5 samples could not show any change by themselves" in sentence for sentence in verdict(found))


def test_what_does_not_match_is_listed(records: list[Record]):
    floor = next(r for r in records if r.status == "refused")
    ran = replace(next(r for r in records if r.cell.method == "snapkv" and r.cell.budget == "0.25"), cell=floor.cell)
    later = [ran if r is floor else r for r in records if r.cell.method != "streaming-llm"]
    found = diff(run(records), run(later))
    assert {lone.label for lone in found.only_a} == {"streaming-llm"} and found.only_b == ()
    (lone,) = found.refusals
    assert (lone.name, lone.b) == ("h2o 0.25", "run") and lone.a.startswith("refused: not below 0.29")
    assert "12 cells are in a only." in verdict(found)
    nothing = diff(run([r for r in records if r.cell.task == "vt"]), run([r for r in records if r.cell.task == "ppl"]))
    assert nothing.cells == () and verdict(nothing)[0].startswith("Nothing can be compared")
    assert Page(render_diff(nothing)).open == []


def test_runs_of_one_model_each_are_compared_under_any_name(records: list[Record]):
    other = [replace(r, cell=replace(r.cell, model="a folder")) for r in records]
    found = diff(run(records), run(other))
    assert len(found.cells) == sum(r.status == "done" for r in records)
    assert found.facts[0].name == "model"


def test_machine_and_versions_are_facts(records: list[Record]):
    later = [
        replace(r, device="another", versions={**r.versions, "torch": "9"}, kv_bytes=r.kv_bytes // 2) for r in records
    ]
    found = diff(run(records), run(later, corpus="own"))
    assert [(f.name, f.b) for f in found.facts] == [("corpus", "own"), ("machine", "another"), ("torch", "9")]
    assert not found.same_machine
    sentences = " ".join(verdict(found))
    assert "times say nothing of the method" in sentences
    assert "KV bytes differ in" in sentences and "0.50×" in sentences


def printed(found: Difference, width: int = 160) -> str:
    out = io.StringIO()
    print_diff(found, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_table_json_and_page_say_the_same(records: list[Record], tmp_path: Path):
    odd = [replace(r, device=HOSTILE) for r in records]
    found = diff(run(odd), run([worse(r, 0.6) for r in records if r.cell.method != "h2o"]))
    data = json.loads(json.dumps(diff_json(found), allow_nan=False))
    text = " ".join(printed(found).split())
    page = Page(write_diff(found, tmp_path / "out").read_text(encoding="utf-8"))
    assert page.open == [] and page.scripts == 1 and page.of("img") == []
    shown = " ".join(page.text.split())
    assert HOSTILE in shown
    for sentence in data["verdict"]:
        assert sentence in text and sentence in shown
    assert data["changed"] is True
    assert len(data["cells"]) == len(found.cells) == sum("data-verdict" in a for a in page.of("tr"))
    for row in data["rows"]:
        assert row["verdict"] in ("better", "worse", "noise", "identical")
    assert "in a only" in text and "In a only" in shown and "…" not in printed(found, 80)
    assert max(map(len, printed(found, 80).splitlines())) <= 128


def test_folders(records: list[Record], tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORDS).write_text("".join(r.to_json() + "\n" for r in records))
    (tmp_path / "a" / MANIFEST).write_text(json.dumps({"settings": SETTINGS}))
    assert open_run(tmp_path / "a").settings == SETTINGS
    found = diff(tmp_path / "a", tmp_path / "b" / RECORDS)
    assert {fact.name for fact in found.facts} == {"samples", "corpus", "corpus digest", "dtype"}
    (tmp_path / "b" / RECORDS).write_text("")
    with pytest.raises(BadArgument, match="holds no records"):
        diff(tmp_path / "a", tmp_path / "b")
    with pytest.raises(BadArgument, match="cannot be read"):
        diff(tmp_path / "a", tmp_path / "none")


# -- two groups --------------------------------------------------------------------------------------------------------


def test_fisher_is_the_share_of_arrangements():
    hits = [1, 1, 1, 0, 1, 0, 0, 0, 1]
    first = 4
    weights: dict[int, int] = {}
    for chosen in combinations(range(len(hits)), first):
        weights[sum(hits[i] for i in chosen)] = weights.get(sum(hits[i] for i in chosen), 0) + 1
    total = sum(weights.values())
    for seen, weight in weights.items():
        wanted = sum(w for w in weights.values() if w <= weight) / total
        assert fisher(seen, first, sum(hits) - seen, len(hits) - first) == pytest.approx(wanted)
    assert fisher(0, 4, 4, 4) == pytest.approx(smallest_p(4, 4)) == pytest.approx(2 / 70)


def test_two_groups_of_other_scores():
    rng = random.Random(5)
    one, two = [rng.gauss(2, 0.3) for _ in range(40)], [rng.gauss(2.5, 0.3) for _ in range(30)]
    low, high, p = unpaired(one, two)
    assert low < fmean(two) - fmean(one) < high and p < 0.001 and low > 0
    low, high, p = unpaired(one[:20], one[20:])
    assert low < 0 < high and p > 0.05
    assert unpaired([1.5, 1.5], [1.5, 1.5]) == (0.0, 0.0, 1.0)
    # Newcombe's published example (1998, table II): 56 of 70 against 48 of 80, difference 0.2, 0.0524 to 0.3339.
    low, high, _ = unpaired([1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
