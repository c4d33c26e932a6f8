"""Labels that never overlap, scales and ticks."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from foveate.report.axis import Axis, decimals, linear_ticks, padded
from foveate.report.labels import Anchor, Box, Wanted, place, text_width


def scene(rng: random.Random, points: int, crowd: float) -> tuple[list[Wanted], Box, list[Box]]:
    frame = Box(50, 40, 540, 380)
    anchors = [Anchor(rng.uniform(60, 60 + 470 * crowd), rng.uniform(60, 60 + 300 * crowd)) for _ in range(points)]
    wanted = [Wanted("m" * rng.randrange(2, 14), (a,)) for a in anchors]
    return wanted, frame, [Box(a.x - 6, a.y - 6, a.x + 6, a.y + 6) for a in anchors]


def test_labels_cover_no_label_no_point_and_stay_inside():
    rng = random.Random(31)
    for _ in range(15):
        wanted, frame, obstacles = scene(rng, rng.randrange(2, 25), rng.choice([0.1, 0.4, 1.0]))
        labels = place(wanted, frame, 12, obstacles)
        for i, label in enumerate(labels):
            assert label.box.inside(frame)
            assert not any(label.box.overlaps(o) for o in obstacles)
            assert not any(label.box.overlaps(other.box) for other in labels[:i])
            for other in labels:
                if other is not label and other.leader is not None:
                    assert not label.box.crossed(other.anchor.x, other.anchor.y, *other.leader)


def test_where_there_is_room_every_label_is_placed_beside_its_point():
    anchors = [Anchor(100 + 120 * (i % 4), 60 + 60 * (i // 4)) for i in range(16)]
    labels = place([Wanted("snapkv", (a,)) for a in anchors], Box(50, 40, 640, 380), 12)
    assert [label.anchor for label in labels] == anchors
    assert all(label.leader is None for label in labels)
    assert all(label.box.left > label.anchor.x for label in labels), "right of the point where nothing is in the way"


def test_a_label_may_choose_among_its_points():
    walled, open_ = Anchor(100, 100), Anchor(400, 300)
    walls = [
        Box(94, 94, 106, 106),
        Box(20, 20, 220, 90),
        Box(20, 110, 220, 190),
        Box(110, 90, 220, 110),
        Box(20, 90, 92, 110),
    ]
    (label,) = place([Wanted("quest", (walled, open_))], Box(0, 0, 500, 400), 12, walls)
    assert label.anchor is open_


def test_what_fits_nowhere_is_left_out():
    frame = Box(0, 0, 60, 30)
    assert place([Wanted("a very long name", (Anchor(30, 15),))], frame, 12) == []


@given(*[st.floats(-50, 50, allow_nan=False)] * 4)
def test_a_line_crosses_a_box_when_one_of_its_points_is_in_it(x1: float, y1: float, x2: float, y2: float):
    box = Box(-10, -5, 15, 20)
    steps = [i / 400 for i in range(401)]
    points = [(x1 + (x2 - x1) * t, y1 + (y2 - y1) * t) for t in steps]
    if any(box.left <= x <= box.right and box.top <= y <= box.bottom for x, y in points):
        assert box.grown(1e-9).crossed(x1, y1, x2, y2)
    elif box.grown(-0.3).crossed(x1, y1, x2, y2):
        raise AssertionError("a line that runs well inside must have a point inside")


def test_text_width_grows_with_every_letter():
    text = "pyramid-kv 0.25"
    widths = [text_width(text[:i], 12) for i in range(len(text) + 1)]
    assert widths == sorted(set(widths))


def test_axes_map_their_ends_and_ticks_lie_within():
    rng = random.Random(33)
    for _ in range(300):
        low = rng.uniform(0.01, 100)
        high = low * rng.uniform(1.02, 50)
        for log in (False, True):
            axis = Axis(low, high, 40, 500, log)
            assert math.isclose(axis(low), 40)
            assert math.isclose(axis(high), 500)
            ticks = axis.ticks(6)
            assert 2 <= len(ticks) <= 9
            assert ticks == sorted(set(ticks))
            assert all(low * (1 - 1e-6) <= t <= high * (1 + 1e-6) for t in ticks)
            texts = [f"{t:.{decimals(ticks)}f}" for t in ticks]
            assert len(set(texts)) == len(texts), "ticks that read alike"


def test_axis_runs_down_as_well():
    axis = Axis(0, 1, 380, 40)
    assert axis(0) == 380
    assert axis(1) == 40


def test_linear_ticks_are_round():
    assert linear_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert linear_ticks(17, 43, 4) == [20, 30, 40]


def test_padding_leaves_room_and_respects_what_is_possible():
    assert padded([0.2, 0.9], 0.1, floor=0, ceiling=1) == (0.13, 0.97)
    assert padded([0.01, 0.99], 0.1, floor=0, ceiling=1) == (0, 1)
    low, high = padded([0.5, 0.5], 0.0, least=0.1)
    assert math.isclose(high - low, 0.1)
    low, high = padded([3.0], 0.1)
    assert low < 3 < high
    low, high = padded([8.0], 0.1, log=True)
    assert low < 8 < high
