"""Probes: cheap looks at where a prompt's attention goes."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits under the model's softcap, if it has one."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def last_rows(q: Tensor, k: Tensor, rows: int, scale: float, softcap: float | None = None) -> Tensor:
    """Attention of the last `rows` queries over all keys of one sequence, float32.

    Args:
        q: [H, n, D], k: [Hk, m, D], H a multiple of Hk; the n queries are the last of the m keys.

    Returns:
        [H, rows, rows - 1 + m]: zeros for as many keys before the first as `probe_lines` wants, then the m keys.
    """
    heads, (k_heads, m, dim) = q.shape[0], k.shape
    last = (q[:, -rows:].float() * scale).reshape(k_heads, -1, dim)
    keys = k.new_zeros(k_heads, rows - 1 + m, dim, dtype=torch.float32)
    keys[:, rows - 1 :] = k
    logits = capped(last @ keys.transpose(1, 2), softcap).view(heads, rows, -1)
    logits[..., : rows - 1] = -torch.inf
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    logits[..., m - 1 :].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


def probe_lines(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean mass per key (vertical lines) and per distance (slashes) of the probed rows.

    Args:
        rows: [H, r, r - 1 + m] as `last_rows` gives them.

    Returns:
        vertical [H, m] over keys, slash [H, m] over distances 0 .. m-1. Both sum to 1 over what the rows saw.
    """
    heads, r, width = rows.shape
    m = width - r + 1
    # Each row begins a number later than the one before, so that a distance is a column.
    leaning = rows.contiguous().as_strided((heads, r, m), (r * width, width + 1, 1))
    return rows[..., r - 1 :].mean(1), leaning.mean(1).flip(-1)


def block_mean(x: Tensor, size: int) -> Tensor:
    """Means of consecutive blocks of x [H, n, D]; the last block is the mean of what it has. float32 [H, blocks, D]."""
    whole = x.shape[1] // size
    means = x[:, : whole * size].unflatten(1, (whole, size)).mean(2, dtype=torch.float32)
    rest = x[:, whole * size :]
    return torch.cat([means, rest.mean(1, keepdim=True, dtype=torch.float32)], dim=1) if rest.shape[1] else means


def block_sum(x: Tensor, size: int) -> Tensor:
    """Sums of consecutive blocks of x [H, n]: [H, blocks]."""
    blocks = -(-x.shape[1] // size)
    return torch.nn.functional.pad(x, (0, blocks * size - x.shape[1])).view(x.shape[0], blocks, size).sum(2)
