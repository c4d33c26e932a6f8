"""Tokens that are chosen by their codes, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on, spoiled
from tests.attention.test_triton_decode_votes import speeds, turn

from foveate.attention.angles import Angles
from foveate.errors import BadArgument
from foveate.heads.codebooks import Codebook
from foveate.methods.policies.lists import set_lists, top_lists
from foveate.methods.policies.ranks import among_best, best_ranks, code_scores

pytest.importorskip("triton")

from foveate.attention.triton.code_choice import Book, Coded, choose_by_codes

CASES = [
    (torch.float32, 32, 16, False, 1, 12, 3, 5),
    (torch.bfloat16, 80, 40, False, 3, 70, 0, 1),
    (torch.float32, 48, 12, False, 8, 33, 7, 20),  # a part of the channels is rotated
    (torch.bfloat16, 48, 8, True, 1, 5, 40, 3),  # and here they are the last ones
]
STEPS = 3


@pytest.mark.parametrize(("dtype", "dim", "pairs", "last", "group", "count", "sink", "window"), CASES)
@pytest.mark.parametrize("wanted", [[7, 60], [0, 1], [2000, 2000], 17, 140])
def test_lists_are_those_of_scores_of_all_tokens(
    seed: int, dtype, dim, pairs, last, group, count, sink, window, wanted
) -> None:
    """Step after step; some codes give the same, and of their tokens the first ones are chosen. A number: so many
    tokens of all heads together, by the best rank that any head gives them."""
    torch.manual_seed(seed)
    ends, capacity, angles = torch.tensor([2200, 38]), 2300, Angles(speeds(pairs), last)
    q, k = made(dtype, STEPS, 2, 2 * group, 1, dim), spoiled(made(dtype, 4, capacity, dim), ends.repeat_interleave(2))
    centroids = torch.randn(2, count, dim)
    if not isinstance(wanted, int):
        centroids[:, 3] = centroids[:, 1]
    book = Codebook(centroids, torch.randn(2, dim, dim).tril() / dim**0.5 + torch.eye(dim))
    codes = torch.randint(0, count, (4, capacity), dtype=torch.int16)
    coded = Coded(*on(codes.clone(), torch.zeros(4, count, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)))
    each = min(wanted if isinstance(wanted, int) else max(wanted), capacity)
    width = sink + window + (wanted if isinstance(wanted, int) else group * each)
    for step in range(STEPS):
        lengths = ends - STEPS + 1 + step
        for row, length in enumerate(lengths.tolist()):
            for head in range(2):
                raw = turn(k[2 * row + head, length - 1], (1 - length) * speeds(pairs).double(), last).to(dtype)
                mine = Codebook(centroids[head].double(), book.lower[head].double())
                codes[2 * row + head, length - 1] = mine.codes(raw.double()[None])[0]
        delta = (40 - lengths + 1).double().view(2, 1, 1, 1) * speeds(pairs).double()
        turned = turn(q[step], delta, last).to(dtype).float().unflatten(1, (2, group))
        table = turned @ centroids.mT.unsqueeze(1)
        slot = torch.arange(capacity)
        seen = (slot < lengths[:, None])[:, None, None]
        forced = ((slot < sink) | (slot >= lengths[:, None] - window))[:, None, None]
        scores = code_scores(table, codes.unflatten(0, (2, 2)), seen, forced)
        if isinstance(wanted, int):
            least = best_ranks(scores, each)
            value = torch.where(least < capacity, -least.float(), -torch.inf).masked_fill(forced & seen, torch.inf)
            want, asked = top_lists(value, width)[:, :, 0], wanted
        else:
            asked = torch.tensor(wanted, dtype=torch.int32)
            counts = asked[:, None, None, None].expand(-1, 2, 1, 1)
            want = set_lists(seen & (forced | among_best(scores, each, counts)), width)[:, :, 0]
            (asked,) = on(asked)
        given = *on(q[step], k, lengths.int().repeat_interleave(2)), asked
        some = Book(*on(book.centroids, *book.metric))
        where = {"distance": 40, "sink": sink, "window": window, "width": width}
        lists, counts = (x.cpu() for x in choose_by_codes(*given, some, coded, angles, **where))
        assert torch.equal(counts, (want >= 0).sum(-1).int())
        assert torch.equal(lists, want)
        assert torch.equal(coded.codes.cpu(), codes)
    assert coded.counted.tolist() == [max(0, n - window) for n in ends.repeat_interleave(2).tolist()]


def test_what_does_not_fit_is_named() -> None:
    q, k, some = torch.zeros(1, 2, 1, 16), torch.zeros(1, 9, 16), torch.ones(1, dtype=torch.int32)
    book = Book(torch.zeros(1, 4, 16), torch.zeros(1, 16, 16), torch.zeros(1, 4))
    coded = Coded(torch.zeros(1, 9, dtype=torch.int16), torch.zeros(1, 4, dtype=torch.int32), some)
    where, angles = {"distance": 1, "sink": 1, "window": 1, "width": 9}, Angles(speeds(8))
    with pytest.raises(BadArgument, match="one query per row"):
        choose_by_codes(q.expand(-1, -1, 2, -1), k, some, some, book, coded, angles, **where)
    with pytest.raises(BadArgument, match="a window"):
        choose_by_codes(q, k, some, some, book, coded, angles, **{**where, "window": 0})
    with pytest.raises(BadArgument, match="int16"):
        choose_by_codes(q, k, some, some, book, coded._replace(codes=coded.codes.int()), angles, **where)
    with pytest.raises(BadArgument, match=r"int32 \[1\]"):
        choose_by_codes(q, k, some, some.long(), book, coded, angles, **where)
