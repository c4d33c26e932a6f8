"""Quality against a cost as an SVG picture, drawn without a browser and without a plotting library.

The picture styles itself through CSS classes of the page, so that it follows light and dark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

from foveate.evaluate.statistics import Interval
from foveate.report.axis import Axis, decimals, padded
from foveate.report.labels import Anchor, Box, Wanted, place, text_width
from foveate.report.quantities import bytes_text, milliseconds, percent, quality, signed, spread, times
from foveate.report.rows import Row, View
from foveate.report.series import Mark

Cost = Literal["bytes", "decode", "pairs"]
_RADIUS = 4.6

_COSTS: dict[Cost, tuple[Callable[[Row], float | None], Callable[[Row], bool]]] = {
    "bytes": (lambda row: row.kv_bytes, lambda row: row.front_bytes),
    "decode": (lambda row: row.decode_ms, lambda row: row.front_decode),
    "pairs": (lambda row: row.pairs_read, lambda row: row.front_pairs),
}
"""What a row costs, and whether it is on the front of that cost."""

_UNITS = {"decode": (1.0, "ms"), "pairs": (0.01, "%")}


@dataclass(frozen=True)
class Size:
    """A picture for a wide page or for a telephone: the text keeps its size, the frame does not."""

    name: str
    width: int
    height: int
    font: float
    ticks: int


SIZES = (Size("wide", 560, 430, 12, 6), Size("narrow", 350, 400, 11.5, 4))


@dataclass(frozen=True)
class _Dot:
    row: Row
    value: Interval
    cost: float
    x: float
    y: float
    front: bool


def tip(row: Row, view: View) -> str:
    """What a pointer on the row shows."""
    value = view.of(row)
    lines = [row.name, f"{view.quality} {quality(value)}  (95% CI {spread(value)}, n={value.n if value else 0})"]
    result = view.versus_dense(row)
    if result is not None:
        sign = 1 if view.quality == "score" else -1
        lines.append(f"difference from dense {signed(sign * result.difference)}  (p={result.p:.3f})")
    lines.append(f"holds {bytes_text(row.kv_bytes)}  ({percent(row.kv_share)} of dense)")
    if row.decode_ratio is not None:
        lines.append(f"decode {milliseconds(row.decode_ms)} per token  ({times(row.decode_ratio)} dense)")
    if row.prefill_ratio is not None:
        lines.append(f"prefill {times(row.prefill_ratio)} dense")
    if not row.complete:
        lines.append(f"partial: {row.cells} of {row.expected} cells")
    return "\n".join(lines)


def _unit(largest: float) -> tuple[float, str]:
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if largest >= size:
            return size, name
    return 1, "bytes"


def _spread_apart(points: list[tuple[float, float]], frame: Box) -> list[float]:
    """New x of points that would cover each other: each moves sideways by the least that sets it free."""
    placed: list[tuple[float, float]] = []
    apart = _RADIUS * 2 + 1
    for x, y in points:
        moves = sorted((m for k in range(12) for m in {k * apart / 2, -k * apart / 2}), key=abs)
        for move in moves:
            new = x + move
            if not frame.left + _RADIUS <= new <= frame.right - _RADIUS:
                continue
            if all((new - px) ** 2 + (y - py) ** 2 >= (apart - 0.5) ** 2 for px, py in placed):
                break
        else:
            new = x
        placed.append((new, y))
    return [x for x, _ in placed]


def _text(x: float, y: float, text: str, css: str = "tick", anchor: str = "middle") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


class Scatter:
    """One picture: geometry first, then the SVG in layers.

    Args:
        view: the rows to draw; those without the cost are left out, see `missing`.
        marks: row label -> mark.
        cost: the x axis: held bytes, milliseconds per token, or the share of the dense pairs that a token reads.
        size: for which page width.
    """

    def __init__(self, view: View, marks: Mapping[str, Mark], cost: Cost, size: Size) -> None:
        self.view, self.marks, self.cost, self.size = view, marks, cost, size
        price, on_front = _COSTS[cost]
        known = [(r, v, c) for r in view.rows if (v := view.of(r)) and (c := price(r)) is not None and c > 0]
        self.missing = [row.name for row in view.rows if row.cells and price(row) is None]
        """Rows that have quality but not this cost."""
        self.frame = Box(50, 40, size.width - 14, size.height - 50)
        if not known:
            self.dots: list[_Dot] = []
            return
        self.unit, self.unit_name = _unit(max(c for _, _, c in known)) if cost == "bytes" else _UNITS[cost]
        costs = [c / self.unit for _, _, c in known]
        log = max(costs) / min(costs) > 2.5
        low, high = padded(costs, 0.07, log=log, least=0.2 if log else max(costs) * 0.1, floor=1e-9)
        self.x = Axis(low, high, self.frame.left, self.frame.right, log)
        inner = [end for _, v, _ in known for end in (v.low, v.high)]
        top = 1.0 if view.quality == "score" and max(inner) <= 1 else float("inf")
        floor = 0.0 if min(inner) >= 0 else -float("inf")
        bottom, top = padded(inner, 0.05, floor=floor, ceiling=top + 0.02, least=0.1)
        # Up is better on every plot, so an axis of losses runs downwards.
        start, end = self.frame.bottom, self.frame.top
        self.y = Axis(bottom, top, start, end) if view.quality == "score" else Axis(bottom, top, end, start)
        order = sorted(known, key=lambda k: (not k[0].dense, k[2], k[1].estimate))
        spots = [(self.x(c / self.unit), self.y(v.estimate)) for _, v, c in order]
        moved = _spread_apart(spots, self.frame)
        self.dots = [
            _Dot(row, value, c, x, y, on_front(row))
            for (row, value, c), x, (_, y) in zip(order, moved, spots, strict=True)
        ]
        self.moved = any(abs(x - old) > 0.1 for x, (old, _) in zip(moved, spots, strict=True))
        """Whether a point stands beside its place so that it covers no other."""

    def svg(self) -> Markup:
        """The picture; empty where no row has this cost."""
        if not self.dots:
            return Markup("")
        title = f"{self._y_title()} against {self._x_title()}, {len(self.dots)} points"
        size = self.size
        head = (
            f'<svg class="scatter {size.name}" data-plot="{self.cost}" viewBox="0 0 {size.width} {size.height}" '
            f'role="img" aria-label="{escape(title)}" style="font-size:{size.font}px">'
        )
        parts = [
            head,
            *self._grid(),
            *self._dense_band(),
            *self._trails(),
            *self._front(),
            *self._points(),
            *self._labels(),
            "</svg>",
        ]
        return Markup("".join(parts))

    def _y_title(self) -> str:
        return "Score" if self.view.quality == "score" else "Loss (lower is better)"

    def _x_title(self) -> str:
        if self.cost == "pairs":
            return "Pairs that a new token reads, % of dense"
        return f"KV cache held, {self.unit_name}" if self.cost == "bytes" else "Decode, ms per token"

    def _grid(self) -> list[str]:
        f, size = self.frame, self.size
        parts = []
        y_ticks = self.y.ticks(6)
        for value in y_ticks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{f.left:.1f},{y:.1f}H{f.right:.1f}"/>')
            parts.append(_text(f.left - 8, y + 4, _number(value, decimals(y_ticks)), anchor="end"))
        x_ticks = self.x.ticks(size.ticks)
        for value in x_ticks:
            x = self.x(value)
            parts.append(f'<path class="grid" d="M{x:.1f},{f.top:.1f}V{f.bottom:.1f}"/>')
            parts.append(_text(x, f.bottom + 18, _number(value, decimals(x_ticks))))
        parts.append(_text((f.left + f.right) / 2, f.bottom + 40, self._x_title(), "axis"))
        parts.append(_text(f.left - 40, 14, f"{self._y_title()} ↑", "axis", "start"))
        parts += self._share_axis()
        parts.append(f'<path class="frame" d="M{f.left:.1f},{f.bottom:.1f}H{f.right:.1f}"/>')
        return parts

    def _share_axis(self) -> list[str]:
        """The same axis as a share of dense, above the frame."""
        dense = self.view.dense_bytes if self.cost == "bytes" else self._dense_decode()
        if not dense or self.cost == "pairs":  # of which the axis itself is a share
            return []
        whole = dense / self.unit / 100
        axis = Axis(self.x.low / whole, self.x.high / whole, self.x.start, self.x.end, self.x.log)
        ticks = axis.ticks(self.size.ticks)
        f = self.frame
        # The heading of the y axis stands at the left of the same line.
        parts = [_text(f.right, 14, "% of dense", "axis", "end")]
        for value in ticks:
            x = axis(value)
            parts.append(_text(x, f.top - 8, f"{_number(value, decimals(ticks))}%", "tick top"))
        return parts

    def _dense_decode(self) -> float | None:
        dense = self.view.dense
        return None if dense is None else dense.decode_ms

    def _dense_band(self) -> list[str]:
        """The interval of dense across the plot: what lies within it is not told apart by eye."""
        dense = self.view.dense
        value = None if dense is None else self.view.of(dense)
        if value is None:
            return []
        f = self.frame
        top, bottom = sorted((self.y(value.low), self.y(value.high)))
        y = self.y(value.estimate)
        box = f'x="{f.left:.1f}" y="{top:.1f}" width="{f.right - f.left:.1f}" height="{bottom - top:.1f}"'
        line = f'<path class="dense-line" d="M{f.left:.1f},{y:.1f}H{f.right:.1f}"/>'
        return [f'<rect class="band" {box}/>', line]

    def _trails(self) -> list[str]:
        """Thin lines that join the budgets of one method."""
        parts = []
        for label, mark in self.marks.items():
            dots = sorted((d for d in self.dots if d.row.label == label), key=lambda d: d.cost)
            if len(dots) > 1:
                path = "L".join(f"{d.x:.1f},{d.y:.1f}" for d in dots)
                parts.append(f'<path class="trail {mark.css}" data-series="{escape(label)}" d="M{path}"/>')
        return parts

    def _front_dots(self) -> list[_Dot]:
        return sorted((d for d in self.dots if d.front), key=lambda d: (d.cost, d.x))

    def _front(self) -> list[str]:
        """The front as a staircase: right at equal quality, then up at equal cost."""
        dots = self._front_dots()
        if not dots:
            return []
        path = f"M{dots[0].x:.1f},{dots[0].y:.1f}"
        for dot in dots[1:]:
            path += f"H{dot.x:.1f}V{dot.y:.1f}"
        return [f'<path class="front" d="{path}H{self.frame.right:.1f}"/>']

    def _points(self) -> list[str]:
        parts = []
        # Points on the front come last, so that they lie on top.
        for dot in sorted(self.dots, key=lambda d: (d.front, d.row.dense)):
            mark = self.marks[dot.row.label]
            low, high = self.y(dot.value.low), self.y(dot.value.high)
            flags = " on-front" if dot.front else ""
            flags += "" if dot.row.complete else " partial"
            flags += " dense" if dot.row.dense else ""
            text = escape(tip(dot.row, self.view))
            parts.append(
                f'<g class="pt{flags}" tabindex="0" role="img" data-series="{escape(dot.row.label)}" '
                f'data-tip="{text}" aria-label="{text}">'
                f'<path class="whisker {mark.css}" d="M{dot.x:.1f},{low:.1f}V{high:.1f}"/>'
            )
            if dot.front:
                parts.append(f'<circle class="ring" cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="{_RADIUS + 4}"/>')
            parts.append(mark.svg(dot.x, dot.y, _RADIUS))
            parts.append(f'<circle class="hit" cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="11"/></g>')
        return parts

    def _wanted(self) -> list[tuple[str, list[_Dot]]]:
        """What gets a name: the front with its budgets, dense, then any one point of every other method."""
        front = self._front_dots()
        wanted = [(dot.row.label if dot.row.dense else dot.row.name, [dot]) for dot in front]
        named = {dot.row.label for dot in front}
        others: dict[str, list[_Dot]] = {}
        for dot in self.dots:
            if dot.row.label not in named:
                others.setdefault(dot.row.label, []).append(dot)
        return wanted + sorted(others.items(), key=lambda item: (len(item[1]), item[1][0].y))

    def _labels(self) -> list[str]:
        size, room = self.size.font, self.frame.right - self.frame.left - 30
        wanted: dict[int, tuple[Wanted, list[_Dot]]] = {}
        for text, dots in self._wanted():
            bold = dots[0].front
            while text_width(text, size, bold) > room and len(text) > 4:
                text = text[:-2].rstrip("…") + "…"
            anchors = tuple(Anchor(d.x, d.y, _RADIUS + (4 if d.front else 1)) for d in dots)
            label = Wanted(text, anchors, bold)
            wanted[id(label)] = (label, dots)
        reach = _RADIUS + 1.5
        obstacles = [Box(d.x - reach, d.y - reach, d.x + reach, d.y + reach) for d in self.dots]
        soft = [Box(d.x - 1, self.y(d.value.high), d.x + 1, self.y(d.value.low)) for d in self.dots if d.front]
        dots = self._front_dots()
        for left, right in pairwise(dots):
            soft.append(Box(left.x, left.y - 1, right.x, left.y + 1))
            soft.append(Box(right.x - 1, min(left.y, right.y), right.x + 1, max(left.y, right.y)))
        parts = []
        for label in place([w for w, _ in wanted.values()], self.frame.grown(-2), size, obstacles, soft):
            dot = wanted[id(label.wanted)][1][0]
            mark, series = self.marks[dot.row.label], escape(dot.row.label)
            if label.leader is not None:
                line = f"M{label.anchor.x:.1f},{label.anchor.y:.1f}L{label.leader[0]:.1f},{label.leader[1]:.1f}"
                parts.append(f'<path class="leader {mark.css}" data-series="{series}" d="{line}"/>')
            middle = (label.box.left + label.box.right) / 2
            strong = " strong" if dot.front else ""
            parts.append(
                f'<text class="label {mark.css}{strong}" data-series="{series}" x="{middle:.1f}" '
                f'y="{label.box.bottom - size * 0.26:.1f}" text-anchor="middle">{escape(label.wanted.text)}</text>'
            )
        return parts


def scatters(view: View, marks: Mapping[str, Mark], cost: Cost) -> Sequence[Scatter]:
    """The same plot for every page width."""
    return [Scatter(view, marks, cost, size) for size in SIZES]
