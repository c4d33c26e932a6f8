"""The comparison as one HTML page that needs no network: styles, script and pictures are all inside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from foveate.errors import BadArgument
from foveate.evaluate.record import RECORDS, Record, write_atomically
from foveate.evaluate.statistics import Paired, describe
from foveate.report import quantities
from foveate.report.answers import Losses, lost_answers
from foveate.report.cards import FilledCard, MethodCard, fill
from foveate.report.cells import Line, body, cell_lines, choices, heads
from foveate.report.curves import Curves
from foveate.report.curves import draw as draw_curve
from foveate.report.curves import heading as curve_heading
from foveate.report.heatmap import Grid, draw, grids, heading, scale
from foveate.report.matrix import Matrix, matrix
from foveate.report.positions import depth_curves, perplexity_curves
from foveate.report.recommend import RULE, Recommendation, recommend_view
from foveate.report.rows import Row, View
from foveate.report.scatter import Cost, scatters
from foveate.report.series import Mark, marks
from foveate.report.summary import overall, per_family, per_length
from foveate.report.terminal import refused_lines
from foveate.report.turns import turn_curves

_HERE = Path(__file__).parent
PAGE = "report.html"


@dataclass(frozen=True)
class Plot:
    """A scatter for every page width and what its caption must add."""

    title: str
    pictures: tuple[Markup, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """One length of one use (or all lengths), or one family of tasks over all lengths: two plots and a table."""

    id: str
    tab: str
    view: View
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class CurveSet:
    """Curves on shared axes, ready to show: heading and picture of each."""

    tab: str
    pictures: tuple[tuple[Markup, Markup], ...]


@dataclass(frozen=True)
class Section:
    """A heading, what it shows in a sentence or two, and one or more sets of curves of which one is shown."""

    id: str
    title: str
    lead: str
    sets: tuple[CurveSet, ...]


@dataclass(frozen=True)
class Use:
    """One model, question seen or not: everything the page shows of it."""

    id: str
    tab: str
    view: View
    recommendation: Recommendation
    tiles: tuple[tuple[str, str, str], ...]
    panels: tuple[Panel, ...]
    turns: Section | None
    maps: tuple[tuple[Markup, Markup], ...]
    curves: tuple[Section, ...]
    lines: tuple[Line, ...]
    cards: tuple[FilledCard, ...]
    losses: tuple[Losses, ...]
    matrix: Matrix | None
    refused: tuple[tuple[str, str], ...]


def _plots(view: View, found: Mapping[str, Mark]) -> tuple[Plot, ...]:
    plots = []
    titles: tuple[tuple[Cost, str], ...] = (
        ("bytes", "Quality against KV bytes held"),
        ("decode", "Quality against decode time"),
    )
    for cost, title in titles:
        drawn = scatters(view, found, cost)
        notes = []
        if drawn[0].missing:
            notes.append(f"Not measured: {', '.join(drawn[0].missing)}.")
        if any(plot.dots and plot.moved for plot in drawn):
            notes.append("Points that would cover each other stand side by side; their exact cost is in the table.")
        plots.append(Plot(title, tuple(plot.svg() for plot in drawn if plot.dots), tuple(notes)))
    return tuple(plots)


def _panels(records: Sequence[Record], whole: View, prefix: str, found: Mapping[str, Mark]) -> tuple[Panel, ...]:
    views = per_length(records, whole.model, whole.question_seen)
    panels = []
    if len(views) > 1:
        panels.append(Panel(f"{prefix}-all", "All lengths", whole, _plots(whole, found)))
    panels += [Panel(f"{prefix}-{v.length}", f"{v.length:,} tokens", v, _plots(v, found)) for v in views]
    families = per_family(records, whole.model, whole.question_seen)
    if len(families) > 1:
        panels += [Panel(f"{prefix}-family{i}", v.family or "", v, _plots(v, found)) for i, v in enumerate(families)]
    return tuple(panels)


def _tiles(recommendation: Recommendation, view: View) -> tuple[tuple[str, str, str], ...]:
    """(heading, figure, note) of the recommended row."""
    row, dense = recommendation.row, view.dense
    if row is None or dense is None:
        return ()
    value, base = view.of(row), view.of(dense)
    word = "Score" if view.quality == "score" else "Loss"
    held = f"{quantities.bytes_text(row.kv_bytes)} of dense {quantities.bytes_text(view.dense_bytes)}"
    tiles = [
        ("KV cache held", quantities.percent(row.kv_share), held),
        (word, quantities.quality(value), f"dense {quantities.quality(base)}"),
    ]
    if row.decode_ratio is not None:
        note = f"dense · {quantities.milliseconds(row.decode_ms)} a token"
        tiles.append(("Decode time", quantities.times(row.decode_ratio), note))
    if row.prefill_ratio is not None:
        note = f"dense · {quantities.seconds(row.prefill_s)} a prompt"
        tiles.append(("Prefill time", quantities.times(row.prefill_ratio), note))
    return tuple(tiles)


def _maps(found: Sequence[Grid], known: Mapping[str, Mark]) -> tuple[tuple[Markup, Markup], ...]:
    return tuple((heading(grid, known), draw(grid)) for grid in found)


_BAND = "The band is the 95% interval; dense is dotted on grey."
_TURNS = f"""Several questions are asked of one context, one after the other: mean score of the first, of the second,
and so on. A line that falls where dense does not has lost what later turns needed. {_BAND}"""
_DEPTHS = f"""Mean score by where what is asked for stands, 0% is the start of the context, over all lengths. {_BAND}"""
_PERPLEXITY = f"""Perplexity of the next tokens of a passage after so many of it were read; lower is better. {_BAND}"""


def _section(name: str, title: str, lead: str, sets: Sequence[Curves], known: Mapping[str, Mark]) -> Section | None:
    """A section of the curves; None where there are none."""
    shown = tuple(
        CurveSet(each.tab, tuple((curve_heading(c, known), draw_curve(each, c, known)) for c in each.drawn))
        for each in sets
    )
    return Section(name, title, lead, shown) if shown else None


def _curves(records: Sequence[Record], view: View, prefix: str, known: Mapping[str, Mark]) -> tuple[Section, ...]:
    depths = depth_curves(records, view)
    sections = (
        _section(f"{prefix}-depth", "Score by depth", _DEPTHS, [depths] if depths else [], known),
        _section(
            f"{prefix}-perplexity",
            "Perplexity by position",
            _PERPLEXITY,
            perplexity_curves(records, view),
            known,
        ),
    )
    return tuple(section for section in sections if section is not None)


def _turns(records: Sequence[Record], view: View, prefix: str, known: Mapping[str, Mark]) -> Section | None:
    turns = turn_curves(records, view)
    return _section(f"{prefix}-turns", "Retention over turns", _TURNS, [turns] if turns else [], known)


def _uses(records: Sequence[Record], views: Sequence[View], cards: Sequence[MethodCard]) -> list[Use]:
    found = marks(views)
    several_models = len({view.model for view in views}) > 1
    uses = []
    for i, view in enumerate(views):
        seen = "Question seen" if view.question_seen else "Question not seen"
        recommendation = recommend_view(view)
        uses.append(
            Use(
                id=f"use{i}",
                tab=f"{view.model} · {seen.lower()}" if several_models else seen,
                view=view,
                recommendation=recommendation,
                tiles=_tiles(recommendation, view),
                panels=_panels(records, view, f"use{i}", found),
                turns=_turns(records, view, f"use{i}", found),
                maps=_maps(grids(records, view), found),
                curves=_curves(records, view, f"use{i}", found),
                lines=tuple(cell_lines(records, view, cards)),
                cards=tuple(fill(cards, view)),
                losses=tuple(lost_answers(records, view)),
                matrix=matrix(records, view),
                refused=tuple(refused_lines(view)),
            )
        )
    return uses


def _sort_key(value: float | None) -> str:
    """What a column is sorted by; empty sorts last."""
    return "" if value is None else repr(float(value))


def _verdict(result: Paired | None) -> tuple[str, str]:
    """(css class, word) of a paired result."""
    if result is None:
        return "none", quantities.MISSING
    if result.loss:
        return "bad", "loss"
    if not result.can_detect:
        return "weak", "too few"
    return ("good", "gain") if result.gain else ("good", "no loss seen")


def _signed_difference(view: View, row: Row) -> str:
    """The difference from dense in the units and direction of the axis."""
    result = view.versus_dense(row)
    if result is None:
        return quantities.MISSING
    sign = 1 if view.quality == "score" else -1
    ends = sorted((sign * result.low, sign * result.high))
    return f"{quantities.signed(sign * result.difference)} [{quantities.signed(ends[0])}, {quantities.signed(ends[1])}]"


def _distinct(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def environment() -> Environment:
    """Templates of this package, with its style sheet, its script and the spelling of numbers."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        describe=describe,
        verdict=_verdict,
        difference=_signed_difference,
        sort_key=_sort_key,
        body=body,
        choices=choices,
        heads=heads,
        q=quantities,
        # Own files of this package, not data: they go in as they are.
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
    )
    return environment


def render(
    records: Sequence[Record], cards: Sequence[MethodCard] = (), settings: Mapping[str, Any] | None = None
) -> str:
    """The page as text.

    Args:
        records: of one run, or of several joined by `record.read`.
        cards: descriptions of the methods; a method without one still shows what was measured.
        settings: what all cells share (`run.json`), shown with machine and versions.

    Raises:
        BadArgument: there are no records.
    """
    if not records:
        raise BadArgument("records", "0 records", "there is nothing to report yet; run foveate compare first")
    views = overall(records)
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in {**record.versions, "foveate": record.foveate}.items():
            versions.setdefault(name, set()).add(version)
    done = [record for record in records if record.status == "done"]
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            models=_distinct([view.model for view in views]),
            uses=_uses(records, views, cards),
            marks=marks(views),
            scale=scale(),
            rule=RULE,
            cells=len(records),
            samples=sum(len(record.scores) for record in done),
            methods=sum(1 for label in marks(views)),
            lengths=sorted({record.cell.length for record in records}),
            tasks=sorted({record.cell.task for record in records}),
            seeds=sorted({record.cell.seed for record in records}),
            created=(min(r.created for r in records), max(r.created for r in records)),
            devices=_distinct([record.device for record in records]),
            versions={name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
            commands=_distinct([record.command for record in records]),
            settings=dict(settings or {}),
            records_file=RECORDS,
        )
    )


def write_report(
    records: Sequence[Record],
    cards: Sequence[MethodCard],
    out_dir: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `report.html` into a run folder, whole or not at all, and returns its path.

    Raises:
        BadArgument: there are no records.
        FoveateError: the folder cannot be written or the disk is full; an older page is then still in place.
    """
    path = Path(out_dir) / PAGE
    write_atomically(path, render(records, cards, settings).encode())
    return path
