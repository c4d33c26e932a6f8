"""How a method is marked in every plot and table: a colour and a shape, the same throughout a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.report.rows import View

COLOURS = 9
"""Number of series colours of the style sheet: `--s0` … `--s8`."""

_SHAPES = ("circle", "square", "up", "diamond", "down", "cross", "pentagon", "star")


@dataclass(frozen=True)
class Mark:
    """Colour class and shape of a method."""

    css: str
    shape: str

    def svg(self, x: float, y: float, radius: float = 4.6) -> str:
        """The marker as a path around (x, y)."""
        return f'<path class="mark {self.css}" d="{outline(self.shape, x, y, radius)}"/>'

    def icon(self) -> str:
        """The marker as a small picture of its own, for legends and tables."""
        return f'<svg class="icon" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{self.svg(7, 7)}</svg>'


def _polygon(x: float, y: float, radii: Sequence[float], turn: float) -> str:
    n = len(radii)
    points = []
    for i, r in enumerate(radii):
        angle = turn + math.tau * i / n
        points.append(f"{x + r * math.cos(angle):.1f},{y + r * math.sin(angle):.1f}")
    return "M" + "L".join(points) + "Z"


def outline(shape: str, x: float, y: float, r: float) -> str:
    """SVG path of a shape of about equal area for every name."""
    up = -math.pi / 2
    if shape == "circle":
        return f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1 0 {2 * r},0a{r},{r} 0 1 0 {-2 * r},0Z"
    if shape == "square":
        return _polygon(x, y, [r * 1.27] * 4, math.pi / 4)
    if shape == "up":
        return _polygon(x, y + r * 0.2, [r * 1.4] * 3, up)
    if shape == "down":
        return _polygon(x, y - r * 0.2, [r * 1.4] * 3, -up)
    if shape == "diamond":
        return _polygon(x, y, [r * 1.3] * 4, up)
    if shape == "pentagon":
        return _polygon(x, y, [r * 1.15] * 5, up)
    if shape == "star":
        return _polygon(x, y, [r * 1.5, r * 0.65] * 5, up)
    if shape == "cross":
        a, b = r * 1.2, r * 0.42
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b)]
        corners.append((-b, -b))
        return "M" + "L".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners) + "Z"
    raise ValueError(shape)


def marks(views: Sequence[View]) -> dict[str, Mark]:
    """Row label -> mark. Dense has its own; colours and shapes turn at different rates, so 72 pairs differ."""
    labels = sorted({row.label for view in views for row in view.rows if not row.dense})
    found = {
        label: Mark(f"s{i % COLOURS}", _SHAPES[(i + i // (COLOURS * len(_SHAPES))) % len(_SHAPES)])
        for i, label in enumerate(labels)
    }
    for view in views:
        found.update({row.label: Mark("sd", "diamond") for row in view.rows if row.dense})
    return found
