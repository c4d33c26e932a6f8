"""What kernels that turn keys as they read them share: channels in rotated pairs and the rest, one behind the other.

Source: rotary position embedding, RoFormer (2104.09864), section 3.2; pairs lie half a rotation's width apart.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from foveate.attention.triton.workers import jit, power_of_two


def channels(dim: int, pairs: int, last: bool) -> dict[str, Any]:
    """As constants of a kernel: channels, pairs, where they begin, and the others; each with its padded size."""
    rest = dim - 2 * pairs
    return {
        "DK": dim, "F": pairs, "FP": max(16, power_of_two(pairs)), "FIRST": rest if last else 0,
        "REST": rest, "RP": max(16, power_of_two(rest)) if rest else 0, "OTHERS": 0 if last else 2 * pairs,
    }  # fmt: skip


def tokens_at_once(dim: int, width: int) -> int:
    """Keys of `dim` channels, of `width` bytes each, that a program turns in its registers."""
    return max(16, min(64, 16384 // (power_of_two(dim) * width)))


@jit
def held_halves(x, offsets, keep, FIRST: tl.constexpr, F: tl.constexpr, FP: tl.constexpr):
    """Both halves [n, FP] of the rotated channels of rows at offsets [n] behind x; 0 where not kept."""
    d = tl.arange(0, FP)
    inside = keep[:, None]
    if FP > F:
        inside = inside & (d < F)[None, :]
    place = x + offsets[:, None] + FIRST + d[None, :]
    return tl.load(place, mask=inside, other=0.0), tl.load(place + F, mask=inside, other=0.0)


@jit
def halves(x, offsets, keep, FIRST: tl.constexpr, F: tl.constexpr, FP: tl.constexpr):
    """`held_halves` in float32."""
    x1, x2 = held_halves(x, offsets, keep, FIRST, F, FP)
    return x1.to(tl.float32), x2.to(tl.float32)


@jit
def others(x, offsets, keep, OTHERS: tl.constexpr, REST: tl.constexpr, RP: tl.constexpr):
    """The channels [n, RP] that are not rotated; 0 where not kept."""
    d = tl.arange(0, RP)
    return tl.load(x + offsets[:, None] + OTHERS + d[None, :], mask=keep[:, None] & (d < REST)[None, :], other=0.0)


@jit
def circle(angle):
    """Cosines and sines of angles, float32, without a branch: those of PyTorch go a long way round where angles are
    large, which some in a tile always are.

    Source: the polynomials of Cephes' single precision, which are good to the last digit up to an eighth of a turn.
    """
    quarters = angle.to(tl.float64) * 0.6366197723675814
    whole = tl.floor(quarters + 0.5)
    x = ((quarters - whole) * 1.5707963267948966).to(tl.float32)
    z = x * x
    sin = x + x * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = 1.0 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    quadrant = whole.to(tl.int32)
    odd = (quadrant & 1) != 0
    one, other = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quadrant + 1) & 2) != 0, -one, one), tl.where((quadrant & 2) != 0, -other, other)


@jit
def turned(x1, x2, cos, sin):
    """Both halves, turned by angles of these cosines and sines."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@jit
def product(a, b, s, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """s + a b^T of float32 a [M, d] and b [n, d] in the dtype of keys; SPLIT: a in two numbers of that dtype."""
    if SPLIT:
        high = a.to(b.dtype)
        s = tl.dot((a - high.to(tl.float32)).to(b.dtype), tl.trans(b), s, input_precision=PRECISION)
        return tl.dot(high, tl.trans(b), s, input_precision=PRECISION)
    else:
        return tl.dot(a.to(b.dtype), tl.trans(b), s, input_precision=PRECISION)
