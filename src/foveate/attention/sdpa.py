"""The dense backend: PyTorch's scaled dot product attention over all keys, under a mask where one is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.attention.kernel import ends_with_keys, softmax_attention
from foveate.attention.request import Request
from foveate.attention.scores import score_attention, to_heads
from foveate.attention.selection import Partial

name = "sdpa"

_PIECE = 256
"""Fewest queries that a masked read is cut into."""


def can_run(request: Request) -> tuple[bool, str]:
    """Anything, since a mask says everything; but unless it is forced it leaves lists to backends that skip."""
    if request.lists is not None and not request.forced:
        return False, "lists are read in full here, under a mask"
    return True, ""


def run(request: Request) -> Partial:
    """Dense reads by the kernel's own causality, other reads under a mask, query block by query block."""
    r = request
    if r.dense and r.geometry.plain and not r.math:
        queries, keys = r.q.shape[2], r.k.shape[2]
        if queries == 1 or queries == keys or ends_with_keys(r.q, r.v):
            return everything(r.q, r.k, r.v, r.scale, r.lse)
    return _masked(r)


def is_best(q: Tensor, keys: int) -> bool:
    """Whether a read of all causal pairs may come here unasked: no other backend serves it on this device."""
    return q.device.type == "cpu" and q.shape[2] in (1, keys)


def everything(q: Tensor, k: Tensor, v: Tensor, scale: float, lse: bool) -> Partial:
    """All causal pairs: of one query, of as many queries as keys, or where the kernel knows which ones come last."""
    out, mass = softmax_attention(q, k, v, scale=scale, causal=q.shape[2] > 1, lse=lse)
    return Partial(out, mass)  # type: ignore[arg-type]


def _masked(r: Request) -> Partial:
    batch, heads, k_heads, queries, keys = r.shape
    held = heads if r.math or (r.lists is not None and r.lists.shape[1] == heads) else k_heads
    step = max(1, min(queries, at_once(r.q.device) // (batch * held * keys)))
    if r.geometry.plain:
        # The kernel cannot skip the future under a mask; pieces that end at their last query can.
        step = min(step, max(_PIECE, -(-queries // 8)))
    parts = [_rows(r, start, min(start + step, queries)) for start in range(0, queries, step)]
    if len(parts) == 1:
        return parts[0]
    out = torch.cat([part.out for part in parts], dim=2)
    return Partial(out, torch.cat([part.lse for part in parts], dim=2) if r.lse else None)  # type: ignore[arg-type]


def _rows(r: Request, start: int, stop: int) -> Partial:
    """Queries start..stop-1 under their mask."""
    queries, keys = r.q.shape[2], r.k.shape[2]
    heads, k_heads = r.q.shape[1], r.k.shape[1]
    q, k, v = r.q[:, :, start:stop], r.k, r.v
    mask: Tensor | None = r.seen(start, stop)
    if r.geometry.plain:
        end = keys - queries + stop
        k, v, mask = k[:, :, :end], v[:, :, :end], mask[..., :end]
    if r.math:
        bias = r.bias
        if bias is not None:
            bias = to_heads(bias, heads)
            bias = bias if bias.shape[2] == 1 else bias[:, :, start:stop]
            bias = bias if bias.shape[3] == 1 else bias[..., : k.shape[2]]
        out, lse = score_attention(q, k, v, scale=r.scale, mask=to_heads(mask, heads), bias=bias, softcap=r.softcap)
        return Partial(out, lse)
    if stop - start == 1 and mask.shape[1] <= k_heads and heads != k_heads:
        # One query: its group becomes the rows of one matrix, so that K, V and the mask are read once per store head.
        folded = q.reshape(q.shape[0], k_heads, heads // k_heads, q.shape[-1])
        out, lse = softmax_attention(folded, k, v, scale=r.scale, mask=mask, lse=r.lse)
        out = out.reshape(*q.shape[:3], v.shape[-1])
        return Partial(out, lse.reshape(q.shape[:3]) if lse is not None else None)  # type: ignore[arg-type]
    out, lse = softmax_attention(q, k, v, scale=r.scale, mask=to_heads(mask, heads), lse=r.lse)
    return Partial(out, lse)  # type: ignore[arg-type]
