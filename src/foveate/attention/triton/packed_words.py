"""Codes of few bits taken a word at a time, two numbers a register.

Unpacking is what decode over packed stores is bound by. Byte by byte, by integers that become float32 and are rounded,
it took nine instructions a number on an H100. A float16 whose last ten bits are a code is 1024 and that code, so that a
mask of a word is two numbers at once, half a word apart; products with queries do not ask for the order of channels.
"""

from __future__ import annotations

import triton.language as tl

from foveate.attention.triton.workers import jit


@jit
def halves_of(words, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """Code NUMBER of the lower and of the upper half of 32-bit words, each as float16 behind 1024: where a number's
    last ten bits are a code, it is 1024 and that."""
    low = 0x000F000F if BITS == 4 else 0x00030003
    both = ((words >> (BITS * NUMBER)) & low) | 0x64006400
    first = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return first, ((both >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@jit
def paired(a, b, c, d):
    """[...] four times as [..., 2, 2], in their order."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@jit
def numbers(words, ROWS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Words of codes [ROWS, n] as float16 [ROWS, D], channels in the order of `shuffled`. Two numbers a register, and
    no conversion from integers: that is what unpacking is bound by."""
    l0, h0 = halves_of(words, BITS, 0)
    l1, h1 = halves_of(words, BITS, 1)
    l2, h2 = halves_of(words, BITS, 2)
    l3, h3 = halves_of(words, BITS, 3)
    low, high = paired(l0, l1, l2, l3), paired(h0, h1, h2, h3)
    if BITS == 2:
        l4, h4 = halves_of(words, BITS, 4)
        l5, h5 = halves_of(words, BITS, 5)
        l6, h6 = halves_of(words, BITS, 6)
        l7, h7 = halves_of(words, BITS, 7)
        low = tl.permute(tl.join(low, paired(l4, l5, l6, l7)), [0, 1, 4, 2, 3])
        high = tl.permute(tl.join(high, paired(h4, h5, h6, h7)), [0, 1, 4, 2, 3])
    low = tl.reshape(low, [ROWS, D * BITS // 32, 16 // BITS])
    high = tl.reshape(high, [ROWS, D * BITS // 32, 16 // BITS])
    return tl.reshape(tl.join(low, high), [ROWS, D]) - 1024.0


@jit
def shuffled(x, ROWS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Channels [ROWS, D] as two of a word that stand half of it apart stand side by side."""
    HALF: tl.constexpr = 16 // BITS
    x = tl.reshape(x, [ROWS, D // (2 * HALF), 2, HALF])
    return tl.reshape(tl.permute(x, [0, 1, 3, 2]), [ROWS, D])


@jit
def in_order(x, ROWS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """What `shuffled` did, undone."""
    HALF: tl.constexpr = 16 // BITS
    x = tl.reshape(x, [ROWS, D // (2 * HALF), HALF, 2])
    return tl.reshape(tl.permute(x, [0, 1, 3, 2]), [ROWS, D])


@jit
def whole_tile(
    codes, scale, zero, first, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """BLOCK packed tokens from `first` on as float16 [BLOCK, D], channels in the order of `shuffled`."""
    n = tl.arange(0, BLOCK)
    ROW: tl.constexpr = D * BITS // 32
    at = tl.cast(first, tl.int64)
    words = codes.to(tl.pointer_type(tl.int32)) + at * ROW + n[:, None] * ROW + tl.arange(0, ROW)[None, :]
    x = numbers(tl.load(words), BLOCK, D, BITS)
    if KEYS:
        GROUPS: tl.constexpr = BLOCK // GROUP
        place = at // GROUP * D + tl.arange(0, GROUPS)[:, None] * D + tl.arange(0, D)[None, :]
        by = shuffled(tl.load(scale + place), GROUPS, D, BITS)
        low = shuffled(tl.load(zero + place), GROUPS, D, BITS)
        x = tl.reshape(x, [GROUPS, GROUP, D]) * by[:, None, :] + low[:, None, :]
    else:
        WIDTH: tl.constexpr = D // GROUP
        place = at * WIDTH + n[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = tl.reshape(x, [BLOCK, WIDTH, GROUP])
        x = x * tl.load(scale + place)[:, :, None] + tl.load(zero + place)[:, :, None]
    return tl.reshape(x, [BLOCK, D])
