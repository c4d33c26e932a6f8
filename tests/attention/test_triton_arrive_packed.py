"""Tokens that arrive in packed stores: what the kernel packs is, bit for bit, what `Quantised.pack` makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from tests.attention.test_triton_decode import made, on

from foveate.cache.quantised import Quantised

pytest.importorskip("triton")

from foveate.attention.triton.arrive_packed import PackedArrival, arrive_packed, serves


@pytest.mark.parametrize(
    ("bits", "group", "dim", "dtype"),
    [
        (4, 32, 64, torch.bfloat16),
        (2, 32, 128, torch.float32),
        (8, 16, 80, torch.float16),
        (4, 24, 96, torch.float32),
        (2, 8, 24, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("size", [1.0, 300.0, 1e-3, 1e-7])
def test_the_token_that_leaves_is_packed_as_by_torch(
    seed: int, bits: int, group: int, dim: int, dtype: torch.dtype, size: float
) -> None:
    torch.manual_seed(seed)
    pairs, exact, how = 4, 4, Quantised(bits, group, False, 4, 1)
    # A token was packed by the step before; none was; there are too few; the token's numbers are all equal.
    lengths, start, packed = [9, 5, 3, 6], [4, 1, 0, 2], [5, 1, 0, 2]
    tail = ((made(torch.float32, pairs, 12, dim) + 3 * made(torch.float32, dim)) * size).to(dtype)
    tail[3, 0] = 3.25
    body = how.pack(torch.zeros(pairs, 20, dim))
    before = how.pack(made(torch.float32, 1, 1, dim) * size)
    for held, new in zip(body, before, strict=True):
        held[0, 4] = new[0, 0]
    k, v, k_tail = made(dtype, pairs, 1, dim), made(dtype, pairs, 1, dim), torch.zeros(pairs, 16, dim, dtype=dtype)
    want, bodies = tail.clone(), [t.clone() for t in body]
    want[0, 0] = how.unpack(before, dtype)[0, 0]
    for p, n in enumerate(lengths):
        if n + 1 - packed[p] > exact:
            slot = packed[p] - start[p]
            for held, new in zip(bodies, how.pack(tail[p : p + 1, slot : slot + 1]), strict=True):
                held[p, packed[p]] = new[0, 0]
        want[p, n - start[p]] = v[p, 0]
    group = math.gcd(dim, group)
    assert serves(bits, group, exact)
    counts = [torch.tensor(x, dtype=torch.int32) for x in (start, packed, lengths)]
    places, seen = torch.full((pairs, 20), -1, dtype=torch.int32), torch.tensor(lengths) + 7
    k, v, k_tail, tail, first, done, held, seen, places = on(k, v, k_tail, tail, *counts, seen, places)
    codes, scale, zero = on(*body)
    side = PackedArrival(tail, first, done, codes, scale, zero, bits, group, exact)
    arrive_packed(k, v, PackedArrival(k_tail), side, held, seen, places)
    for got, expected in zip((tail, codes, scale, zero), (want, *bodies), strict=True):
        assert torch.equal(got.cpu(), expected)
    assert held.tolist() == [n + 1 for n in lengths]
    assert seen.tolist() == [n + 8 for n in lengths]
    assert done.tolist() == [6, 2, 0, 3]
    for p, n in enumerate(lengths):
        assert torch.equal(k_tail[p, n], k[p, 0])
        assert places[p].max() == places[p, n] == n + 7


def test_values_that_are_keys(seed: int) -> None:
    """One side whose groups are packed between steps: its tail alone is written."""
    torch.manual_seed(seed)
    k, tail = made(torch.float32, 2, 1, 24), torch.zeros(2, 8, 24)
    lengths, start = (torch.tensor(x, dtype=torch.int32) for x in ([10, 3], [8, 0]))
    k, tail, lengths, start, seen = on(k, tail, lengths, start, lengths.long())
    arrive_packed(k, None, PackedArrival(tail, start), None, lengths, seen, None)
    assert torch.equal(tail[0, 2], k[0, 0])
    assert torch.equal(tail[1, 3], k[1, 0])
    assert int((tail != 0).any(-1).sum()) == 2
    assert lengths.tolist() == seen.tolist() == [11, 4]
