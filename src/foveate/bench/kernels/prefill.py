"""Prompts: dense causal attention, and block-sparse attention over random lists."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.attention import Geometry, Selection, attend
from foveate.attention.selection import ALL
from foveate.bench.kernels import rivals
from foveate.bench.kernels.case import Answer, Case, Check, Kernel, Made, compare, has_kernels
from foveate.bench.kernels.sizes import Sizes
from foveate.bench.kernels.truth import rows_of, some_rows, truth
from foveate.bench.tiles import tiles

Q_BLOCK = 128
"""Queries that share a list."""
K_BLOCKS = (128, 64, 16)
DENSITIES = (0.05, 0.1, 0.25)
TILE = 128
"""Queries and keys of the tiles whose number bounds the speed-up."""


def dense(sizes: Sizes, device: torch.device) -> list[Case]:
    """Every causal pair."""
    return [Case("prefill", "all causal pairs", n, lambda g, n=n: _dense(sizes, n, g)) for n in sizes.lengths]


def block_sparse(sizes: Sizes, device: torch.device) -> list[Case]:
    """Listed blocks, the first one and those of the queries themselves among them."""
    return [
        Case(
            "block-sparse",
            f"{100 * density:.0f} % of blocks of {Q_BLOCK} x {k_block}",
            n,
            lambda g, n=n, d=density, b=k_block: _block_sparse(sizes, n, d, b, g),
            dense="prefill",
        )
        for n in reversed(sizes.lengths)  # the longest first, in case time runs out
        for k_block in K_BLOCKS
        for density in DENSITIES
    ]


def _draw(sizes: Sizes, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, n, D] and k, v [1, Hk, n, D]; attention is neither flat nor on one key."""

    def normal(heads: int) -> Tensor:
        shape = (1, heads, n, sizes.head_dim)
        return torch.randn(shape, generator=generator, device=generator.device, dtype=sizes.dtype)

    return 1.5 * normal(sizes.heads), normal(sizes.kv_heads), normal(sizes.kv_heads)


def _work(sizes: Sizes, n: int, pairs: float) -> tuple[float, float]:
    """Bytes and operations: everything read and written once, and a product for scores and for values."""
    moved = 2 * n * (sizes.heads + sizes.kv_heads) * sizes.head_dim * sizes.itemsize
    return moved, 4 * sizes.head_dim * pairs


def _check(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, generator: torch.Generator
) -> Callable[[Answer], Check]:
    pieces = some_rows(q.shape[2], generator)
    out, lse = truth(q, k, v, pieces, selection)

    def check(answer: Answer) -> Check:
        whole, mass = (answer[0], answer[1]) if isinstance(answer, tuple) else (answer, None)
        some = rows_of(whole, pieces)
        return compare(some if mass is None else (some, rows_of(mass, pieces)), out, lse, q.dtype, whole)

    return check


def _dense(sizes: Sizes, n: int, generator: torch.Generator) -> Made:
    q, k, v = _draw(sizes, n, generator)
    nbytes, flops = _work(sizes, n, sizes.heads * n * (n + 1) / 2)
    kernels = [
        Kernel("foveate attend", lambda: attend(q, k, v, lse=False).out),
        Kernel("foveate attend, with lse", lambda: attend(q, k, v)),
        *rivals.prefill(q, k, v),
    ]
    return Made(kernels, _check(q, k, v, ALL, generator), nbytes, flops)


def _block_sparse(sizes: Sizes, n: int, density: float, k_block: int, generator: torch.Generator) -> Made:
    q, k, v = _draw(sizes, n, generator)
    lists = random_lists(sizes.heads, n, k_block, density, generator)
    selection = Selection(lists, Q_BLOCK, k_block)
    found = tiles(selection, Geometry(1, n, n, device=q.device), sizes.heads, TILE, TILE)
    nbytes, flops = _work(sizes, n, found.pairs)
    if has_kernels(q.device):
        kernels = [Kernel("foveate triton", lambda: attend(q, k, v, selection, backend="triton"))]
        kernels += rivals.block_sparse(q, k, v, lists, Q_BLOCK, k_block)
    else:
        kernels = [
            Kernel("foveate gather", lambda: attend(q, k, v, selection, backend="gather")),
            Kernel("foveate sdpa, masked", lambda: attend(q, k, v, selection, backend="sdpa")),
            *rivals.uncompiled(lambda: attend(q, k, v, selection, backend="flex"), n),
        ]
    check = _check(q, k, v, selection, generator)
    share = found.pairs / found.causal_pairs
    facts = {"tiles": {"q": TILE, "k": TILE, **found.as_json()}}
    return Made(kernels, check, nbytes + 4 * lists.numel(), flops, share, facts)


def random_lists(heads: int, n: int, k_block: int, density: float, generator: torch.Generator) -> Tensor:
    """Ascending lists int32 [1, heads, n / 128, K], padded with -1: of each row of blocks that share, the first block
    and those of the queries always, the others by lot."""
    device = generator.device
    row, col = torch.arange(n // Q_BLOCK, device=device), torch.arange(n // k_block, device=device)
    own, end = row * Q_BLOCK // k_block, (row + 1) * Q_BLOCK // k_block
    count = torch.maximum((density * end).round().long(), end - own + 1).clamp(max=end)
    width = int(count.max())
    place = torch.arange(width, device=device)
    made = []
    for _ in range(heads):
        lot = torch.rand(len(row), len(col), generator=generator, device=device)
        lot[:, 0] = 2.0
        lot[(col >= own[:, None]) & (col < end[:, None])] = 2.0
        lot[col >= end[:, None]] = -1.0
        best = lot.topk(width, dim=1).indices
        best = best.masked_fill(place >= count[:, None], len(col)).sort(dim=1).values
        made.append(best.masked_fill(best == len(col), -1).int())
    return torch.stack(made).unsqueeze(0)
