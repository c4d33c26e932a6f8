"""Probes: cheap looks at where a prompt's attention goes."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.methods.policies.lists import coverage_count


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


def causal_blocks(m: int, n: int, size: int, device: torch.device) -> Tensor:
    """Which blocks of `size` keys each block of queries sees a key of, bool [query blocks, key blocks]: the n queries
    are the last of the m keys."""
    end = torch.arange(-(-n // size), device=device).add(1).mul(size).clamp_max(n)
    newest = (m - n + end - 1) // size
    return torch.arange(-(-m // size), device=device) <= newest[:, None]


def line_blocks(
    vertical: Tensor,
    slash: Tensor,
    least_only: Tensor,
    causal: Tensor,
    bounds: tuple[int, int | None],
    block: int,
    gamma: float,
    *,
    whole: bool,
) -> Tensor:
    """Block columns and block diagonals that cover the share `gamma` of a probe, bool [H, query blocks, key blocks].

    Args:
        vertical, slash: [H, m], as of `probe_lines`.
        least_only: bool [H], heads that get the least number of both.
        causal: bool [query blocks, key blocks], as of `causal_blocks`.
        bounds: least and most blocks of either kind; None: all there are.
        whole: the queries are those of all keys. A piece of a prompt need not start on a block border: its own tokens
            then lie on two block diagonals.

    Source: FlexPrefill (2502.20766), algorithm 2; released code for the budget rule.
    """
    columns, diagonals = block_sum(vertical, block), block_sum(slash, block)
    blocks = columns.shape[1]
    least = min(blocks, max(1, bounds[0]))
    most = blocks if bounds[1] is None else max(least, min(blocks, bounds[1]))
    chosen = []
    for tokens, mass, forced in ((vertical, columns, 1), (slash, diagonals, 1 if whole else 2)):
        budget = (coverage_count(tokens, gamma) // block + 1).clamp(least, most)
        budget = torch.where(least_only, least, budget)
        first = mass.clone()
        first[:, :forced] = torch.inf
        rank = first.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen.append(rank < budget[:, None])
    upright, leaning = chosen
    distance = causal.sum(1, keepdim=True) - 1 - torch.arange(blocks, device=causal.device)
    diagonal = leaning[:, distance.clamp_min(0)] & (distance >= 0)
    return (upright[:, None] | diagonal) & causal


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) of distributions [..., n]."""
    middle = (p + q) / 2
    gap = (torch.xlogy(p, p) - torch.xlogy(p, middle) + torch.xlogy(q, q) - torch.xlogy(q, middle)).sum(-1) / 2
    return gap.clamp_min(0).sqrt()
