"""Decode over codes of components against unpacking them first, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tests.attention.test_triton_decode import DEVICE, check, made, on, truth
from torch import Tensor

from foveate.attention.coded import CodedSide
from foveate.cache.transform import Transform, TransformSide
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton import decode_coded as kernels
from foveate.attention.triton.decode_coded import decode_coded, run
from foveate.attention.triton.workers import Tuning


class Case(NamedTuple):
    """A shape: query heads of a kv head, head sizes, first tokens, widest components, and their share of no bits."""

    dtype: torch.dtype
    group: int
    dims: tuple[int, int]
    sink: int
    most: int
    none: float
    softcap: float | None = None


CASES = [
    Case(torch.float32, 1, (32, 32), 0, 8, 0.2),
    Case(torch.float32, 3, (80, 48), 2, 5, 0.0, 9.0),
    Case(torch.bfloat16, 8, (64, 64), 8, 4, 0.3),
    Case(torch.float16, 4, (64, 128), 2, 8, 0.0),
    Case(torch.bfloat16, 20, (128, 64), 0, 6, 0.5, 9.0),
    Case(torch.float16, 1, (24, 40), 8, 1, 0.9),
]


def transform(heads: int, dim: int, most: int, none: float) -> Transform:
    """A basis of each head that is far from orthogonal, and bits at random; some of the heads' rows end early."""
    bits = torch.randint(1, most + 1, (heads, dim)) * (torch.rand(heads, dim) >= none)
    bits[-1] = bits[-1].clamp_max(most // 2)
    basis = torch.linalg.qr(torch.randn(heads, dim, dim))[0] + 0.3 * torch.randn(heads, dim, dim) / dim**0.5
    return Transform(torch.randn(heads, dim), basis, torch.rand(heads, dim) + 0.5, bits)


def side(x: Tensor, packed: list[int], lengths: list[int], how: TransformSide) -> tuple[CodedSide, Tensor]:
    """x [P, C, D] with the first packed[p] tokens coded, and what that reads as; behind them bodies hold random bytes,
    tails NaN. Some tokens are equal to first ones."""
    pairs, _, dim = x.shape
    heads = (torch.arange(pairs) % len(how.transform.mean)).to(torch.int16)
    first = how.fit(x, torch.tensor(lengths), None)
    for p in range(pairs if how.sink else 0):
        x[p, 40 + 3 * p] = x[p, p % how.sink]
        x[p, 131 + p] = x[p, how.sink - 1]
    body = torch.randint(0, 256, (pairs, max(packed) + 9, how.transform.row), dtype=torch.uint8)
    tail = max(n - m for n, m in zip(lengths, packed, strict=True)) + 5
    held, tails = x.clone(), x.new_full((pairs, tail, dim), torch.nan)
    for p, (n, length) in enumerate(zip(packed, lengths, strict=True)):
        own = heads[p : p + 1], *(t[p : p + 1] for t in first)
        if n:
            (rows,) = how.pack(x[p : p + 1, :n], *own)
            body[p, :n] = rows[0]
            held[p, :n] = how.unpack((rows,), x.dtype, *own)[0]
        tails[p, : length - n] = x[p, n:length]
    body, tails, heads, *first = on(body, tails, heads, *first)
    count = on(torch.tensor(packed, dtype=torch.int32))[0]
    return CodedSide(body, tails, count, *how.coded(x.dtype, heads, *first)), held


def sides(case: Case, lengths: list[int], packed: list[list[int]]) -> list[tuple[CodedSide, Tensor]]:
    found = []
    for dim, counts in zip(case.dims, packed, strict=True):
        how = TransformSide(transform(3, dim, case.most, case.none), case.sink, 1)
        found.append(side(made(case.dtype, len(lengths), max(200, *lengths), dim), counts, lengths, how))
    return found


@pytest.mark.parametrize("case", CASES)
def test_coded_and_exact_tokens_in_one_pass(seed: int, case: Case) -> None:
    """Pairs of nothing, of exact tokens alone and of coded ones alone; sides that coded different numbers of tokens."""
    torch.manual_seed(seed)
    lengths = [5, 199, 64, 0, 151, 30]
    (keys, k), (values, v) = sides(case, lengths, [[0, 180, 64, 0, 96, 30], [3, 150, 64, 0, 120, 0]])
    q = made(case.dtype, 2, 3 * case.group, 1, case.dims[0])
    held = torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, k, v, held, scale=0.1, softcap=case.softcap)
    q, held = on(q, held)
    check(decode_coded(q, keys, values, held, 0.1, case.softcap), want, case.dtype)


def test_workers_that_read_many_blocks(seed: int) -> None:
    """On a GPU there are hundreds of workers, of which few tokens would give each one block at most."""
    torch.manual_seed(seed)
    n = 9000 if DEVICE.type == "cuda" else 300
    case, lengths = Case(torch.bfloat16, 4, (128, 64), 2, 6, 0.2), [n, n - 37, n // 2]
    (keys, k), (values, v) = sides(case, lengths, [[n - 3, n - 40, 7], [n - 16, n - 37, n // 2]])
    q, held = made(torch.bfloat16, 1, 12, 1, 128), torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, k, v, held, scale=0.1)
    q, held = on(q, held)
    check(decode_coded(q, keys, values, held, 0.1), want, torch.bfloat16)


def test_rows_of_one_byte(seed: int) -> None:
    """Three bits beside those of the size."""
    torch.manual_seed(seed)
    lengths, found = [190, 70], []
    for counts in ([176, 64], [180, 70]):
        how = transform(3, 32, 1, 0.0)
        bits = torch.zeros(3, 32, dtype=torch.int64)
        bits[:, 4], bits[:2, 9] = 1, 2
        coded = TransformSide(Transform(how.mean, how.analysis, how.deviation, bits), 2, 1)
        assert coded.transform.row == 1
        found.append(side(made(torch.float32, 2, 200, 32), counts, lengths, coded))
    (keys, k), (values, v) = found
    q, held = made(torch.float32, 1, 4, 1, 32), torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, k, v, held, scale=0.2)
    q, held = on(q, held)
    check(decode_coded(q, keys, values, held, 0.2), want, torch.float32)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="kernels are compiled on a GPU only")
def test_rows_of_any_width_are_read_by_one_kernel(seed: int) -> None:
    """Layers have rows of different widths: a kernel for each would be compiled for a minute at the first token."""
    torch.manual_seed(seed)
    counts = []
    for most in (3, 5, 7, 8):
        case, lengths = Case(torch.bfloat16, 2, (96, 96), 2, most, 0.1), [190, 70]
        (keys, _), (values, _) = sides(case, lengths, [[176, 64], [176, 64]])
        q, held = on(made(torch.bfloat16, 1, 4, 1, 96), torch.tensor(lengths, dtype=torch.int32))
        decode_coded(q, keys, values, held, 0.2)
        caches = (kernel.device_caches for kernel in (kernels._decode, kernels._edge))
        counts.append([sum(len(one[0]) for one in cache.values()) for cache in caches])
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_token_that_takes_nearly_all(seed: int, dtype: torch.dtype) -> None:
    """It is met and given back exactly, wherever it is pointed to from."""
    torch.manual_seed(seed)
    case, lengths = Case(dtype, 2, (64, 64), 2, 4, 0.0), [190, 70]
    (keys, k), (values, v) = sides(case, lengths, [[176, 64], [176, 64]])
    q = torch.stack([k[p, [0, 1]] for p in range(2)]).unsqueeze(2)
    held = torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, k, v, held, scale=1.0)
    assert want.out.std() > 0.5
    q, held = on(q, held)
    check(decode_coded(q, keys, values, held, 1.0), want, dtype)


def test_every_layout_gives_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    case, lengths = Case(torch.float32, 2, (32, 32), 2, 4, 0.0), [190, 70]
    (keys, k), (values, v) = sides(case, lengths, [[176, 64], [176, 64]])
    q, held = made(torch.float32, 1, 4, 1, 32), torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, k, v, held, scale=0.2)
    q, held = on(q, held)
    for block, warps, stages, per_sm in ((16, 4, 1, 1), (32, 8, 2, 3), (64, 4, 2, 2)):
        check(run(q, keys, values, held, 0.2, None, Tuning(block, warps, stages, per_sm)), want, torch.float32)


def test_what_does_not_fit_is_refused(seed: int) -> None:
    torch.manual_seed(seed)
    case, lengths = Case(torch.float32, 1, (32, 32), 2, 4, 0.0), [190, 70]
    (keys, _), (values, _) = sides(case, lengths, [[176, 64], [176, 64]])
    q, held = on(torch.zeros(1, 2, 1, 32), torch.tensor(lengths, dtype=torch.int32))
    with pytest.raises(BadArgument, match="int32"):
        decode_coded(q, keys, values._replace(packed=values.packed.long()), held)
    with pytest.raises(BadArgument, match="dtype"):
        decode_coded(q.half(), keys, values, held)
    half = values.coding._replace(levels=values.coding.levels.half())
    with pytest.raises(BadArgument, match="levels"):
        decode_coded(q, keys, values._replace(coding=half), held)
    with pytest.raises(BadArgument, match="adjacent"):
        decode_coded(q, keys._replace(codes=keys.codes.mT.contiguous().mT), values, held)
    with pytest.raises(BadArgument, match="first tokens"):
        decode_coded(q, keys._replace(coding=keys.coding._replace(pointers=32)), values, held)
