"""The largest estimated logit in each pair of blocks, from low-bit codes, by whole-number matrix products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.block_sparse_tiles import jit

BLOCKS = (16, 32, 64, 128)
"""Sizes of blocks that the kernel knows."""
ROWS = 256
"""Queries of a program."""
COLUMNS = 64
"""Keys of a step: few enough that two programs share a processor, one's products running under the other's maxima."""
SHARE = 16
"""Most neighbouring keys whose scale is multiplied with that of a query once."""


def code_peaks(
    q: tuple[Tensor, Tensor, Tensor],
    k: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    q_block: int,
    k_block: int,
    *,
    scale: float,
    softcap: float | None = None,
    tile: int = 1,
) -> Tensor:
    """Largest of (codes_q . codes_k scale_q scale_k + add_q + add_k) * scale - lse in each pair of blocks.

    Args:
        q: codes int8 [H, n, D], scales float32 [H, n] and what is added per query, float32 [H, n].
        k: codes int8 [Hs, m, D], scales float32 [Hs, m] and what is added per key and query head, float32 [H, m].
        lse: float32 [H, n]; the n queries are the last of m keys.
        q_block, k_block: of `BLOCKS`.
        softcap: as given to `attend`.
        tile: so many neighbouring keys share a scale, from the first one on.

    Returns:
        float32 [H, query blocks, key blocks]; -inf where a block is in the future alone. Pairs in the future count in
        the other blocks.
    """
    (heads, n, dim), (stores, m) = q[0].shape, k[0].shape[:2]
    peaks = torch.full((heads, -(-n // q_block), -(-m // k_block)), -torch.inf, device=lse.device)
    q_codes, q_scale, q_add, k_codes, lse = (x.contiguous() for x in (*q, k[0], lse.float()))
    # Several query blocks share what is fetched of the keys: with one alone the L2 cache would be the limit.
    rows, columns = max(ROWS, q_block), max(COLUMNS, k_block)
    shared = -(-n // rows)
    same = math.gcd(tile, SHARE)
    # Whole tiles, so that no step asks what is there.
    short = -m % columns
    k_scale = F.pad(k[1], (0, short))[:, ::same].contiguous()
    k_add = F.pad(k[2], (0, short), value=-torch.inf)
    _peaks[(heads * shared,)](
        q_codes, q_scale, q_add, k_codes, k_scale, k_add, lse, peaks, n, m, m + short, shared, peaks.shape[1],
        peaks.shape[2], scale, 2.8853900817779268 * scale / softcap if softcap is not None else 0.0, softcap or 0.0,
        GROUP=heads // stores, D=dim, WIDE=max(32, 1 << (dim - 1).bit_length()), CAP=softcap is not None,
        BM=rows, BN=columns, Q_BLOCK=q_block, K_BLOCK=k_block, SHARE=same, STAGES=3, num_warps=8, num_stages=3,
        maxnreg=128 if columns == COLUMNS else None,
    )  # fmt: skip
    return peaks


@jit
def _peaks(
    q_ptr, q_scale_ptr, q_add_ptr, k_ptr, k_scale_ptr, k_add_ptr, lse_ptr, peaks_ptr, n, m, wide, shared, q_blocks,
    k_blocks, scale, factor, cap,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, SHARE: tl.constexpr, STAGES: tl.constexpr,
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
    ends = tl.where(block < q_blocks, ends, 0)
    stop = tl.minimum(m - n + tl.minimum(part * BM + BM, n), m)
    store = (head // GROUP).to(tl.int64)
    k_base = k_ptr + store * m * D
    scale_base = k_scale_ptr + store * (wide // SHARE) + tl.arange(0, BN // SHARE)
    add_base = k_add_ptr + head.to(tl.int64) * wide + tl.arange(0, BN)
    out = peaks_ptr + (head.to(tl.int64) * q_blocks + block) * k_blocks
    for t in tl.range(0, tl.cdiv(stop, BN), num_stages=STAGES):  # type: ignore[general]
        j = tl.minimum(t * BN + tl.arange(0, BN), m - 1)
        k_at = k_base + j.to(tl.int64)[:, None] * D + d[None, :]
        k = tl.load(k_at) if D == WIDE else tl.load(k_at, mask=(d < D)[None, :], other=0)
        k_scale = tl.load(scale_base + t * (BN // SHARE))
        k_add = tl.load(add_base + t * BN)
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        s = tl.reshape(s, (BM, BN // SHARE, SHARE)) * (q_scale[:, None] * k_scale[None, :])[:, :, None]
        s += tl.reshape(k_add, (BN // SHARE, SHARE))[None, :, :]
        # The keys of a block are neighbours in a thread's registers; what is left for each query is the same for all of
        # them, and grows with the logit.
        s = tl.max(tl.reshape(s, (BM, BN // K_BLOCK, K_BLOCK)), 2) + q_add[:, None]
        s = cap - 2 * cap / (tl.exp2(s * factor) + 1) if CAP else s * scale
        best = tl.max(tl.reshape(s - lse[:, None], (BM // Q_BLOCK, Q_BLOCK, BN // K_BLOCK)), 1)
        number = t * (BN // K_BLOCK) + tl.arange(0, BN // K_BLOCK)
        tl.store(out[:, None] + number[None, :], best, mask=number[None, :] * K_BLOCK < ends[:, None])
