"""What the FlexAttention backend tells its kernel: blocks and the function that masks them."""

from __future__ import annotations

import random

import pytest
import torch
from tests.attention.reads import random_lists, random_read

from foveate.attention import Geometry, Selection, Span
from foveate.attention.flex import blocks, mask_mod
from foveate.attention.request import normal


def upscaled(table: torch.Tensor, tile: tuple[int, int], queries: int, keys: int) -> torch.Tensor:
    return table.repeat_interleave(tile[0], 2)[:, :, :queries].repeat_interleave(tile[1], 3)[..., :keys]


@pytest.mark.parametrize("number", range(30))
def test_blocks_and_mask_are_the_selection(seed: int, number: int) -> None:
    """Blocks read in full are read in full, pairs outside of all blocks are unread, and the mask is exact."""
    read = random_read(seed, options=False)
    g, selection = read.places(), read.selection
    if number % 2 and g.queries > 16:  # lists that the kernel takes as they are
        rng = random.Random(seed)
        shape = (g.batch, rng.choice([1, read.k.shape[1], read.heads]), -(-g.queries // 16))
        selection = Selection(random_lists(rng, shape, -(-g.keys // 32), 5), 16, 32)
    request = normal(read.q, read.k, read.v, selection, g, read.visible, None, None, 1.0, None, None, True, True)
    want = selection.mask(g, read.heads, read.visible)
    partial, full, tile = blocks(request)
    size = (g.batch, read.heads, g.queries, g.keys)
    partial, full = (upscaled(x, tile, g.queries, g.keys).expand(size) for x in (partial, full))
    assert not (partial & full).any()
    assert not (full & ~want).any()
    assert not (want & ~(partial | full)).any()
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    assert torch.equal(mask_mod(request)(b, h, i, j), want)


def test_lists_that_fit_are_taken_as_they_are() -> None:
    """Causal lists of 16 x 16: inner blocks in full, the one on the diagonal in part, nothing else."""
    q = torch.zeros(1, 2, 48, 16)
    lists = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 2, -1]], dtype=torch.int32).view(1, 1, 3, 3)
    request = normal(
        q, q, q, Selection(lists, 16, 16), Geometry(1, 48, 48), (), None, None, 1.0, None, None, True, True
    )
    partial, full, tile = blocks(request)
    assert tile == (16, 16)
    assert partial[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert full[0, 0].int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    hidden = normal(
        q, q, q, Selection(lists, 16, 16), Geometry(1, 48, 48), (Span(0, 20),), None, None, 1.0, None, None, True, True
    )
    assert not blocks(hidden)[1].any()
