"""The slow, obvious truth that every backend is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention.selection import ALL, Geometry, Partial, Selection, Span


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection = ALL,
    geometry: Geometry | None = None,
    *,
    k_map: Sequence[int] | None = None,
    v_map: Sequence[int] | None = None,
    scale: float | None = None,
    visible: Sequence[Span] = (),
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Partial:
    """What `attend` must give, one head at a time, with the whole mask and all scores in memory.

    Computes in the dtype of q (give it float64) and takes the arguments of `attend`, which see.

    Returns:
        out [B, H, N, Dv], lse [B, H, N]; where a query sees nothing, out is 0 and lse is -inf.
    """
    (batch, heads, queries, k_dim), (k_heads, keys) = q.shape, k.shape[1:3]
    geometry = geometry or Geometry(batch, queries, keys, device=q.device)
    factor = k_dim**-0.5 if scale is None else scale
    outs, masses = [], []
    for h in range(heads):
        store = h // (heads // k_heads) if k_map is None else k_map[h]
        values = v[:, h // (heads // v.shape[1]) if v_map is None else v_map[h]]
        # Expanded over store heads as if each were one query head, the mask of this head is plain to read off.
        lists = selection.lists
        own = selection
        if lists is not None and lists.shape[1] == heads:
            own = Selection(lists[:, h : h + 1], selection.q_block, selection.k_block, selection.span)
        seen = own.mask(geometry, k_heads, visible)[:, store]
        scores = q[:, h] @ k[:, store].transpose(-1, -2) * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, h if bias.shape[1] == heads else store if bias.shape[1] > 1 else 0]
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        anchor = torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)
        outs.append((scores - anchor).exp() @ values)
        masses.append(lse)
    return Partial(torch.stack(outs, dim=1), torch.stack(masses, dim=1))
