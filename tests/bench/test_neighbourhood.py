"""The simulator of neighbourhood masks: its mask, its counts against brute force, the paper's figures."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.bench.neighbourhood import Axis, Bound, Tiling, search_strides, simulate
from foveate.errors import BadArgument


@st.composite
def some_axes(draw: st.DrawFn, *, even: bool = False) -> Axis:
    """Any axis; `even`: tiles of keys divide its extent."""
    k_tile = draw(st.integers(1, 4))
    extent = k_tile * draw(st.integers(1, 5)) if even else draw(st.integers(1, 14))
    window = draw(st.integers(1, extent))
    stride = draw(st.integers(1, window))
    return Axis(extent, window, stride, not even and draw(st.booleans()), draw(st.integers(1, 5)), k_tile)


@given(some_axes())
def test_a_query_sees_its_window(axis: Axis) -> None:
    """As many keys as the window holds, inside the grid, itself among them; of a causal axis none behind itself, and
    at least those of the stride."""
    for i in range(axis.extent):
        start, end = axis.sees(i)
        assert 0 <= start <= i < end <= axis.extent
        if axis.causal:
            assert end == i + 1 and end - start <= axis.window
        else:
            assert end - start == axis.window


@given(some_axes())
def test_queries_of_a_stride_share_their_window(axis: Axis) -> None:
    for i in range(axis.extent):
        assert axis.sees(i)[0] == axis.sees(i // axis.stride * axis.stride)[0]


@pytest.mark.parametrize(("extent", "window"), [(12, 4), (15, 5), (8, 8), (6, 1)])
def test_a_stride_of_the_window_is_window_attention(extent: int, window: int) -> None:
    for i in range(extent):
        first = i // window * window
        assert Axis(extent, window, window).sees(i) == (first, first + window)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_window_of_everything_is_dense(extent: int, q_tile: int, k_tile: int, data: st.DataObject) -> None:
    axis = Axis(extent, extent, data.draw(st.integers(1, extent)), False, q_tile, k_tile)
    bound = simulate([axis, axis])
    assert bound.speed_up == bound.pairs == 1.0 and bound.perfect


def brute(axes: list[Axis], tiling: Tiling) -> list[int]:
    """Tiles with a visible pair, for each tile of queries, over the whole mask."""
    found = []
    for corner in product(*(range(0, a.extent, a.q_tile) for a in axes)):
        inside = [range(c, min(c + a.q_tile, a.extent)) for c, a in zip(corner, axes, strict=True)]
        seen = set()
        for query in product(*inside):
            seen |= set(product(*(range(*a.sees(i)) for a, i in zip(axes, query, strict=True))))
        low = [min(key[d] for key in seen) if tiling == "dynamic" else 0 for d in range(len(axes))]
        tile = {tuple((key[d] - low[d]) // a.k_tile for d, a in enumerate(axes)) for key in seen}
        found.append(len(tile))
    return found


@settings(max_examples=60)
@given(st.lists(some_axes(), min_size=1, max_size=2), st.sampled_from(["static", "dynamic"]))
def test_counts_are_those_of_the_mask(axes: list[Axis], tiling: Tiling) -> None:
    visits = brute(axes, tiling)
    bound = simulate(axes, tiling)
    assert bound.worst == max(visits)
    assert bound.mean == pytest.approx(sum(visits) / len(visits))
    assert bound.dense == prod(-(-a.extent // a.k_tile) for a in axes)


@given(st.lists(some_axes(even=True), min_size=1, max_size=3))
def test_bounds_are_ordered(axes: list[Axis]) -> None:
    """Tiles never promise more than pairs do, and tiles on a grid of their own no more than those cut to the box."""
    fixed, free = simulate(axes, "static"), simulate(axes, "dynamic")
    assert fixed.speed_up <= free.speed_up + 1e-9 and free.speed_up <= free.pairs + 1e-9
    assert fixed.worst >= fixed.mean - 1e-9


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_what_is_perfectly_block_sparse(tile: int, steps: int, blocks: int, more: int) -> None:
    """Cut to the box: where tiles of keys divide the window, and tiles of queries the stride."""
    stride = tile * min(steps, blocks * more)
    window = max(stride, tile * blocks * more)
    window += -window % tile
    extent = tile * -(-(window + 3 * stride) // tile)
    assert simulate([Axis(extent, window, stride, False, tile, tile)], "dynamic").perfect


HUNYUAN = [Axis(30, 18, 1, False, 4, 2), Axis(48, 24, 1, False, 8, 8), Axis(80, 24, 1, False, 8, 8)]
FLUX = [Axis(256, 80, 1, False, 16, 16), Axis(256, 80, 1, False, 16, 8)]
COSMOS = [Axis(16, 16, 1, False, 8, 4), Axis(44, 24, 1, False, 4, 4), Axis(80, 16, 1, False, 8, 8)]
PAPER = [
    (HUNYUAN, 0.607, (1, 1, 1), 1.73),
    (HUNYUAN, 0.607, (2, 1, 1), 1.78),
    (HUNYUAN, 0.607, (1, 1, 8), 1.99),
    (HUNYUAN, 0.607, (2, 1, 8), 2.02),
    (HUNYUAN, 0.607, (1, 8, 8), 2.17),
    (HUNYUAN, 0.607, (2, 8, 8), 2.20),
    (HUNYUAN, 0.607, (16, 8, 8), 2.23),
    (FLUX, 0.518, (1, 1), 1.76),
    (FLUX, 0.518, (16, 1), 1.84),
    (FLUX, 0.518, (16, 16), 1.88),
    (COSMOS, 0.587, (1, 1, 1), 1.90),
    (COSMOS, 0.587, (1, 8, 1), 1.96),
    (COSMOS, 0.587, (1, 1, 16), 2.05),
    (COSMOS, 0.587, (1, 8, 16), 2.10),
]


@pytest.mark.parametrize(("axes", "share", "strides", "paper"), PAPER)
def test_the_figures_of_the_paper(axes: list[Axis], share: float, strides: tuple[int, ...], paper: float) -> None:
    """Gains of whole models, which the paper rounds from shares of time that it rounds too."""
    bound = simulate([replace(a, stride=s) for a, s in zip(axes, strides, strict=True)])
    assert bound.end_to_end(share) == pytest.approx(paper, abs=0.012)


def test_the_slowest_tile_decides() -> None:
    bound = simulate(HUNYUAN)
    assert bound.speed_up == pytest.approx(3.27, abs=0.005)
    assert bound.dense / bound.mean == pytest.approx(5.24, abs=0.01)


def test_strides_worth_having() -> None:
    """No other stride has a better bound, and none that is kept is matched by smaller ones."""
    found = dict(search_strides(FLUX))
    assert set(found) == {(1, 1), (1, 16), (16, 1), (16, 16)} and found[16, 16].perfect
    axis = Axis(40, 12, 1, False, 4, 4)
    kept = dict(search_strides([axis]))
    every = {s: simulate([replace(axis, stride=s)]).speed_up for s in range(1, 13)}
    assert max(every.values()) == max(b.speed_up for b in kept.values())
    for (stride,), bound in kept.items():
        assert all(every[s] < bound.speed_up for s in range(1, stride))


@pytest.mark.parametrize("values", [(4, 5, 1), (4, 2, 3), (4, 0, 0), (4, 2, 1, False, 0, 1)])
def test_axes_that_are_none(values: tuple[int, ...]) -> None:
    with pytest.raises(BadArgument):
        Axis(*values)  # type: ignore[arg-type]
    with pytest.raises(BadArgument):
        simulate([])
    assert Bound(1, 1.0, 2, 2.0).perfect
