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
        q: [H, n, D], k: [H, m, D]; the n queries are the last of the m keys.

    Returns:
        [H, rows, m].
    """
    m = k.shape[1]
    logits = capped(q[:, -rows:].float() @ k.float().transpose(1, 2) * scale, softcap)
    own = torch.arange(m - rows, m, device=q.device)
    future = torch.arange(m, device=q.device) > own[:, None]
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def probe_lines(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean mass per key (vertical lines) and per distance (slashes) of the probed rows.

    Args:
        rows: [H, r, m] as `last_rows` gives them.

    Returns:
        vertical [H, m] over keys, slash [H, m] over distances 0 .. m-1. Both sum to 1 over what the rows saw.
    """
    heads, r, m = rows.shape
    key = torch.arange(m - r, m, device=rows.device)[:, None] - torch.arange(m, device=rows.device)
    at = rows.gather(2, key.clamp_min(0).expand(heads, -1, -1)).masked_fill(key < 0, 0.0)
    return rows.mean(1), at.mean(1)


def block_mean(x: Tensor, size: int) -> Tensor:
    """Means of consecutive blocks of x [H, n, D]; the last block is the mean of what it has. float32 [H, blocks, D]."""
    n = x.shape[1]
    blocks = -(-n // size)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * size - n)).view(x.shape[0], blocks, size, -1)
    count = torch.full((blocks, 1), size, device=x.device, dtype=torch.float32)
    count[-1] = n - (blocks - 1) * size
    return padded.sum(2) / count


def block_sum(x: Tensor, size: int) -> Tensor:
    """Sums of consecutive blocks of x [H, n]: [H, blocks]."""
    blocks = -(-x.shape[1] // size)
    return torch.nn.functional.pad(x, (0, blocks * size - x.shape[1])).view(x.shape[0], blocks, size).sum(2)
