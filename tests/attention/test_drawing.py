"""Pictures show the share of causal pairs that is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.attention.reads import random_read

from foveate.attention import ALL, Geometry, Selection, Span
from foveate.attention.drawing import shares
from foveate.errors import BadArgument


def test_a_small_picture() -> None:
    g = Geometry(1, 8, 8)
    lists = torch.tensor([[0, -1], [0, 1], [0, 2], [3, -1]], dtype=torch.int32).view(1, 1, 4, 2)
    picture = Selection(lists, 2, 2).draw(g, 1, rows=4, cols=4)
    assert picture == "@\n@@\n@.@\n...@"
    half = Selection(span=Span(0, 4)).draw(g, 1, rows=2, cols=2)
    assert half == "@\n+@"  # of the lower left cell, 6 of 16 pairs
    image = Selection(lists, 2, 2).image(g, 1, rows=4, cols=4)
    assert image.dtype == np.uint8
    assert image.tolist() == [[255, 0, 0, 0], [255, 255, 0, 0], [255, 0, 255, 0], [0, 0, 0, 255]]


def test_heads_are_drawn_alone_or_as_their_mean() -> None:
    g = Geometry(1, 4, 4)
    lists = torch.tensor([0, 3], dtype=torch.int32).view(1, 2, 1, 1)
    selection = Selection(lists, None, 1)
    assert selection.draw(g, 4, head=1) == "@\n@.\n@..\n@..."
    assert selection.draw(g, 4, head=2) == ".\n..\n...\n...@"
    assert selection.image(g, 4)[3].tolist() == [128, 0, 0, 128]


@pytest.mark.parametrize("number", range(10))
def test_cells_are_means_of_the_mask(seed: int, number: int) -> None:
    read = random_read(seed)
    g = read.places()
    row, head = seed % g.batch, seed % read.heads
    got = shares(read.selection, g, read.heads, row=row, head=head, rows=5, cols=7, visible=read.visible)
    mask = read.selection.mask(g, read.heads, read.visible)[row, head].double()
    causal = ALL.mask(g, read.heads)[row, head].double()
    rows, cols = min(5, g.queries), min(7, g.keys)
    assert got.shape == (rows, cols)
    y, x = torch.arange(g.queries) * rows // g.queries, torch.arange(g.keys) * cols // g.keys
    for r in range(rows):
        for c in range(cols):
            cell = (y == r).unsqueeze(1) & (x == c)
            possible = float(causal[cell].sum())
            want = float(mask[cell].sum()) / possible if possible else float("nan")
            assert float(got[r, c]) == pytest.approx(want, nan_ok=True)


def test_bad_cells_are_named() -> None:
    g = Geometry(2, 4, 4)
    for how, message in (
        ({"row": 2}, r"row=2: choose one of 0\.\.1"),
        ({"head": 4}, r"head=4: choose one of 0\.\.3"),
        ({"rows": 0}, "at least one cell"),
    ):
        with pytest.raises(BadArgument, match=message):
            ALL.draw(g, 4, **how)
