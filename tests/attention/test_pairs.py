"""Counting pairs and bytes agrees with the mask, pair for pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.attention.reads import random_lists, random_read
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.attention import ALL, Geometry, Selection, Span
from foveate.attention.pairs import pairs


@pytest.mark.parametrize("number", range(60))
def test_counts_are_sums_of_the_mask(seed: int, number: int) -> None:
    read = random_read(seed)
    g, selection, heads, store = read.places(), read.selection, read.heads, read.k.shape[1]
    mask = selection.mask(g, heads, read.visible)
    count = selection.pairs(g, heads, read.visible)
    assert count.dtype == torch.int64
    assert torch.equal(count, mask.sum((-1, -2)))
    real = torch.randint(0, g.queries + 1, (g.batch,))
    some = mask & (torch.arange(g.queries) < real[:, None])[:, None, :, None]
    assert torch.equal(pairs(selection, g, heads, read.visible, real), some.sum((-1, -2)))
    causal = ALL.mask(g, heads).sum((-1, -2))
    share = selection.density(g, heads, read.visible)
    assert torch.allclose(share[causal > 0], (count / causal)[causal > 0].double())
    assert (share[causal == 0] == 1).all()
    block = selection.q_block if selection.lists is not None and selection.q_block else g.queries
    used = sum(
        int(mask[:, :, i : i + block].any(2).unflatten(1, (store, -1)).any(2).sum()) for i in range(0, g.queries, block)
    )
    assert selection.bytes_read(g, heads, store, 10, read.visible) == 10 * used


@pytest.mark.parametrize("case", ["dense", "span", "lists", "lists and span", "lists in span", "ragged"])
def test_counting_needs_no_mask(seed: int, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual selections are counted by arithmetic, so that long prompts cost little."""
    import random

    torch.manual_seed(seed)
    lists = random_lists(random.Random(seed), (2, 4, 10), 41, 9)
    g = Geometry(2, 150, 650)
    selection, visible = {
        "dense": (ALL, ()),
        "span": (Selection(span=Span(4, torch.tensor([9, 200]), 3)), ()),
        "lists": (Selection(lists, 16, 16), ()),
        "lists and span": (Selection(lists, 16, 16, Span(4, 50)), ()),
        "lists in span": (Selection(lists, 16, 16), (Span(4, 50),)),
        "ragged": (Selection(lists, 16, 16), ()),
    }[case]
    if case == "ragged":
        g = Geometry(2, 150, 650, torch.tensor([[640, 600], [650, 333]]), torch.tensor([[490, 450], [500, 183]]))
    mask, real = selection.mask(g, 4, visible), torch.tensor([37, 149])
    some = mask & (torch.arange(150) < real[:, None])[:, None, :, None]
    monkeypatch.setattr(Selection, "seen", lambda *args: pytest.fail("made a mask"))
    assert torch.equal(selection.pairs(g, 4, visible), mask.sum((-1, -2)))
    assert torch.equal(pairs(selection, g, 4, visible, real), some.sum((-1, -2)))


def test_one_list_beside_a_window_is_counted_without_a_number_for_each_pair(seed: int) -> None:
    torch.manual_seed(seed)
    kept = torch.randperm(3000)[:1500].sort().values.int()
    selection = Selection(kept.view(1, 1, 1, -1), span=Span(window=1))
    g = Geometry(1, 3000, 3000)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            largest = max(largest, made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    with Sizes():
        count = selection.pairs(g, 2)
    assert torch.equal(count, selection.mask(g, 2).sum((-1, -2)))
    assert largest <= 2 * 3000


def test_density_of_plain_cases() -> None:
    g = Geometry(1, 8, 8)
    assert ALL.pairs(g, 2).tolist() == [[36, 36]]
    assert ALL.density(g, 2).tolist() == [[1.0, 1.0]]
    assert Selection(span=Span(0, 1)).pairs(g, 1).tolist() == [[8]]
    # One query over 100 slots of which it reads two blocks of 16: an eighth of 256 bytes each way.
    one = Selection(torch.tensor([[[[0, 3]]]], dtype=torch.int32), None, 16)
    assert one.bytes_read(Geometry(1, 1, 100), 8, 1, 256) == 32 * 256
