"""Products of weights with one token, for decode steps: a row of the weight per program, read at memory's speed.

A decode step of one sequence reads every weight for one token. cuBLAS splits such products over few programs and adds
up in a second launch; on an H100 the seven of a Llama-3-8B layer took 183 us by it, 150 us here, and the reading itself
takes 141. Matrices that meet the same token (queries, keys and values; gate and up) are read in one launch. The norm of
that token is made on the way, as its factor comes out of the sum: a program meets all of the token anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two
from foveate.engine.later import Norm

_AT_ONCE = 2048
"""Channels that a program reads of its row in one go: 16 bytes for each of 256 threads."""


def suits(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels can multiply x [..., K] by weights [N, K]: one token, half precision, whole rows."""
    if x.numel() != x.shape[-1] or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
        return False
    return all(w.dtype == x.dtype and w.shape[1] == x.shape[-1] and w.is_contiguous() for w in weights)


def products(
    x: Tensor | Norm,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    plus: Tensor | None = None,
) -> list[Tensor]:
    """x [..., K] by up to three weights [N_i, K], plus biases [N_i]: a [..., N_i] of each, in one launch.

    Sums are made in float32 and rounded once. The inputs must suit (see `suits`).

    Args:
        x: or what it is the norm of, whose own rounding is left out then.
        plus: [..., N_1], added to the rounded product of the only weight.
    """
    token, scale, epsilon = _parts(x)
    sizes = [len(w) for w in weights]
    out = [token.new_empty(*token.shape[:-1], n) for n in sizes]
    w, b, y = (_three(given) for given in (weights, biases or weights, out))
    width, block, warps = _layout(token)
    _products[(sum(sizes),)](
        token, scale, *w, *b, *y, token if plus is None else plus, sizes[0], sum(sizes[:2]), epsilon, K=width,
        BLOCK=block, COUNT=len(sizes), BIAS=biases is not None, NORM=isinstance(x, Norm), PLUS=plus is not None,
        num_warps=warps,
    )  # fmt: skip
    return out


def _three(given: Sequence[Tensor]) -> list[Tensor]:
    return [*given, *[given[0]] * (3 - len(given))]


def gated(x: Tensor | Norm, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T) of x [..., K] and weights [N, K]: [..., N]; rounded where the modules would round, but
    for a norm, which is not.
    """
    token, scale, epsilon = _parts(x)
    out = token.new_empty(*token.shape[:-1], len(gate))
    width, block, warps = _layout(token)
    norm = isinstance(x, Norm)
    _gated[(len(gate),)](
        token, scale, gate, up, out, epsilon, K=width, BLOCK=block, NORM=norm, num_warps=warps
    )  # fmt: skip
    return out


def _parts(x: Tensor | Norm) -> tuple[Tensor, Tensor, float]:
    """The token, the weight of its norm and its epsilon; any where there is no norm."""
    return (x, x, 0.0) if isinstance(x, Tensor) else x


def _layout(x: Tensor) -> tuple[int, int, int]:
    width = x.shape[-1]
    block = min(_AT_ONCE, power_of_two(width))
    return width, block, max(1, block // 256)


@jit(do_not_specialize=["first", "second"])
def _products(
    x, scale, w0, w1, w2, b0, b1, b2, y0, y1, y2, plus, first, second, epsilon, K: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr,
):  # fmt: skip
    """Row `program` of the weights one below the other: `first` rows of w0, w1 up to row `second`, the rest of w2."""
    row = tl.program_id(0)
    at, w, b, y = row, w0, b0, y0
    if COUNT > 1:  # noqa: SIM102, what is known at compile time stands apart
        if row >= first:
            at, w, b, y = row - first, w1, b1, y1
    if COUNT > 2:  # noqa: SIM102
        if row >= second:
            at, w, b, y = row - second, w2, b2, y2
    at = at.to(tl.int64)
    there = tl.arange(0, BLOCK)
    sums, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        some, squares = _token(x, scale, k + there, squares, K, NORM)
        sums += some * tl.load(w + at * K + k + there, mask=k + there < K, other=0.0).to(tl.float32)
    total = tl.sum(sums, 0) * _factor(squares, epsilon, K, NORM)
    if BIAS:
        total += tl.load(b + at).to(tl.float32)
    if PLUS:
        total = total.to(y.dtype.element_ty).to(tl.float32) + tl.load(plus + at).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty))


@jit
def _gated(x, scale, gate, up, y, epsilon, K: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    there = tl.arange(0, BLOCK)
    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        valid = k + there < K
        some, squares = _token(x, scale, k + there, squares, K, NORM)
        a += some * tl.load(gate + row * K + k + there, mask=valid, other=0.0).to(tl.float32)
        b += some * tl.load(up + row * K + k + there, mask=valid, other=0.0).to(tl.float32)
    kind: tl.constexpr = y.dtype.element_ty
    factor = _factor(squares, epsilon, K, NORM)
    opened = (tl.sum(a, 0) * factor).to(kind).to(tl.float32)
    opened = (opened / (1 + tl.exp(-opened))).to(kind).to(tl.float32)
    tl.store(y + row, (opened * (tl.sum(b, 0) * factor).to(kind).to(tl.float32)).to(kind))


@jit
def _token(x, scale, at, squares, K: tl.constexpr, NORM: tl.constexpr):
    """Channels `at` of the token, by the norm's weight where it is to be normed, and the squares so far."""
    some = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    if NORM:
        squares += some * some
        some *= tl.load(scale + at, mask=at < K, other=0.0).to(tl.float32)
    return some, squares


@jit
def _factor(squares, epsilon, K: tl.constexpr, NORM: tl.constexpr):
    """What is left of a norm once its products are summed up; 1 where there is none."""
    if NORM:
        return tl.rsqrt(tl.sum(squares, 0) / K + epsilon)
    else:
        return 1.0
