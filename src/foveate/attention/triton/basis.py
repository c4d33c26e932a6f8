"""Queries turned into the basis of coded keys, and what was found in that of coded values turned back."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.coded import CodedSide
from foveate.attention.triton.workers import jit, power_of_two

BARE = tl.constexpr(16)
"""Vectors that stand beside a basis: the mean, the first tokens, and zeros."""
PIECE = 16
"""Channels of a program."""


def wide(dim: int) -> int:
    """Channels of a tile."""
    return max(32, power_of_two(dim))


@jit
def _bare(mean, first, at, head, d, keep, S: tl.constexpr, D: tl.constexpr):
    """The vectors beside the basis [16, d]: the mean, then the S first tokens of a pair."""
    i = tl.arange(0, BARE)
    x = tl.where((i == 0)[:, None], tl.load(mean + head * D + d, mask=keep, other=0.0)[None, :], 0.0)
    inside = ((i > 0) & (i <= S))[:, None] & keep[None, :]
    place = (at * S + i - 1)[:, None] * D + d[None, :]
    return x + tl.load(first + place, mask=inside, other=0.0).to(tl.float32)


@jit
def _turn(
    q, heads, mean, back, first, turned,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, WC: tl.constexpr, WD: tl.constexpr,
):  # fmt: skip
    """Products of the query rows of a pair with the basis and what stands beside it: turned [P, R, WC + 16]."""
    pair, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.load(heads + pair).to(tl.int64)
    d = tl.arange(0, WD)
    keep = d < D
    c = piece * BARE + tl.arange(0, BARE)
    if piece * BARE < WC:
        x = tl.load(back + (head * C + c)[:, None] * D + d[None, :], mask=(c < C)[:, None] & keep[None, :], other=0.0)
    else:
        x = _bare(mean, first, pair, head, d, keep, S, D)
    for r in tl.range(0, R):  # type: ignore[general]
        row = tl.load(q + (pair * R + r) * D + d, mask=keep, other=0.0).to(tl.float32)
        tl.store(turned + (pair * R + r) * (WC + BARE) + c, tl.sum(x * row[None, :], 1))


@jit
def _turn_back(
    found, heads, mean, back, first, out,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, WC: tl.constexpr, WD: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """What was found in the basis, of exact tokens and beside the basis [P, R, WC + WD + 16] as out [P, R, D]."""
    pair, head = tl.program_id(0).to(tl.int64), tl.load(heads + tl.program_id(0)).to(tl.int64)
    d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    keep = d < D
    c, i = tl.arange(0, WC), tl.arange(0, BARE)
    x = tl.load(back + (head * C + c)[:, None] * D + d[None, :], mask=(c < C)[:, None] & keep[None, :], other=0.0)
    bare = _bare(mean, first, pair, head, d, keep, S, D)
    for r in tl.range(0, R):  # type: ignore[general]
        at = found + (pair * R + r) * (WC + WD + BARE)
        value = tl.load(at + WC + d, mask=keep, other=0.0)
        value += tl.sum(tl.load(at + c)[:, None] * x, 0) + tl.sum(tl.load(at + WC + WD + i)[:, None] * bare, 0)
        tl.store(out + (pair * R + r) * D + d, value.to(out.dtype.element_ty), mask=keep)


def turn(q: Tensor, keys: CodedSide, rows: int) -> Tensor:
    """Products of queries [P * rows, Dk], in whatever shape, with the basis and with what stands beside it: float32
    [P * rows, wide(C) + 16], zeros between."""
    mean, back = keys.coding.mean, keys.coding.back
    pairs, (_, c, d) = len(keys.heads), back.shape
    out = torch.empty(pairs * rows, wide(c) + BARE.value, dtype=torch.float32, device=q.device)
    _turn[(pairs, wide(c) // PIECE + 1)](
        q, keys.heads, mean, back, keys.first, out, R=rows, S=keys.first.shape[1], C=c, D=d, WC=wide(c), WD=wide(d),
        num_warps=4,
    )  # fmt: skip
    return out


def turn_back(found: Tensor, values: CodedSide, out: Tensor) -> None:
    """What was found in the basis, of exact tokens and beside the basis, float32 [P * rows, wide(C) + wide(Dv) + 16],
    into out [P * rows, Dv], in whatever shape."""
    mean, back = values.coding.mean, values.coding.back
    pairs, (_, c, d) = len(values.heads), back.shape
    _turn_back[(pairs, -(-d // PIECE))](
        found, values.heads, mean, back, values.first, out, R=len(found) // pairs, S=values.first.shape[1], C=c, D=d,
        WC=wide(c), WD=wide(d), PIECE=PIECE, num_warps=4,
    )  # fmt: skip
