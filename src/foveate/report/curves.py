"""Quality along something: over turns, by depth, by position. One small plot per row, dense in each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from foveate.evaluate.statistics import Interval
from foveate.report.axis import Axis, decimals, padded
from foveate.report.quantities import quality, spread
from foveate.report.rows import Row
from foveate.report.series import Mark

WIDTH, HEIGHT = 236, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 34
_FEWEST_APART = 26  # plot units between two tick labels of the x axis


@dataclass(frozen=True)
class Point:
    """A mean over samples at one place: `x` on the axis, `tick` below it, `where` in a sentence."""

    x: float
    tick: str
    where: str
    value: Interval


@dataclass(frozen=True)
class Curve:
    """The points of one row, from left to right."""

    row: Row
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curves:
    """Curves on the same axes, dense first where it has one. `tab` tells several sets of one section apart."""

    tab: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]

    @property
    def dense(self) -> Curve | None:
        return next((curve for curve in self.curves if curve.row.dense), None)

    @property
    def drawn(self) -> tuple[Curve, ...]:
        """One plot each: every row, and dense itself only where it is alone."""
        return tuple(curve for curve in self.curves if not curve.row.dense) or self.curves

    def axes(self) -> tuple[Axis, Axis]:
        """The scales that all plots of the set share."""
        values = [end for curve in self.curves for p in curve.points for end in (p.value.low, p.value.high)]
        if min(values) >= 0 and max(values) <= 1:
            low, high = 0.0, 1.0
        else:
            low, high = padded(values, 0.06, floor=0.0 if min(values) >= 0 else -float("inf"))
        places = [p.x for curve in self.curves for p in curve.points]
        first, last = min(places), max(places)
        if first == last:
            first, last = first - 0.5, last + 0.5
        return (
            Axis(first, last, _LEFT + 7, WIDTH - _RIGHT - 9),
            Axis(low, high, HEIGHT - _BOTTOM, _TOP),
        )


def heading(curve: Curve, marks: Mapping[str, Mark]) -> Markup:
    """The marker and name of a row."""
    return Markup(f"{marks[curve.row.label].icon()}<b>{escape(curve.row.name)}</b>")


def draw(curves: Curves, curve: Curve, marks: Mapping[str, Mark]) -> Markup:
    """A plot as SVG: the row's means with their 95% intervals as a band, and dense dotted behind it."""
    x, y = curves.axes()
    said = "; ".join(f"{p.where} {quality(p.value)} ({spread(p.value)}, n={p.value.n})" for p in curve.points)
    title = f"{curve.row.name}, {curves.y_title} by {curves.x_title}: {said}"
    parts = [
        f'<svg class="curve" data-plot="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    ]
    parts += _grid(curves, x, y)
    dense = curves.dense
    if dense is not None and dense is not curve:
        parts.append(f'<path class="band" d="{_band(dense.points, x, y)}"/>')
        parts.append(f'<path class="dense-line" d="{_line(dense.points, x, y)}"/>')
    css = marks[curve.row.label].css
    parts.append(f'<path class="area {css}" d="{_band(curve.points, x, y)}"/>')
    parts.append(f'<path class="line {css}" d="{_line(curve.points, x, y)}"/>')
    beside = {p.x: p.value for p in dense.points} if dense is not None and dense is not curve else {}
    for point in curve.points:
        lines = [curve.row.name, f"{point.where}: {quality(point.value)}  (95% CI {spread(point.value)})"]
        lines.append(f"n={point.value.n}")
        if point.x in beside:
            lines.append(f"dense {quality(beside[point.x])}  (95% CI {spread(beside[point.x])})")
        at = f'cx="{x(point.x):.1f}" cy="{y(point.value.estimate):.1f}"'
        tip = escape("\n".join(lines))
        parts.append(f'<circle class="dot {css}" {at} r="2.6"/><circle class="hit" {at} r="8" data-tip="{tip}"/>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _line(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x(p.x):.1f},{y(p.value.estimate):.1f}" for p in points)


def _band(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The outline of the intervals; of a single point a bar."""
    if len(points) == 1:
        (p,) = points
        left, right = x(p.x) - 4, x(p.x) + 4
        top, bottom = y(p.value.high), y(p.value.low)
        return f"M{left:.1f},{top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}Z"
    there = "L".join(f"{x(p.x):.1f},{y(p.value.high):.1f}" for p in points)
    back = "L".join(f"{x(p.x):.1f},{y(p.value.low):.1f}" for p in reversed(points))
    return f"M{there}L{back}Z"


def _grid(curves: Curves, x: Axis, y: Axis) -> list[str]:
    parts = []
    ticks = y.ticks(4)
    for value in ticks:
        at = y(value)
        parts.append(f'<path class="grid" d="M{_LEFT},{at:.1f}H{WIDTH - _RIGHT}"/>')
        text = f"{value:,.{decimals(ticks)}f}"
        parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>')
    places = sorted({(p.x, p.tick) for curve in curves.curves for p in curve.points})
    last = -float("inf")
    for place, text in places:
        at = x(place)
        parts.append(f'<path class="grid" d="M{at:.1f},{HEIGHT - _BOTTOM}v3"/>')
        wide = max(_FEWEST_APART, len(text) * 6.2 + 6)
        if at - last >= wide:
            last = at
            end = min(at, WIDTH - len(text) * 3.1)
            where = f'x="{end:.1f}" y="{HEIGHT - _BOTTOM + 14}" text-anchor="middle"'
            parts.append(f'<text class="tick" {where}>{escape(text)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    title = escape(curves.x_title)
    parts.append(f'<text class="tick title" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{title}</text>')
    parts.append(f'<path class="frame" d="M{_LEFT},{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    return parts
