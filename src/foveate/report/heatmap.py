"""Needle heat maps: the score of single-needle samples by depth and context length, one small map per row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from foveate.evaluate.record import Record
from foveate.report.rows import Row, View
from foveate.report.series import Mark

_MOST_ROWS = 11  # more distinct depths than this are put into tenths

# Orange to teal through cream: told apart by the colour-blind, and its middle is 0.5.
_STOPS = ((0.0, (178, 66, 36)), (0.25, (226, 142, 84)), (0.5, (246, 232, 205)), (0.75, (112, 181, 171)))
_LAST = (1.0, (12, 108, 104))


def colour(score: float) -> tuple[int, int, int]:
    """The one colour scale of all maps; scores outside 0..1 get the colour of the nearer end."""
    score = min(1.0, max(0.0, score))
    stops = (*_STOPS, _LAST)
    for (low, a), (high, b) in pairwise(stops):
        if score <= high:
            share = (score - low) / (high - low)
            return (
                round(a[0] + (b[0] - a[0]) * share),
                round(a[1] + (b[1] - a[1]) * share),
                round(a[2] + (b[2] - a[2]) * share),
            )
    return _LAST[1]


def _ink(rgb: tuple[int, int, int]) -> str:
    """Black or white, whichever stands out (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if (c := v / 255) <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for v in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#1b1d1f"


@dataclass(frozen=True)
class Grid:
    """Mean score per (depth, length). A cell that no sample fell into is absent."""

    row: Row
    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    cells: dict[tuple[float, int], tuple[float, int]]
    """(depth, length) -> (mean, n)."""

    @property
    def mean(self) -> float | None:
        n = sum(count for _, count in self.cells.values())
        return sum(mean * count for mean, count in self.cells.values()) / n if n else None


def _needles(record: Record) -> list[tuple[float, float]]:
    """(depth, score) of the samples that hide exactly one needle: only these have one depth."""
    found = []
    if record.higher_is_better:
        for outcome, score in zip(record.outcomes, record.scores, strict=True):
            depths = outcome.get("depths") or []
            if len(depths) == 1:
                found.append((float(depths[0]), score))
    return found


def grids(records: Sequence[Record], view: View) -> list[Grid]:
    """One grid per row of a view over all its lengths; empty where the run has no single-needle samples."""
    samples: dict[tuple[str, str, str | None], list[tuple[float, int, float]]] = defaultdict(list)

    def key(method: str, settings: object, budget: str | None) -> tuple[str, str, str | None]:
        return (method, repr(settings), budget)

    dense_of_other_use: list[tuple[float, int, float]] = []
    for record in records:
        cell = record.cell
        if cell.model != view.model or record.status != "done":
            continue
        points = [(depth, cell.length, score) for depth, score in _needles(record)]
        if cell.question_seen == view.question_seen:
            samples[key(cell.method, cell.settings, cell.budget)] += points
        elif view.dense is not None and cell.method == view.dense.method:
            dense_of_other_use += points
    if view.dense is not None:
        dense = key(view.dense.method, view.dense.settings, view.dense.budget)
        samples[dense] = samples[dense] or dense_of_other_use
    every = [point for points in samples.values() for point in points]
    exact = sorted({depth for depth, _, _ in every})
    tenths = len(exact) > _MOST_ROWS

    def bin_of(depth: float) -> float:
        return min(9, int(depth * 10 + 1e-9)) / 10 if tenths else depth

    depths = tuple(sorted({bin_of(depth) for depth in exact}))
    lengths = tuple(sorted({length for _, length, _ in every}))
    found = []
    for row in view.rows:
        points = samples.get(key(row.method, row.settings, row.budget), [])
        buckets: dict[tuple[float, int], list[float]] = defaultdict(list)
        for depth, length, score in points:
            buckets[bin_of(depth), length].append(score)
        cells = {spot: (sum(scores) / len(scores), len(scores)) for spot, scores in buckets.items()}
        if cells:
            found.append(Grid(row, depths, lengths, cells))
    return found


def short_length(length: int) -> str:
    """`4096` -> `4K`, `1500` -> `1500`."""
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length // 1000}k" if length % 1000 == 0 else str(length)


def draw(grid: Grid) -> Markup:
    """A map as SVG: lengths from left to right, the start of the context at the top."""
    left, top, bottom, gap = 40, 4, 20, 2
    wide = min(46, max(20, 190 // len(grid.lengths)))
    high = min(26, max(13, 150 // len(grid.depths)))
    width = left + wide * len(grid.lengths) + 2
    height = top + high * len(grid.depths) + bottom
    title = f"{grid.row.name}: score by depth and length"
    head = (
        f'<svg class="heatmap" data-plot="needle" viewBox="0 0 {width} {height}" style="max-width:{width * 1.4:.0f}px" '
        f'role="img" aria-label="{escape(title)}">'
    )
    parts = [head]
    for i, depth in enumerate(grid.depths):
        y = top + i * high
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + high / 2 + 3.5:.1f}" text-anchor="end">{depth:.0%}</text>'
        )
        for j, length in enumerate(grid.lengths):
            x = left + j * wide
            box = f'x="{x}" y="{y}" width="{wide - gap}" height="{high - gap}" rx="2"'
            cell = grid.cells.get((depth, length))
            where = f"depth {depth:.0%}, {length:,} tokens"
            if cell is None:
                parts.append(f'<rect class="blank" {box}><title>{where}: no sample</title></rect>')
                continue
            mean, n = cell
            rgb = colour(mean)
            parts.append(
                f'<rect class="heat" {box} fill="rgb{rgb}" data-tip="{escape(grid.row.name)}\n{where}\n'
                f'score {mean:.2f}, n={n}"/>'
            )
            if wide >= 28 and high >= 15:
                parts.append(
                    f'<text class="value" x="{x + (wide - gap) / 2}" y="{y + (high - gap) / 2 + 3.5:.1f}" '
                    f'text-anchor="middle" fill="{_ink(rgb)}">{mean:.2f}</text>'
                )
    for j, length in enumerate(grid.lengths):
        x = left + j * wide + (wide - gap) / 2
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{short_length(length)}</text>'
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def scale() -> Markup:
    """The colour scale from 0 to 1."""
    stops = "".join(f'<stop offset="{int(at * 100)}%" stop-color="rgb{rgb}"/>' for at, rgb in (*_STOPS, _LAST))
    return Markup(
        '<svg class="scale" viewBox="0 0 220 30" width="220" height="30" role="img" aria-label="colour scale 0 to 1">'
        f'<defs><linearGradient id="heat-scale">{stops}</linearGradient></defs>'
        '<rect x="10" y="2" width="200" height="10" rx="2" fill="url(#heat-scale)"/>'
        '<text class="tick" x="10" y="26" text-anchor="middle">0</text>'
        '<text class="tick" x="110" y="26" text-anchor="middle">0.5</text>'
        '<text class="tick" x="210" y="26" text-anchor="middle">1</text></svg>'
    )


def heading(grid: Grid, marks: Mapping[str, Mark]) -> Markup:
    """The marker, name and mean of a map."""
    mean = "" if grid.mean is None else f"{grid.mean:.2f}"
    icon = marks[grid.row.label].icon()
    return Markup(f'{icon}<b>{escape(grid.row.name)}</b><span class="mean">{mean}</span>')
