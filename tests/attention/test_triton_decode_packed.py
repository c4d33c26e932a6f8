"""Decode over packed stores against unpacking them first, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from tests.attention.test_triton_decode import check, made, on, truth
from torch import Tensor

from foveate.errors import BadArgument
from foveate.methods.kivi import Quantised

pytest.importorskip("triton")

from foveate.attention.triton import decode_words
from foveate.attention.triton.decode_packed import PackedSide, decode_packed
from foveate.attention.triton.workers import Tuning


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


@pytest.mark.parametrize(
    ("bits", "rows", "group", "dim", "block", "softcap"),
    [(4, 4, 32, 128, 32, None), (2, 8, 32, 128, 32, None), (4, 1, 16, 64, 64, 9.0), (4, 3, 64, 64, 32, None)],
)
def test_words_hold_more_than_bfloat16(
    seed: int, bits: int, rows: int, group: int, dim: int, block: int, softcap: float | None
) -> None:
    """Against what the codes stand for, in float64; numbers that are rounded to bfloat16 first are further from it."""
    torch.manual_seed(seed)
    most, residual, dtype = 3 * group + 39, 2 * group, torch.bfloat16
    lengths, k_packed, v_packed = [7, most], [0, 2 * group], [0, most - residual]
    q, k, v = made(dtype, 1, 2 * rows, 1, dim), made(dtype, 2, most, dim), made(dtype, 2, most, dim)
    k = k + 3 * made(torch.float32, dim).to(dtype)
    hows = Quantised(bits, group, True, 0, residual), Quantised(bits, group, False, residual, 1)
    keys, _ = side(k, k_packed, lengths, hows[0], 2 * residual)
    values, _ = side(v, v_packed, lengths, hows[1], 2 * residual)
    exact = k.double(), v.double()
    for x, held, packed, how in zip((k, v), exact, (k_packed, v_packed), hows, strict=True):
        for p, n in enumerate(packed):
            if n:
                held[p, :n] = how.unpack(how.pack(x[p : p + 1, :n]), torch.float64)[0]
    held = torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, *exact, held, scale=0.1, softcap=softcap)
    q, held = on(q, held)
    assert decode_words.suits(q, keys, values, rows)
    out, lse = decode_words.run(q, keys, values, held, 0.1, softcap, Tuning(block, 1, 3, 3))
    error = (out.cpu().double() - want.out).square().mean().sqrt() / want.out.square().mean().sqrt()
    assert float(error) < 4e-3
    assert float((lse.cpu().double() - want.lse).abs().max()) < 0.03


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_become_numbers_by_their_bits_alone(bits: int) -> None:
    """What the instructions do, which the interpreter does in another way."""
    words = torch.arange(2**16, dtype=torch.int64)
    pairs = words | (words.flip(0) << 16)
    for j in range(16 // bits):
        text = decode_words._ptx(j, bits)
        move = re.search(r"(shr\.u32|shl\.b32) y, \$1, (\d+)", text)
        y = pairs if move is None else pairs >> int(move[2]) if move[1] == "shr.u32" else pairs << int(move[2])
        mask, front = (int(x, 16) for x in re.findall(r"0x[0-9a-f]{6,8}", text))
        y = (y & mask) | front
        for half, word in ((y & 0xFFFF, words), (y >> 16, words.flip(0))):
            number = torch.where(half >= 2**15, half - 2**16, half).to(torch.int16).view(torch.float16)
            assert torch.equal(number.long(), 2**bits + ((word >> (j * bits)) & (2**bits - 1)))


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
