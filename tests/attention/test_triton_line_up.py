"""Chosen blocks and the newest behind them, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from tests.attention.test_triton_decode import on

from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.line_up import line_up


@pytest.mark.parametrize(("size", "near", "most"), [(50, 5, 7), (4, 1, 3), (1, 2, 5), (16, 3, 1)])
def test_against_the_definition(seed: int, size: int, near: int, most: int) -> None:
    """Rows with many blocks, with as many as may be chosen, with few, and with no more than the newest."""
    rng = random.Random(seed)
    edges, heads = [40, most, most + 1, max(0, most - 1), 0, 1 - near], 3
    own = [(edge + near - 1) * size + rng.randrange(size) for edge in edges]
    chosen = torch.full((len(own), heads, 1, most), -1, dtype=torch.int32)
    lists, places = [], []
    for row, edge in enumerate(edges):
        for head in range(heads):
            past = sorted(rng.sample(range(max(0, edge)), min(most, max(0, edge))))
            chosen[row, head, 0, : len(past)] = torch.tensor(past, dtype=torch.int32)
            newest = list(range(max(0, edge), own[row] // size + 1))
            back = [edge - len(past) + n - (block < edge - most) for n, block in enumerate(past)]
            rest = [-1] * (most + near - len(past) - len(newest))
            lists.append(past + newest + rest)
            places.append([size * n for n in back + newest])
    given, at = on(chosen, torch.tensor(own))
    got, met = (x.flatten(0, 2).cpu().tolist() for x in line_up(given, at, most, size, near))
    assert got == lists
    for row, want in zip(met, places, strict=True):
        assert row[: len(want)] == want


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(BadArgument, match="single queries"):
        line_up(torch.zeros(1, 2, 2, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), 3, 4, 1)
