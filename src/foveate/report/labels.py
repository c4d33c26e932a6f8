"""Where the labels of a plot go: beside their points, inside the frame, on top of nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NARROW = set("iljtfr.,:;|!'()[] ")
_WIDE = set("mwMW@%×")


@dataclass(frozen=True)
class Box:
    """A rectangle in plot units; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )

    def grown(self, by: float) -> Box:
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def crossed(self, x1: float, y1: float, x2: float, y2: float) -> bool:
        """Whether a straight line touches the box (Liang and Barsky's clipping, 1984)."""
        enter, leave = 0.0, 1.0
        dx, dy = x2 - x1, y2 - y1
        for step, room in ((-dx, x1 - self.left), (dx, self.right - x1), (-dy, y1 - self.top), (dy, self.bottom - y1)):
            if step == 0:
                if room < 0:
                    return False
            elif step < 0:
                enter = max(enter, room / step)
            else:
                leave = min(leave, room / step)
        return enter <= leave


@dataclass(frozen=True)
class Anchor:
    """A point that a label may stand beside."""

    x: float
    y: float
    radius: float = 5.0


@dataclass(frozen=True)
class Wanted:
    """A label and the points that it may name: one of them gets it."""

    text: str
    anchors: tuple[Anchor, ...]
    bold: bool = False


@dataclass(frozen=True)
class Label:
    """A placed label: its point, its box, and the end of a leader line where it stands away from the point."""

    wanted: Wanted
    anchor: Anchor
    box: Box
    leader: tuple[float, float] | None


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of a text in a sans-serif font, on the wide side (DejaVu Sans) so that no browser needs more."""
    ems = sum(0.4 if c in _NARROW else 1.0 if c in _WIDE else 0.75 if c.isupper() else 0.64 for c in text)
    return ems * size * (1.12 if bold else 1.0) + 2


_GAPS = (3.0, 7.0, 13.0, 20.0, 29.0, 40.0, 54.0, 70.0)
_LEADER_FROM = 10.0
_DIRECTIONS = np.array([(math.cos(math.tau * i / 24), math.sin(math.tau * i / 24)) for i in range(24)])


_Spot = tuple[float, Box, tuple[float, float] | None]
"""Cost, box and leader end of a possible place."""


class _Page:
    """What is already on the plot."""

    def __init__(self, frame: Box, obstacles: Sequence[Box], soft: Sequence[Box]) -> None:
        self.frame, self.obstacles, self.soft = frame, obstacles, soft
        self.walls = np.array([[o.left, o.top, o.right, o.bottom] for o in obstacles]).reshape(-1, 4)
        self.boxes: list[Box] = []
        self.lines: list[tuple[float, float, float, float]] = []

    def possible(self, anchor: Anchor, reach: float, width: float, height: float) -> list[tuple[float, Box]]:
        """The boxes whose edge is `reach` away from the point, inside the frame and clear of all obstacles, each with
        the cosine of its direction."""
        # The centre for which the edge of the label, not its middle, is `reach` away from the point.
        x = anchor.x + _DIRECTIONS[:, 0] * (reach + width / 2)
        y = anchor.y + _DIRECTIONS[:, 1] * (reach + height / 2)
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        f, walls = self.frame, self.walls
        fits = (left >= f.left) & (right <= f.right) & (top >= f.top) & (bottom <= f.bottom)
        across = (left[:, None] < walls[:, 2]) & (walls[:, 0] < right[:, None])
        along = (top[:, None] < walls[:, 3]) & (walls[:, 1] < bottom[:, None])
        fits &= ~(across & along).any(1)
        chosen = np.flatnonzero(fits).tolist()
        return [
            (float(_DIRECTIONS[i, 0]), Box(float(left[i]), float(top[i]), float(right[i]), float(bottom[i])))
            for i in chosen
        ]

    def free(self, box: Box) -> bool:
        """Whether a possible box touches no label and no leader line."""
        if any(box.grown(1.5).overlaps(other) for other in self.boxes):
            return False
        return not any(box.grown(1).crossed(*line) for line in self.lines)

    def cheapest(self, anchor: Anchor, width: float, height: float) -> _Spot | None:
        best: _Spot | None = None
        for gap in _GAPS:
            if best is not None and best[0] <= gap:
                break
            reach = anchor.radius + gap
            for cos, box in self.possible(anchor, reach, width, height):
                # Right of the point reads best, then left, then above and below.
                cost = gap + (0 if cos > 0.9 else 2 if cos < -0.9 else 4)
                if best is not None and cost >= best[0]:
                    continue
                cost += 8 * sum(box.overlaps(s) for s in self.soft)
                if (best is not None and cost >= best[0]) or not self.free(box):
                    continue
                leader = None
                if gap > _LEADER_FROM:
                    leader = (min(max(anchor.x, box.left), box.right), min(max(anchor.y, box.top), box.bottom))
                    if any(other.crossed(anchor.x, anchor.y, *leader) for other in self.boxes):
                        continue
                    # The box of the point itself is always crossed; a line over others' points misleads.
                    passed = sum(o.crossed(anchor.x, anchor.y, *leader) for o in self.obstacles)
                    cost += 10 + 25 * max(0, passed - 1)
                if best is None or cost < best[0]:
                    best = (cost, box, leader)
        return best


def place(
    wanted: Sequence[Wanted], frame: Box, size: float, obstacles: Sequence[Box] = (), soft: Sequence[Box] = ()
) -> list[Label]:
    """Places labels greedily, in order, each at the cheapest free spot around one of its points.

    `obstacles` are never covered, nor are other labels and their leader lines; `soft` boxes (whiskers, lines) cost.
    A label that fits nowhere is left out: a crowded plot then names fewer points rather than blurring them.
    """
    page = _Page(frame, obstacles, soft)
    placed: list[Label] = []
    for label in wanted:
        width = text_width(label.text, size, label.bold)
        spots = [(spot, a) for a in label.anchors if (spot := page.cheapest(a, width, size * 1.2)) is not None]
        if not spots:
            continue
        (_, box, leader), anchor = min(spots, key=lambda found: found[0][0])
        placed.append(Label(label, anchor, box, leader))
        page.boxes.append(box)
        if leader is not None:
            page.lines.append((anchor.x, anchor.y, *leader))
    return placed
