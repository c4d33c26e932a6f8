"""Attention in float32, written out, for the queries that are checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention.scores import score_attention, to_heads
from foveate.attention.selection import ALL, Geometry, Selection

_AT_ONCE = 1 << 28
"""Most scores (heads x queries x keys) in memory."""


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[tuple[int, int]],
    selection: Selection = ALL,
    geometry: Geometry | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Out and lse of queries start..stop-1 of each piece, one behind the other.

    Args:
        q: [B, H, N, Dk]; k: [B, Hk, M, Dk]; v: [B, Hk, M, Dv].
    """
    g = geometry or Geometry(q.shape[0], q.shape[2], k.shape[2], device=q.device)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.float(), v.float()
    step = max(1, _AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for begin, end in pieces:
        for start in range(begin, end, step):
            stop = min(start + step, end)
            mask = to_heads(selection.rows(start, stop).seen(g.rows(start, stop)), q.shape[1])
            parts.append(score_attention(q[:, :, start:stop].float(), k, v, scale=factor, mask=mask))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def some_rows(queries: int, generator: torch.Generator, *, pieces: int = 4, rows: int = 16) -> list[tuple[int, int]]:
    """A few runs of queries at random places, and the first and the last of all."""
    rows = min(rows, queries)
    starts = torch.randint(0, queries - rows + 1, (pieces,), generator=generator, device=generator.device).tolist()
    return [(start, start + rows) for start in sorted({0, *starts, queries - rows})]


def rows_of(x: Tensor, pieces: Sequence[tuple[int, int]]) -> Tensor:
    """The checked queries of an output or of its lse, [B, H, N, ...]."""
    return torch.cat([x[:, :, start:stop] for start, stop in pieces], dim=2)
