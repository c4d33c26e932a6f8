"""The page of the claims: what each paper promises, what the sweep and benches show of it, and a verdict by rule."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from foveate.evaluate.record import DENSE, Record
from foveate.methods import METHODS
from foveate.papers import TIMED, Check, Claim, Paper
from foveate.report import quantities as q
from foveate.report.naming import RowKey, budget_order, row_key
from grid import Sweep, compared, held, plain, saves, shared

Verdict = Literal["holds", "holds in part", "does not hold here", "not testable here"]
VERDICTS: tuple[Verdict, ...] = ("holds", "holds in part", "does not hold here", "not testable here")

FEWEST = 100
"""Samples below which a share of dense's score gets no verdict."""


@dataclass(frozen=True)
class Finding:
    """What one check found: a value with its 95 % interval (the value itself where it is exact), or why there is none.

    `low` and `high` are of the number as printed; `n` counts samples, or timed repeats.
    """

    check: Check
    why: str = ""
    value: float = 0.0
    low: float = 0.0
    high: float = 0.0
    n: int = 0
    budget: str | None = None
    lengths: tuple[int, ...] = ()
    where: str = ""

    @property
    def verdict(self) -> Verdict:
        """Holds: the value reaches what was claimed at the budget that was claimed, and the worse end of its interval
        what holds in part. In part: the value reaches that, or all of it at a larger budget."""
        if self.why:
            return "not testable here"
        check = self.check
        worst = self.low if check.more_is_better else self.high
        asked = self.budget == check.budget or check.measure in TIMED
        if asked and check.reaches(self.value, check.holds) and check.reaches(worst, check.part):
            return "holds"
        return "holds in part" if check.reaches(self.value, check.part) else "does not hold here"


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Of a claim, by its checks of quality and time; bytes and pairs follow from the budget and do not save a claim.

    Not testable: none of those could be made. Holds: all checks could be made and hold. Does not hold: those of quality
    and time that could be made fail. Else in part.
    """
    decisive = [f for f in findings if f.check.measure not in ("bytes", "pairs", "prompt pairs")] or findings
    tested = [finding for finding in decisive if not finding.why]
    if not tested:
        return "not testable here"
    if all(finding.verdict == "holds" for finding in findings):
        return "holds"
    failed = all(finding.verdict == "does not hold here" for finding in tested)
    return "does not hold here" if failed else "holds in part"


def look(check: Check, sweep: Sweep, benches: Sequence[dict[str, Any]], beside: Sweep | None = None) -> Finding:
    """What records or benches say of a check; `beside` holds settings that were run beside the sweep."""
    if check.measure in TIMED:
        return timed(check, benches)
    if not check.settings:
        return scored(check, sweep)
    # Settings were run with one seed or another; each run is a grid of its own.
    here = () if beside is None else beside.records
    ran = [r for r in here if r.cell.method == check.method and check.settings.items() <= r.cell.settings.items()]
    seeds = {r.cell.seed for r in ran}
    if not seeds:
        return Finding(check, why="these settings were not run")
    return scored(check, Sweep(tuple(r for r in here if r.cell.seed == max(seeds))))


def scored(check: Check, sweep: Sweep) -> Finding:
    """The check's row of the sweep, or the same method's row of the next larger budget where that one tells nothing."""
    rows = of_method(sweep, check.method)
    if not rows:
        return Finding(check, why="there are no records of it")
    asked = budget_order(check.budget)
    wanted = [key for key in rows if check.budget is None or (key[2] is not None and budget_order(key[2]) >= asked)]
    wanted = [key for key in wanted if check.settings.items() <= json.loads(key[1]).items()]
    losses = check.measure == "perplexity"
    found: list[Finding] = []
    for key in sorted(wanted, key=lambda key: (budget_order(key[2]), len(key[1]), key[1])):
        done = [r for r in rows[key] if r.status == "done" and fits(check, r, sweep)]
        if check.measure in ("quality", "perplexity"):
            done = [r for r in done if r.higher_is_better != losses]
        if done:
            found.append(measured(check, sweep, key, telling(check, sweep, done)))
            if not found[-1].why:
                return found[-1]
    if found:
        return found[0]
    floors = {r.floor for key in wanted for r in rows[key] if r.floor is not None}
    reason = f"not below {min(floors):.2g}" if floors else "refused"
    return Finding(
        check, why=f"{reason} at the budgets of the sweep" if wanted else "no such budget or setting was run"
    )


def of_method(sweep: Sweep, method: str) -> dict[RowKey, list[Record]]:
    """The rows of a method in the sweep's grid, refused cells included."""
    found: dict[RowKey, list[Record]] = {}
    for record in sweep.grid:
        if record.cell.method == method:
            found.setdefault(row_key(record.cell), []).append(record)
    return found


def fits(check: Check, record: Record, sweep: Sweep) -> bool:
    cell = record.cell
    return cell.task in (check.tasks or sweep.tasks) and cell.length in (check.lengths or sweep.lengths)


def telling(check: Check, sweep: Sweep, done: list[Record]) -> list[Record]:
    """Of a quality check the cells that can tell something: dense has something to lose there, and the method leaves
    something out (those that change attention's weights need not)."""
    if check.measure not in ("quality", "perplexity"):
        return done
    edits = any("weights" in METHODS[part].slots for part in check.method.split("|") if part in METHODS)
    return [r for r in done if (r.cell.length, r.cell.task) not in sweep.hard and (edits or saves(r))]


def measured(check: Check, sweep: Sweep, key: RowKey, done: list[Record]) -> Finding:
    """The finding from the finished records of a row."""
    if not done:
        return Finding(check, why="it leaves nothing out, or dense has nothing to lose, in the cells that were run")
    at: dict[str, Any] = {
        "budget": key[2],
        "lengths": tuple(sorted({record.cell.length for record in done})),
        "where": ", ".join(check.tasks or sorted({r.cell.task for r in done} if check.settings else ())),
    }
    n = sum(len(record.scores) for record in done)
    if check.measure == "bytes":
        share = held(done) or 0.0
        return Finding(check, value=share, low=share, high=share, n=n, **at)
    if check.measure in ("pairs", "prompt pairs"):
        read = [r.pairs_read if check.measure == "pairs" else r.pairs_prefill for r in done]
        known = [share for share in read if share is not None]
        if not known:
            return Finding(check, why="pairs were not counted")
        share = sum(known) / len(known)
        return Finding(check, value=share, low=share, high=share, n=n, **at)
    base = baseline(check, sweep, key)
    mine, theirs = shared(done, base)
    if not mine:
        return Finding(check, why=f"{check.against or DENSE} has no finished cell at that budget")
    lengths = {record.cell.length for record in base} & set(at["lengths"])
    at["lengths"] = tuple(sorted(lengths))
    if check.measure == "perplexity":
        result = compared({"": (mine, theirs)}, higher=False)[""]
        return Finding(check, value=-result.difference, low=-result.high, high=-result.low, n=result.n, **at)
    if len(mine) < FEWEST:
        return Finding(check, why=f"n={len(mine)} in cells that tell something, fewer than {FEWEST}")
    result, whole = compared({"": (mine, theirs)})[""], sum(theirs) / len(theirs)
    if whole <= 0:
        return Finding(check, why=f"{check.against or DENSE} scores nothing on these tasks")
    kept = [1 + part / whole for part in (result.difference, result.low, result.high)]
    return Finding(check, value=kept[0], low=max(0.0, kept[1]), high=kept[2], n=result.n, **at)


def baseline(check: Check, sweep: Sweep, key: RowKey) -> list[Record]:
    """Finished records of what quality is a share of: dense, or another method at the same budget."""
    if not check.against:
        return list(sweep.dense.values())
    rows = of_method(sweep, check.against)
    same = sorted((k for k in rows if k[2] == key[2]), key=lambda k: (k[1] != "{}", k[1]))
    return [r for r in rows[same[0]] if r.status == "done"] if same else []


def timed(check: Check, benches: Sequence[dict[str, Any]]) -> Finding:
    """The largest saving of time among the settings benched at the greatest length, beside dense of the same file. A
    bench of any kind that timed this part of a run counts."""
    name = f"{check.measure}_ms"
    found, refused = [], []
    for bench in benches:
        dense = {row["length"]: row for row in bench["rows"] if row["method"] == DENSE and row.get(name)}
        for row in bench["rows"]:
            if row["method"] == check.method and row.get("refused"):
                refused.append(f"{row['refused']} at {row['length']:,} tokens")
            elif row["method"] == check.method and row.get(name) and row["length"] in dense:
                found.append((-row["length"], row[name] / dense[row["length"]][name], bench, row, dense[row["length"]]))
    if not found:
        return Finding(check, why="; ".join([f"no {check.measure} time of it in the benches", *refused]))
    _, ratio, bench, row, dense = min(found, key=lambda each: each[:2])
    low = row.get(f"{name}_low", row[name]) / dense.get(f"{name}_high", dense[name])
    high = row.get(f"{name}_high", row[name]) / dense.get(f"{name}_low", dense[name])
    settings = row.get("settings", {}).get(check.method, {})
    text = ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
    where = f"{bench['shape']}, {bench['device'].split(',')[0]}" + (f", {text}" if text else "")
    repeats = row.get(f"{check.measure}_repeats", 0)
    return Finding(check, "", ratio, low, high, repeats, None, (row["length"],), where)


def sentence(finding: Finding) -> str:
    """A finding in a table: what was looked at, the value, what was asked of it, and the verdict."""
    check = finding.check
    name = {
        "quality": f"score against {check.against}" if check.against else "score kept",
        "perplexity": "rise of perplexity",
        "bytes": "bytes held",
        "pairs": "pairs read",
        "prompt pairs": "pairs of the prompt",
        "decode": "time per token",
        "prefill": "time of the prompt",
    }[check.measure]
    if finding.why:
        return f"{name}: {finding.why}"
    nats = check.measure == "perplexity"

    def number(value: float) -> str:
        if nats:
            return f"{q.signed(value, 3)} nats"
        return f"{value:.3f}" if check.measure == "quality" else f"{value:.1%}"

    shown = number(finding.value)
    if finding.low != finding.high:
        shown += f" ({number(finding.low)} to {number(finding.high)})"
    chosen = ", ".join(f"{key}={value}" for key, value in check.settings.items())
    budget = f" at {finding.budget}" if finding.budget is not None else f" at {chosen}" if chosen else ""
    other = f" (nothing to go by at {check.budget})" if check.budget not in (None, finding.budget) else ""
    lengths = ", ".join(f"{n:,}" for n in finding.lengths)
    where = f", {finding.where}" if finding.where else ""
    asked = f"{'≥' if check.more_is_better else '≤'} {number(check.holds)}"
    return (
        f"{name}{budget}{other}: **{shown}**, n={finding.n}; {lengths} tokens{where}; asked {asked}: {finding.verdict}"
    )


def claims_part(
    sweep: Sweep, benches: Sequence[dict[str, Any]], papers: Sequence[Paper], beside: Sweep | None = None
) -> str:
    """The generated part of the page."""
    return "\n".join([*claims_lines(sweep, benches, papers, beside), ""])


def claims_lines(
    sweep: Sweep, benches: Sequence[dict[str, Any]], papers: Sequence[Paper], beside: Sweep | None
) -> Iterator[str]:
    rows: list[tuple[Paper, Claim, list[Finding]]] = [
        (paper, paper.claim, [look(check, sweep, benches, beside) for check in paper.claim.checks])
        for paper in papers
        if paper.claim is not None
    ]
    counts = {word: sum(verdict(findings) == word for *_, findings in rows) for word in VERDICTS}
    first = sweep.grid[0].cell
    yield "## Verdicts"
    yield ""
    yield (
        f"{len(rows)} claims: "
        + ", ".join(f"{count} {word}" for word, count in counts.items())
        + f". Records: {first.model}, {', '.join(f'{n:,}' for n in sweep.lengths)} tokens, question "
        f"{'seen' if first.question_seen else 'not seen'} at compression; scores are means over "
        f"{', '.join(sweep.scored)} unless a check names its tasks."
    )
    yield ""
    yield "| method | claimed | the paper's setting | measured here | verdict |"
    yield "|---|---|---|---|---|"
    for paper, claim, findings in sorted(rows, key=lambda row: row[0].name.lower()):
        parts = [*(sentence(finding) for finding in findings), *([f"Not tested: {claim.why}"] if claim.why else [])]
        shown = [paper.name, claim.says, claim.where, "<br>".join(parts), verdict(findings)]
        name, *rest = (plain(text) for text in shown)
        yield f"| [{name}](papers/{paper.id}.md) | {' | '.join(rest[:-1])} | **{rest[-1]}** |"
