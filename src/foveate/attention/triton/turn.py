"""Queries or keys turned to other positions, in one launch: what PyTorch does in twenty, each over all numbers."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.triton.turning import channels, halves, others, turned
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit(do_not_specialize=["rows", "heads", "queries"])
def _turn(
    x, delta, frequencies, out, rows, heads, queries, xsb, xsh, xsn, dsb, dsh, dsn, T: tl.constexpr, DK: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, RP: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    keep = row < rows
    i, h, b = row % queries, row // queries % heads, row // queries // heads
    d = tl.arange(0, FP)
    by = tl.load(delta + b * dsb + h * dsh + i * dsn, mask=keep, other=0).to(tl.float32)
    angle = by[:, None] * tl.load(frequencies + d, mask=d < F, other=0.0)[None, :]
    at, to = b * xsb + h * xsh + i * xsn, row * DK
    x1, x2 = halves(x, at, keep, FIRST, F, FP)
    x1, x2 = turned(x1, x2, tl.cos(angle), tl.sin(angle))
    inside = keep[:, None] & (d < F)[None, :]
    target = out + to[:, None] + FIRST + d[None, :]
    tl.store(target, x1.to(out.dtype.element_ty), mask=inside)
    tl.store(target + F, x2.to(out.dtype.element_ty), mask=inside)
    if REST:
        r = tl.arange(0, RP)
        kept = others(x, at, keep, OTHERS, REST, RP)
        tl.store(out + to[:, None] + OTHERS + r[None, :], kept, mask=keep[:, None] & (r < REST)[None, :])


def turn(x: Tensor, delta: Tensor, angles: Angles) -> Tensor:
    """Rotated x [B, H, N, D], turned by delta [B, N] or [B, H, N] positions (axes of 1 are shared): [B, H, N, D].

    Raises:
        BadArgument: shapes that do not fit each other.
    """
    if x.dim() != 4 or delta.dim() not in (2, 3) or not angles.fit(x.shape[3]):
        given = f"{tuple(x.shape)}, delta {tuple(delta.shape)}, {angles.frequencies.numel()} frequencies"
        raise BadArgument("x", given, "give [B, H, N, D], a delta for each position, a frequency for each pair")
    delta = delta.unsqueeze(1) if delta.dim() == 2 else delta
    try:
        delta = delta.expand(x.shape[:3])
    except RuntimeError:
        raise BadArgument("delta", tuple(delta.shape), f"it must fit x {tuple(x.shape)}") from None
    speed = angles.frequencies.to(x.device).float().contiguous()
    return _op(x if x.stride(3) == 1 else x.contiguous(), delta, speed, angles.last)


@torch.library.custom_op(
    "foveate::turn", mutates_args=(), schema="(Tensor x, Tensor delta, Tensor frequencies, bool last) -> Tensor"
)
def _op(x: Tensor, delta: Tensor, frequencies: Tensor, last: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dim = x.shape[:3].numel(), x.shape[3]
    tile = max(1, min(8, 1024 // power_of_two(dim)))
    if rows:
        _turn[(-(-rows // tile),)](
            x, delta, frequencies, out, rows, x.shape[1], x.shape[2], *x.stride()[:3], *delta.stride(), T=tile,
            **channels(dim, frequencies.numel(), last), num_warps=4,
        )  # fmt: skip
    return out


@_op.register_fake
def _(x: Tensor, delta: Tensor, frequencies: Tensor, last: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
