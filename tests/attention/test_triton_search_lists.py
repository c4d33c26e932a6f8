"""The lists of a tree search by single queries, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on

from foveate.errors import BadArgument
from foveate.methods.policies.tree import descend, with_ends

pytest.importorskip("triton")

from foveate.attention.triton.search_lists import search_lists


@pytest.mark.parametrize(
    ("dtype", "dim", "heads", "stores", "page", "slots", "first"),
    [
        (torch.float32, 24, 2, 2, 2, 5, 3),
        (torch.bfloat16, 64, 6, 2, 3, 8, 0),
        (torch.float32, 32, 8, 1, 1, 40, 7),
        (torch.bfloat16, 16, 3, 1, 4, 60, 2),  # all blocks are taken: there is no round
    ],
)
def test_lists_are_those_of_the_search_in_words(seed: int, dtype, dim, heads, stores, page, slots, first) -> None:
    """Rows of several lengths: some with fewer blocks between than may be found, one within the window alone."""
    torch.manual_seed(seed)
    held, window, longest = 210, 20, 27
    q, k = made(dtype, 4, heads, 1, dim), made(dtype, 4, stores, held, dim)
    own = torch.tensor([170, 60, 24, 11], dtype=torch.int32)[:, None] + torch.arange(stores, dtype=torch.int32)
    begin = ((own.long() - window + 1).clamp_min(0) // page).unsqueeze(-1)
    truth = torch.einsum("bhnd,bhcd->bhnc", q.double(), k.double().repeat_interleave(heads // stores, 1))
    behind = torch.nn.functional.pad(truth, (0, -held % page), value=-torch.inf)
    best = behind.unflatten(-1, (-1, page)).amax(-1)
    high = begin.repeat_interleave(heads // stores, dim=1)
    found = descend(torch.full_like(high, first), high, slots, lambda at: best.gather(-1, at))
    want = with_ends(found, begin, torch.full_like(begin, 1 << 30), first, longest, page)
    q, k, own = on(q, k, own)
    lists, counts = search_lists(q, k, own, first, window, slots, longest, page)
    assert torch.equal(lists.cpu(), want)
    assert torch.equal(counts.cpu(), (want >= 0).sum(-1).int())


def test_bad_arguments() -> None:
    q, k, own = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(BadArgument, match="single queries"):
        search_lists(q, k, own[:, :1], 1, 4, 2, 6, 2)
    with pytest.raises(BadArgument, match="the same dtype"):
        search_lists(q, k.half(), own, 1, 4, 2, 6, 2)
