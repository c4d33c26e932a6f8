"""How much attention each key received, without an attention map: a second pass over the scores with a known lse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention.kernel import SCORES, fold
from foveate.attention.scores import to_heads
from foveate.attention.selection import ALL, Geometry, Selection, Span
from foveate.attention.triton_prefill import machine
from foveate.errors import BadArgument, Refused

_FEWEST = 16
"""Fewest queries worth a kernel of their own."""


def columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    selection: Selection | Sequence[Selection] = ALL,
    geometry: Geometry | None = None,
    *,
    visible: Sequence[Span] = (),
    scale: float | None = None,
    softcap: float | None = None,
    valid: Tensor | None = None,
    each: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Column sums of the attention map: for each key, the probabilities exp(score - lse) of all queries that read it.

    Goes query block by query block; no buffer grows with N x M. Parts of one read whose queries stand at different
    angles (a frame) take one call each, with the queries of the part and the lse of the whole: the sums add up.

    Args:
        q: [B, H, N, Dk]; k: [B, Hk, M, Dk], query head h reads head h // (H / Hk).
        lse: [B, H, N], of the whole read, all parts merged; -inf where a query saw nothing.
        selection: the pairs that were read; several must be disjoint.
        geometry, visible, scale, softcap: as given to `attend`.
        valid: int [B], how many of the N queries count in each row; None: all.
        each: a sum for each query head, instead of one for its group.
        backend: "triton" for the kernel, which serves dense reads on CUDA unasked, or "torch"; None: whichever can.

    Returns:
        [B, Hk or H, M] float32 (float64 for float64), summed over the queries and the query heads of each group. The
        sum over M is the number of queries that count, times H / Hk.

    Raises:
        BadArgument: shapes that do not fit each other, or no such backend.
        Refused: the kernel cannot serve this read.

    Source: accumulated attention scores of H2O (Zhang et al. 2023, section 4), computed here from lse.
    """
    (batch, heads, queries, k_dim), (k_heads, keys) = q.shape, k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != k_dim or heads % k_heads:
        raise BadArgument("k", tuple(k.shape), f"it must fit q {tuple(q.shape)}")
    if lse.shape != q.shape[:3]:
        raise BadArgument("lse", tuple(lse.shape), f"one number per query: {tuple(q.shape[:3])}")
    if valid is not None and valid.shape != (batch,):
        raise BadArgument("valid", tuple(valid.shape), f"one number per row: ({batch},)")
    geometry = geometry or Geometry(batch, queries, keys, device=q.device)
    selections = (selection,) if isinstance(selection, Selection) else tuple(selection)
    factor = k_dim**-0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(batch, heads if each else k_heads, keys, dtype=wide, device=q.device)
    if 0 in q.shape or keys == 0:
        return out
    if backend not in (None, "triton", "torch"):
        raise BadArgument("backend", backend, "choose one of triton, torch")
    if backend != "torch":
        reason = machine(q, backend is not None) or _beyond_kernel(q, k, selections, visible)
        if backend is not None and reason:
            raise Refused(f"the kernel cannot sum these columns: {reason}")
        if not reason and (backend is not None or queries >= _FEWEST):
            from foveate.attention.triton.block_sparse_tiles import Place
            from foveate.attention.triton.columns import column_sums

            at = Place(geometry.first, geometry.lengths)
            return column_sums(q, k, lse, scale=factor, softcap=softcap, at=at, valid=valid, each=each)
    turned = k.to(wide).transpose(-1, -2)
    step = max(1, SCORES // (batch * heads * keys))
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        end = keys - queries + stop if geometry.plain else keys
        mask = _union(selections, geometry, visible, start, stop)[..., :end]
        rows = q[:, :, start:stop].to(wide)
        scores = (fold(rows, k_heads) @ turned[..., :end]).mul_(factor).view(batch, heads, stop - start, end)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        mass = lse[:, :, start:stop].to(wide)
        counts = mass > -torch.inf
        if valid is not None:
            counts = counts & (torch.arange(start, stop, device=q.device) < valid.view(-1, 1, 1))
        scores = scores.sub_(torch.where(counts, mass, torch.inf).unsqueeze(-1))
        weights = scores.masked_fill_(~to_heads(mask, heads), -torch.inf).exp_()
        out[..., :end] += weights.view(batch, out.shape[1], -1, end).sum(2)
    return out


def _beyond_kernel(q: Tensor, k: Tensor, selections: Sequence[Selection], visible: Sequence[Span]) -> str:
    spans = [*visible, *(selection.span for selection in selections if selection.span is not None)]
    if len(selections) > 1 or any(x.lists is not None for x in selections) or not all(x.unbounded for x in spans):
        return "it reads all causal pairs"
    if q.stride(3) != 1 or k.stride(3) != 1:
        return "numbers of one head must lie side by side"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "it has no gradients"
    return ""


def _union(
    selections: Sequence[Selection], geometry: Geometry, visible: Sequence[Span], start: int, stop: int
) -> Tensor:
    """What queries start..stop-1 read of all selections together: bool [1 or B, 1, Hk or H, stop - start, M]."""
    rows = geometry.rows(start, stop)
    masks = [selection.rows(start, stop).seen(rows, visible) for selection in selections]
    heads = max(mask.shape[1] for mask in masks)
    union = to_heads(masks[0], heads)
    for mask in masks[1:]:
        union = union | to_heads(mask, heads)
    return union
