"""The largest estimated logit in each pair of blocks, from low-bit codes, by whole-number matrix products."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.block_sparse_tiles import jit

BLOCKS = (16, 32, 64, 128)
"""Sizes of blocks that the kernel knows."""
ROWS = 256
"""Queries of a program."""


def code_peaks(
    q: tuple[Tensor, Tensor, Tensor],
    k: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    q_block: int,
    k_block: int,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Largest of (codes_q . codes_k scale_q scale_k + add_q + add_k) * scale - lse in each pair of blocks.

    Args:
        q: codes int8 [H, n, D], scales float32 [H, n] and what is added per query, float32 [H, n].
        k: codes int8 [Hs, m, D], scales float32 [Hs, m] and what is added per key and query head, float32 [H, m].
        lse: float32 [H, n]; the n queries are the last of m keys.
        q_block, k_block: of `BLOCKS`.
        softcap: as given to `attend`.

    Returns:
        float32 [H, query blocks, key blocks]; -inf where a block is in the future alone. Pairs in the future count in
        the other blocks.
    """
    (heads, n, dim), (stores, m) = q[0].shape, k[0].shape[:2]
    peaks = torch.full((heads, -(-n // q_block), -(-m // k_block)), -torch.inf, device=lse.device)
    q_codes, q_scale, q_add, k_codes, k_scale, k_add, lse = (x.contiguous() for x in (*q, *k, lse.float()))
    # Several query blocks share what is fetched of the keys: with one alone the L2 cache would be the limit.
    rows = max(ROWS, q_block)
    shared = -(-n // rows)
    _peaks[(heads * shared,)](
        q_codes, q_scale, q_add, k_codes, k_scale, k_add, lse, peaks, n, m, shared, peaks.shape[1], peaks.shape[2],
        scale, 2.8853900817779268 * scale / softcap if softcap is not None else 0.0, softcap or 0.0,
        GROUP=heads // stores, D=dim, WIDE=max(32, 1 << (dim - 1).bit_length()), CAP=softcap is not None,
        BM=rows, BN=128, Q_BLOCK=q_block, K_BLOCK=k_block, num_warps=8, num_stages=3,
    )  # fmt: skip
    return peaks


@jit
def _peaks(
    q_ptr, q_scale_ptr, q_add_ptr, k_ptr, k_scale_ptr, k_add_ptr, lse_ptr, peaks_ptr, n, m, shared, q_blocks, k_blocks,
    scale, factor, cap,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid // shared
    # Late blocks see most: they run first.
    part = shared - 1 - pid % shared
    i = part * BM + tl.arange(0, BM)
    d = tl.arange(0, WIDE)
    real = i < n
    flat = head.to(tl.int64) * n + i
    q = tl.load(q_ptr + flat[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0)
    q_scale = tl.load(q_scale_ptr + flat, mask=real, other=0.0)
    q_add = tl.load(q_add_ptr + flat, mask=real, other=0.0)
    # A row that does not exist, or that found nothing, is compared with everything.
    lse = tl.load(lse_ptr + flat, mask=real, other=float("inf"))
    block = part * (BM // Q_BLOCK) + tl.arange(0, BM // Q_BLOCK)
    ends = tl.minimum(m - n + tl.minimum(block * Q_BLOCK + Q_BLOCK, n), m)
    stop = tl.minimum(m - n + tl.minimum(part * BM + BM, n), m)
    base = (head // GROUP).to(tl.int64) * m
    out = peaks_ptr + (head.to(tl.int64) * q_blocks + block) * k_blocks
    for t in range(tl.cdiv(stop, BN)):
        j = t * BN + tl.arange(0, BN)
        held = j < m
        k_at = k_ptr + (base + j)[:, None] * D + d[None, :]
        k = tl.load(k_at, mask=held[:, None] & (d < D)[None, :], other=0)
        k_scale = tl.load(k_scale_ptr + base + j, mask=held, other=0.0)
        k_add = tl.load(k_add_ptr + head.to(tl.int64) * m + j, mask=held, other=float("-inf"))
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        s = (s * k_scale[None, :]) * q_scale[:, None] + k_add[None, :]
        # The keys of a block are neighbours in a thread's registers; what is left for each query is the same for all of
        # them, and grows with the logit.
        s = tl.max(tl.reshape(s, (BM, BN // K_BLOCK, K_BLOCK)), 2) + q_add[:, None]
        s = cap - 2 * cap / (tl.exp2(s * factor) + 1) if CAP else s * scale
        best = tl.max(tl.reshape(s - lse[:, None], (BM // Q_BLOCK, Q_BLOCK, BN // K_BLOCK)), 1)
        number = t * (BN // K_BLOCK) + tl.arange(0, BN // K_BLOCK)
        keep = (number[None, :] * K_BLOCK < ends[:, None]) & (block < q_blocks)[:, None]
        tl.store(out[:, None] + number[None, :], best, mask=keep)
