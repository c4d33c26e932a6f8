"""The page of the sweep: tables per length, pictures, what holds a quarter without a loss, and dense on every task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bounds import bounds
from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.statistics import Interval, Paired, detectable_loss, mean_interval, p_text
from foveate.report import quantities as q
from foveate.report.cells import Line, cell_lines
from foveate.report.naming import RowKey, budget_order
from foveate.report.rows import Row, View
from foveate.report.samples import key_of
from foveate.report.scatter import Cost, Size
from grid import ABLE, BOUNDS, SAVES, Pair, Sweep, compared, held, needles, plain, shared

SIZE = Size("page", 860, 620, 12, 8)
COSTS: dict[Cost, str] = {"bytes": "bytes held", "pairs": "pairs read"}
"""What a length is drawn against, in words."""
QUARTER = 0.25
SHORT = (1024, 2048)
"""Lengths at which holding a quarter is looked at."""
PAIRED = 100
"""Samples per length that this takes."""
FEWEST = 5
"""Rows that a picture needs."""
LOSERS = 8
"""Rows with a detectable loss that are shown behind those without."""


def sweep_part(sweep: Sweep, manifest: Path, images: str, many: Sweep | None = None) -> str:
    """The generated part of the page; pictures lie under `images`, `many` holds needles with more samples."""
    return "\n".join(
        [
            *overview(sweep, manifest),
            *(line for view in sweep.views for line in per_length(sweep, view, images)),
            *quarter(sweep, many),
            *bounds(sweep),
            *suite(sweep),
            "",
        ]
    )


def overview(sweep: Sweep, manifest: Path) -> Iterator[str]:
    cells = len(sweep.grid)
    refused = sum(record.status == "refused" for record in sweep.grid)
    done = [record for record in sweep.grid if record.status == "done"]
    samples = sorted({len(record.scores) for record in done})
    first, last = done[0].cell, done[-1]
    rows = {(r.cell.method, json.dumps(r.cell.settings, sort_keys=True), r.cell.budget) for r in sweep.grid}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(last.versions.items()))
    settings = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    dtype = f", {d}" if (d := settings.get("settings", {}).get("dtype")) else ""
    count = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    yield "## What was run"
    yield ""
    yield (
        f"{first.model}{dtype}, question {'seen' if first.question_seen else 'not seen'} at compression: "
        f"{len(rows)} rows (method × budget) × {' / '.join(f'{n:,}' for n in sweep.lengths)} tokens × tasks "
        f"{', '.join(sweep.tasks)}; {cells:,} cells, of which {refused:,} lie below a method's floor or were refused; "
        f"{count} samples a cell, the same for every method. {last.device}; {versions}."
    )
    yield ""
    yield from complete(sweep)
    if settings.get("command"):
        yield f"`{settings['command']}`"
        yield ""


def complete(sweep: Sweep) -> Iterator[str]:
    """How much of the grid was run, and where dense has nothing to lose."""
    parts = []
    for view in sweep.views:
        ran = [row for row in view.rows if row.cells or row.refusals]
        whole = sum(row.cells + len(row.refusals) >= row.expected for row in ran)
        parts.append(f"{whole} of {len(ran)} rows at {view.length:,} tokens")
    yield (
        f"Complete, counting cells below a floor: {', '.join(parts)}. A row that lacks cells says so; its score is of "
        "other tasks than its neighbours', its difference from dense of the same. Pictures show complete rows."
    )
    yield ""
    if sweep.hard:
        hard = ", ".join(f"{task} at {length:,}" for length, task in sorted(sweep.hard, key=lambda h: (h[1], h[0])))
        yield f"Dense itself scores below {ABLE} on {hard}: there a method can lose next to nothing."
        yield ""


def per_length(sweep: Sweep, view: View, images: str) -> Iterator[str]:
    """Pictures and table of one length."""
    assert view.length is not None
    yield f"## {view.length:,} tokens"
    yield ""
    for cost, title in COSTS.items():
        if drawn(view, cost) is not None:
            yield f"![Quality against {title} at {view.length:,} tokens]({images}/{picture_name(view, cost)})"
            yield ""
    yield from length_table(sweep, view)
    yield ""


def picture_name(view: View, cost: str) -> str:
    return f"sweep-{view.length}-{cost}.svg"


def drawn(view: View, cost: Cost) -> View | None:
    """The rows that a picture shows: complete ones that save something of its cost, dense, and bounds where they read
    less. None where there are too few for a picture."""

    def share(row: Row) -> float | None:
        return row.kv_share if cost == "bytes" else row.pairs_read

    saving = [r for r in view.rows if r.complete and (r.dense or ((s := share(r)) is not None and s < SAVES))]
    rows = tuple(r for r in saving if cost == "pairs" or r.method not in BOUNDS)
    return replace(view, rows=rows) if len(rows) >= FEWEST else None


def length_table(sweep: Sweep, view: View) -> Iterator[str]:
    """One row per method and budget."""
    lines: dict[tuple[RowKey, str], Line] = {
        (key_of(line.row), line.record.cell.task): line
        for line in cell_lines([r for r in sweep.grid if r.cell.length == view.length], view)
    }
    head = "method | budget | KV held | pairs read | prompt pairs | score | against dense | evidence held / read"
    yield f"| {head} | {' | '.join(sweep.tasks)} |"
    yield f"|---|--:|--:|--:|--:|--:|--:|--:|{'--:|' * len(sweep.tasks)}"
    for row in view.rows:
        name = f"**{plain(row.label)}**" if row.front_bytes or row.front_pairs else plain(row.label)
        who = f"| {name} | {row.budget or q.MISSING} "
        tasks = [task_cell(lines.get((key_of(row), task))) for task in sweep.tasks]
        if not row.cells:
            yield f"{who}| {refusal(row)} |{' – |' * 5} {' | '.join(tasks)} |"
            continue
        partial = "" if row.complete else f" ({row.cells} of {row.expected} cells)"
        yield "".join(
            [
                who,
                f"| {q.percent(row.kv_share)} | {q.percent(row.pairs_read)} | {q.percent(row.pairs_prefill)} ",
                f"| {with_spread(row.score)}{partial} | {versus(row.score_vs_dense)} ",
                f"| {q.percent(row.evidence_held)} / {q.percent(row.evidence_read)} | {' | '.join(tasks)} |",
            ]
        )


def task_cell(line: Line | None) -> str:
    if line is None:
        return q.MISSING
    if line.record.status == "refused":
        return "below floor" if line.record.floor is not None else "refused"
    mark = "" if line.difference is None else "↓" if line.difference.loss else "↑" if line.difference.gain else ""
    return f"{with_spread(line.quality)}{mark}"


def refusal(row: Row) -> str:
    """The floors of a row's cells as one range, or that it was refused."""
    floors = [refusal.floor for refusal in row.refusals if refusal.floor is not None]
    if not floors:
        return "refused" if row.refusals else q.MISSING
    low, high = f"{min(floors):.2g}", f"{max(floors):.2g}"
    return f"not below {low}" if low == high else f"not below {low} to {high}"


def with_spread(value: Interval | None) -> str:
    return f"{q.quality(value)} ({q.spread(value)})" if value else q.MISSING


def versus(result: Paired | None) -> str:
    """A paired difference with its interval, bold where it is significant."""
    if result is None:
        return q.MISSING
    text = f"{q.signed(result.difference)} ({q.signed(result.low)} to {q.signed(result.high)})"
    return f"**{text}**" if result.loss or result.gain else text


def quarter(sweep: Sweep, many: Sweep | None) -> Iterator[str]:
    """What holds at most a quarter of the bytes, and whether needles show a loss, per length."""
    yield "## A quarter of the bytes without a detectable loss"
    yield ""
    if many is not None:
        yield from small(many, "Settings and compositions with more samples", 1.0)
    yield from small(sweep, "The rows of the sweep", QUARTER)
    yield (
        f"A row needs at least {PAIRED} samples at each length. “Loss that n could show” is the smallest loss that so "
        "many paired samples find four times out of five at the best of circumstances; no detectable loss does not "
        "exclude smaller ones, and the interval says which."
    )
    yield ""


def small(sweep: Sweep, title: str, limit: float) -> Iterator[str]:
    """The rows of some records that hold at most this share, beside dense on the needle tasks."""
    dense = list(sweep.dense.values())
    lengths = [n for n in SHORT if any(r.cell.length == n and needles(r) for r in dense)]
    found: dict[RowKey, dict[int, list[Record]]] = {}
    for key, records in sweep.rows(lambda r: needles(r) and r.cell.length in lengths).items():
        at = {n: [r for r in records if r.cell.length == n] for n in lengths}
        if key[0] not in (DENSE, *BOUNDS) and all(at.values()) and share_of(at) <= limit:
            found[key] = at
    pairs = {(key, n): shared(part, dense) for key, at in found.items() for n, part in at.items()}
    results = compared({key: pair for key, pair in pairs.items() if len(pair[0]) >= PAIRED})
    whole = {key: [results[key, n] for n in lengths] for key in found if all((key, n) in results for n in lengths)}
    passing = {key: parts for key, parts in whole.items() if not any(part.loss for part in parts)}
    losing = {key: parts for key, parts in whole.items() if key not in passing}
    if not whole:
        return
    where = " and ".join(f"{n:,}" for n in lengths)
    tasks = ", ".join(sorted({r.cell.task for at in found.values() for part in at.values() for r in part}))
    within = sum(share_of(found[key]) <= QUARTER for key in whole)
    good = sum(share_of(found[key]) <= QUARTER for key in passing)
    yield f"### {title}"
    yield ""
    yield (
        f"{tasks}; {where} tokens; question {'seen' if dense[0].cell.question_seen else 'not seen'}; paired with "
        f"dense on the same samples. Of {within} rows that hold at most {q.percent(QUARTER)} of the dense bytes "
        f"**{good} show no detectable loss at any of these lengths**"
        + (f"; of those with a loss at most {LOSERS} are listed." if len(losing) > LOSERS else ".")
    )
    yield ""
    head = "method | tokens | KV held | n | score | dense | difference (95 %) | p | loss that n could show | verdict"
    yield f"| {head} |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"

    def order(item: tuple[RowKey, Sequence[Paired]]) -> float:
        return -min(part.difference for part in item[1])

    for key, parts in [*sorted(passing.items(), key=order), *sorted(losing.items(), key=order)[:LOSERS]]:
        for n, result in zip(lengths, parts, strict=True):
            mine, base = (mean_interval(scores) for scores in pairs[key, n])
            least = detectable_loss(result.n)
            yield "".join(
                [
                    f"| {plain(in_full(key))} | {n:,} | {share_text(held(found[key][n]))} | {result.n} ",
                    f"| {with_spread(mine)} | {with_spread(base)} | {versus(result).strip('*')} | {p_text(result.p)} ",
                    f"| {q.MISSING if least is None else f'{least:.2f}'} ",
                    f"| {'loss' if result.loss else 'no detectable loss'} |",
                ]
            )
    yield ""


def share_of(at: Mapping[int, Sequence[Record]]) -> float:
    """The largest share of the dense bytes that a row holds at a length."""
    return max(share if (share := held(part)) is not None else 1.0 for part in at.values())


def in_full(key: RowKey) -> str:
    """A row with all its settings."""
    method, settings, budget = key
    shown = {**json.loads(settings), **({} if budget is None else {"budget": budget})}
    return f"{method} ({', '.join(f'{name}={value}' for name, value in sorted(shown.items()))})" if shown else method


def share_text(share: float | None) -> str:
    """A share with a decimal, as a quarter is the limit."""
    return q.MISSING if share is None else f"{share:.1%}"


def suite(sweep: Sweep) -> Iterator[str]:
    """Dense on every task that it ran, and the further tasks of the methods that ran them."""
    dense = sweep.dense
    tasks = list(dict.fromkeys(task for _, task, _ in dense))
    lengths = sorted({length for length, *_ in dense})
    yield "## Dense on every task"
    yield ""
    yield f"| task | {' | '.join(f'{n:,}' for n in lengths)} |"
    yield f"|---|{'--:|' * len(lengths)}"
    for task in tasks:
        cells = []
        for length in lengths:
            scores = [s for (n, name, _), r in dense.items() if (n, name) == (length, task) for s in r.scores]
            cells.append(f"{with_spread(mean_interval(scores))}, n={len(scores)}" if scores else q.MISSING)
        yield f"| {task} | {' | '.join(cells)} |"
    yield ""
    yield from further(sweep, [task for task in tasks if task not in sweep.tasks])


def further(sweep: Sweep, tasks: Sequence[str]) -> Iterator[str]:
    """The rows that ran tasks beside the grid, per length."""
    rows = sweep.rows(lambda r: r.cell.task in tasks and "|" not in r.cell.method)
    wide = {key: records for key, records in rows.items() if 2 * len({r.cell.task for r in records}) >= len(tasks)}
    keys = sorted(wide, key=lambda key: (key[0] != DENSE, key[0] not in BOUNDS, key[0], budget_order(key[2])))
    if len(keys) < 2:
        return
    dense = list(sweep.dense.values())
    yield "## Further tasks"
    yield ""
    yield "Tasks that only some rows ran; ↓ and ↑: significantly below or above dense on the same samples."
    yield ""
    pairs: dict[tuple[RowKey, int, str], Pair] = {}
    for key in keys:
        for record in wide[key]:
            pairs[key, record.cell.length, record.cell.task] = shared([record], dense)
    losses = {name: p for name, p in pairs.items() if name[2] in sweep.losses}
    results = compared({n: p for n, p in pairs.items() if n not in losses}) | compared(losses, higher=False)
    for length in sorted({r.cell.length for records in wide.values() for r in records}):
        yield f"### {length:,} tokens, further tasks"
        yield ""
        yield f"| task | {' | '.join(plain(sweep.name(key)) for key in keys)} |"
        yield f"|---|{'--:|' * len(keys)}"
        for task in tasks:
            cells = []
            for key in keys:
                scores = [s for r in wide[key] if (r.cell.length, r.cell.task) == (length, task) for s in r.scores]
                result = results.get((key, length, task)) if key[0] != DENSE else None
                mark = "" if result is None else "↓" if result.loss else "↑" if result.gain else ""
                cells.append(f"{with_spread(mean_interval(scores))}{mark}" if scores else q.MISSING)
            if any(cell != q.MISSING for cell in cells):
                yield f"| {task} | {' | '.join(cells)} |"
        yield ""
