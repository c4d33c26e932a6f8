"""Decode over packed stores against unpacking them first, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.attention.test_triton_decode import check, made, on, truth
from torch import Tensor

from foveate.errors import BadArgument
from foveate.methods.kivi import Quantised

pytest.importorskip("triton")

from foveate.attention.triton.decode_packed import PackedSide, decode_packed


def side(x: Tensor, packed: list[int], lengths: list[int], how: Quantised, tail: int) -> tuple[PackedSide, Tensor]:
    """x [P, C, D] with the first packed[p] tokens in few bits, and what that reads as; the rest of the buffers is bad:
    bodies hold random bytes and infinite scales, tails NaN."""
    pairs, _, dim = x.shape
    most = max(max(packed), how.unit) + 2 * how.unit  # bodies have room behind what they hold
    body = how.pack(x.new_zeros(pairs, most, dim))
    bodies = [torch.randint_like(body[0], 255), *(torch.full_like(t, torch.inf) for t in body[1:])]
    held, tails = x.clone(), x.new_full((pairs, tail, dim), torch.nan)
    for p, (n, length) in enumerate(zip(packed, lengths, strict=True)):
        if n:
            parts = how.pack(x[p : p + 1, :n])
            held[p, :n] = how.unpack(parts, x.dtype)[0]
            for buffer, part in zip(bodies, parts, strict=True):
                buffer[p, : part.shape[1]] = part[0]
        tails[p, : length - n] = x[p, n:length]
    group = how.group if how.per_channel else math.gcd(dim, how.group)
    codes, scale, zero, tails, count = on(*bodies, tails, torch.tensor(packed, dtype=torch.int32))
    return PackedSide(codes, scale, zero, tails, count, how.bits, group), held


@pytest.mark.parametrize(
    ("bits", "group", "dim", "dtype"),
    [
        (4, 32, 64, torch.bfloat16),
        (2, 32, 64, torch.float32),
        (8, 16, 32, torch.float16),
        (4, 32, 80, torch.float16),
        (2, 24, 96, torch.float32),
        (4, 64, 128, torch.bfloat16),
    ],
)
def test_packed_and_exact_tokens_in_one_pass(seed: int, bits: int, group: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    lengths, residual = [5, 3 * group + 7, 200, 0], 2 * group
    k_packed = [0, 2 * group, 200 // residual * residual, 0]
    v_packed = [max(0, n - residual) for n in lengths]
    q, k, v = made(dtype, 2, 6, 1, dim, factor=2), made(dtype, 4, 200, dim), made(dtype, 4, 200, dim)
    keys, k_held = side(k, k_packed, lengths, Quantised(bits, group, True, 0, residual), 2 * residual)
    values, v_held = side(v, v_packed, lengths, Quantised(bits, group, False, residual, 1), 2 * residual)
    held = torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, k_held, v_held, held, scale=0.2, softcap=9.0)
    q, held = on(q, held)
    check(decode_packed(q, keys, values, held, 0.2, 9.0), want, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group", "dims"), [((2, 2), 16, (64, 64)), ((4, 2), 32, (128, 64)), ((2, 4), 64, (64, 128))]
)
def test_words_of_codes_are_unpacked_at_once(
    seed: int, bits: tuple[int, int], group: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """In float16, whatever the dtype of the queries: no further from the packed numbers than their rounding."""
    torch.manual_seed(seed)
    lengths, packed = [420, 64, 130, 1], [384, 64, 128, 0]
    q, k, v = made(dtype, 2, 16, 1, dims[0], factor=2), made(dtype, 4, 420, dims[0]), made(dtype, 4, 420, dims[1])
    keys, k_held = side(k, packed, lengths, Quantised(bits[0], group, True, 0, 64), 128)
    values, v_held = side(v, packed, lengths, Quantised(bits[1], group, False, 64, 1), 128)
    held = torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, k_held, v_held, held, scale=0.2, softcap=None)
    q, held = on(q, held)
    check(decode_packed(q, keys, values, held, 0.2), want, dtype)


def test_packed_refusals(seed: int) -> None:
    torch.manual_seed(seed)
    x, how = made(torch.float32, 2, 40, 64), Quantised(4, 32, True, 0, 32)
    keys, _ = side(x, [32, 0], [40, 20], how, 40)
    values, _ = side(x, [8, 0], [40, 20], Quantised(4, 32, False, 32, 1), 40)
    q, held = on(torch.zeros(1, 4, 1, 64), torch.tensor([40, 20], dtype=torch.int32))
    with pytest.raises(BadArgument, match="do not fit"):
        decode_packed(q, replace(keys, bits=2), values, held)
    with pytest.raises(BadArgument, match="int32"):
        decode_packed(q, keys, replace(values, packed=values.packed.long()), held)
    with pytest.raises(BadArgument, match="dtype"):
        decode_packed(q.half(), keys, values, held)
