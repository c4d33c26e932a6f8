"""Exact merging of attention over disjoint sets of keys, by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention import decoding
from foveate.attention.selection import Partial
from foveate.errors import BadArgument


def merge(parts: Sequence[Partial]) -> Partial:
    """One softmax out of several: parts over disjoint keys, weighted by the mass that each of them holds.

    The result is what one softmax over the union of the keys would have given, in any order of the parts. It adds up in
    float32 (float64 if a part is float64). A part with lse = -inf saw nothing and adds nothing, whatever its `out`
    holds; where no part saw anything, out is 0 and lse is -inf.

    Args:
        parts: each out [B, H, N, Dv], lse [B, H, N] (natural logarithm).

    Returns:
        out [B, H, N, Dv] in the dtype of the parts, lse [B, H, N] in the dtype of the sum.

    Raises:
        BadArgument: no parts, or parts of different shapes, or a part without lse.

    Source: online softmax (Milakov and Gimelshein 2018); merging of partial results as in FlashDecoding.
    """
    if not parts:
        raise BadArgument("parts", parts, "give at least one part")
    shape = parts[0].out.shape
    for number, part in enumerate(parts):
        if part.lse is None:
            raise BadArgument(
                f"parts[{number}].lse", None, "a part can only be merged with its lse: attend with lse=True"
            )
        if part.out.shape != shape or part.lse.shape != shape[:-1]:
            given = f"out {tuple(part.out.shape)}, lse {tuple(part.lse.shape)}"
            raise BadArgument(
                f"parts[{number}]", given, f"parts must agree: out {tuple(shape)}, lse {tuple(shape[:-1])}"
            )
    if decoding.merges(parts):
        return decoding.merged(parts)
    double = any(torch.float64 in (part.out.dtype, part.lse.dtype) for part in parts)
    wide = torch.float64 if double else torch.float32
    dtype = parts[0].out.dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.out.dtype)

    top = parts[0].lse.to(wide)
    for part in parts[1:]:
        top = torch.maximum(top, part.lse.to(wide))
    # Where nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
    anchor = torch.where(top == -torch.inf, 0.0, top)

    total = torch.zeros_like(anchor)
    out: Tensor = torch.zeros(shape, dtype=wide, device=anchor.device)
    for part in parts:
        weight = (part.lse.to(wide) - anchor).exp()
        total = total + weight
        weight = weight.unsqueeze(-1)
        # A part that saw nothing may hold NaN (0/0 of whoever made it), and 0 * NaN is NaN.
        out = out + torch.where(weight > 0, part.out.to(wide) * weight, 0.0)
    seen = total > 0
    out = out / torch.where(seen, total, 1.0).unsqueeze(-1)
    lse = torch.where(seen, anchor + total.log(), -torch.inf)
    return Partial(out.to(dtype), lse)
