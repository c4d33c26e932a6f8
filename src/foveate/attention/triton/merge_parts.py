"""Parts of attention over disjoint keys, made one in one launch.

Source: merging of partial results as in FlashDecoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument

MOST = 4
"""Parts of one launch."""


@jit
def _weighed(part, lse, row, keep, anchor, DV: tl.constexpr, D: tl.constexpr):
    """Rows of a part by their weights, and these; what weighs nothing may hold anything."""
    d = tl.arange(0, D)
    weight = tl.exp(tl.load(lse + row, mask=keep, other=float("-inf")) - anchor)
    x = tl.load(part + row[:, None] * DV + d[None, :], mask=keep[:, None] & (d < DV)[None, :], other=0.0)
    return tl.where(weight[:, None] > 0, x.to(tl.float32) * weight[:, None], 0.0), weight


@jit
def _merge_parts(
    a, b, c, e, lse_a, lse_b, lse_c, lse_e, out, lse, rows, T: tl.constexpr, COUNT: tl.constexpr, DV: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    keep = row < rows
    none = float("-inf")
    top = tl.maximum(tl.load(lse_a + row, mask=keep, other=none), tl.load(lse_b + row, mask=keep, other=none))
    if COUNT > 2:
        top = tl.maximum(top, tl.load(lse_c + row, mask=keep, other=none))
    if COUNT > 3:
        top = tl.maximum(top, tl.load(lse_e + row, mask=keep, other=none))
    anchor = tl.where(top == none, 0.0, top)
    value, total = _weighed(a, lse_a, row, keep, anchor, DV, D)
    x, weight = _weighed(b, lse_b, row, keep, anchor, DV, D)
    value, total = value + x, total + weight
    if COUNT > 2:
        x, weight = _weighed(c, lse_c, row, keep, anchor, DV, D)
        value, total = value + x, total + weight
    if COUNT > 3:
        x, weight = _weighed(e, lse_e, row, keep, anchor, DV, D)
        value, total = value + x, total + weight
    seen = total > 0
    mass = tl.where(seen, total, 1.0)
    d = tl.arange(0, D)
    place = out + row[:, None] * DV + d[None, :]
    tl.store(place, (value / mass[:, None]).to(out.dtype.element_ty), mask=keep[:, None] & (d < DV)[None, :])
    tl.store(lse + row, tl.where(seen, anchor + tl.log(mass), none), mask=keep)


def merge_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What `foveate.attention.merge` gives.

    Args:
        outs: 2 to 4 of [..., Dv], of one dtype.
        lses: float32 [...], the natural logarithm of the mass of each; -inf: it saw nothing.

    Returns:
        out [..., Dv] in the dtype of the parts, lse [...].
    """
    if not 2 <= len(outs) <= MOST or len(outs) != len(lses):
        raise BadArgument("outs", f"{len(outs)} parts, {len(lses)} lses", f"give 2 to {MOST} of both")
    for x, y in zip(outs, lses, strict=True):
        if x.dtype != outs[0].dtype or y.dtype != torch.float32 or x.shape != outs[0].shape or y.shape != x.shape[:-1]:
            given = f"{tuple(x.shape)} {x.dtype} with lse {tuple(y.shape)} {y.dtype}"
            raise BadArgument("outs", given, f"parts must agree on {tuple(outs[0].shape)} {outs[0].dtype}, lse float32")
    return _op([x.contiguous() for x in outs], [x.contiguous() for x in lses])


@torch.library.custom_op(
    "foveate::merge_parts", mutates_args=(), schema="(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)"
)
def _op(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    none, rows, wide = MOST - len(outs), lse.numel(), power_of_two(out.shape[-1])
    # A prompt has millions of rows, and a program of one is soon over.
    tile = max(1, 2048 // wide) if outs[0].shape[-2] > 1 else 1
    _merge_parts[(-(-rows // tile),)](
        *outs, *outs[:1] * none, *lses, *lses[:1] * none, out, lse, rows, T=tile, COUNT=len(outs), DV=out.shape[-1],
        D=wide, num_warps=1 if tile == 1 else 4,
    )  # fmt: skip
    return out, lse


@_op.register_fake
def _(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])
