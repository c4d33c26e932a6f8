"""Rotary embeddings of a decode step: queries and keys of one token per row turned in one launch, in place."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit, power_of_two


def suits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel can turn q [B, H, 1, D] and k [B, Hk, 1, D] by cos and sin, [B, 1, D] or [1, 1, D] each."""
    rows, dim = (1, len(q)), q.shape[3]
    turns = all(x.dim() == 3 and x.shape[0] in rows and x.shape[1:] == (1, dim) for x in (cos, sin))
    return q.shape[2] == k.shape[2] == 1 and dim % 2 == 0 and turns and all(x.stride(-1) == 1 for x in (q, k, cos, sin))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, turned in place: channel d of the first half with channel d of the second. Each product and each sum is
    rounded, as PyTorch does it, and none is fused into the next. The inputs must suit (see `suits`).
    """
    batch, heads, _, dim = q.shape
    rows = [0 if len(x) == 1 else x.stride(0) for x in (cos, sin)]
    _rotate[(batch * (heads + k.shape[1]),)](
        q, k, cos, sin, heads, heads + k.shape[1], *q.stride()[:2], *k.stride()[:2], *rows, HALF=dim // 2,
        WIDE=power_of_two(dim // 2), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return q, k


@jit(do_not_specialize=["heads", "both"])
def _rotate(
    q, k, cos, sin, heads, both, stride_qb, stride_qh, stride_kb, stride_kh, stride_c, stride_s, HALF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // both).to(tl.int64), tl.program_id(0) % both
    x = q + row * stride_qb + head * stride_qh
    if head >= heads:
        x = k + row * stride_kb + (head - heads) * stride_kh
    d = tl.arange(0, WIDE)
    keep = d < HALF
    a, b = _number(x, d, keep), _number(x + HALF, d, keep)
    c, s = cos + row * stride_c, sin + row * stride_s
    first = _rounded(a * _number(c, d, keep), x) - _rounded(b * _number(s, d, keep), x)
    second = _rounded(b * _number(c + HALF, d, keep), x) + _rounded(a * _number(s + HALF, d, keep), x)
    tl.store(x + d, first.to(x.dtype.element_ty), mask=keep)
    tl.store(x + HALF + d, second.to(x.dtype.element_ty), mask=keep)


@jit
def _number(x, d, keep):
    return tl.load(x + d, mask=keep, other=0.0).to(tl.float32)


@jit
def _rounded(number, like):
    return number.to(like.dtype.element_ty).to(tl.float32)
