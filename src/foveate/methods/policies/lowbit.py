"""Logits from 4-bit queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.attention.triton_prefill import machine


def low_bit(x: Tensor, tile: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Symmetric codes of x [H, n, D]: whole numbers in float32, and a scale per token [H, n] that `tile` neighbouring
    tokens share. codes * scale is off by at most half a scale.

    Source: absolute-maximum quantisation, 2^(bits - 1) - 1 levels to each side, as in SALE (2505.24179).
    """
    top = 2 ** (bits - 1) - 1
    n = x.shape[1]
    peak = F.pad(x.abs().amax(-1), (0, -n % tile)).unflatten(-1, (-1, tile)).amax(-1)
    scale = (peak / top).repeat_interleave(tile, dim=-1)[:, :n]
    safe = torch.where(scale > 0, scale, 1.0)
    return (x / safe.unsqueeze(-1)).round().clamp(-top, top), scale


def split_bits(codes: Tensor, low: int) -> tuple[Tensor, Tensor]:
    """Whole numbers as (most, least significant bits) of their two's complement: most * 2^low + least = codes, and
    least is in 0..2^low - 1."""
    most = torch.floor(codes / 2**low)
    return most, codes - most * 2**low


def rough_and_fine(x: Tensor, msb: int, lsb: int) -> tuple[Tensor, Tensor]:
    """x [B, H, n, D] in msb + lsb bits, a scale per vector: what its upper bits alone say, and all of them, float32."""
    codes, scale = low_bit(x.flatten(0, 1).float(), 1, msb + lsb)
    most, least = split_bits(codes, lsb)
    rough, fine = (y * scale.unsqueeze(-1) for y in (most * 2**lsb, most * 2**lsb + least))
    return rough.view_as(x), fine.view_as(x)


@torch.no_grad()
def block_peaks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    q_block: int,
    k_block: int,
    tile: int,
    scale: float,
    softcap: float | None = None,
    kernel: bool | None = None,
) -> Tensor:
    """The largest of (estimated logit - lse of its query) in each pair of blocks, float32 [H, query, key blocks].

    Queries and keys are centred before they are coded; what that takes away is put back exactly (a number per query and
    one per key), so the estimates are of the logits themselves. Pairs in the future count in blocks on the diagonal;
    blocks in the future alone are -inf or may hold anything.

    Args:
        q: [H, n, D]; k: [Hs, m, D], shared by the H / Hs query heads of a group; the n queries are the last of m keys.
        lse: [H, n], what the logits of each query are compared with.
        kernel: multiply by the Triton kernel; None: on CUDA, for blocks that it knows.
    """
    heads, n = lse.shape
    stores, m = k.shape[:2]
    q, k, group = q.float(), k.float(), heads // stores
    mean_q, mean_k = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
    per_key = (mean_q.unflatten(0, (stores, group)).squeeze(2) @ (k - mean_k).mT).flatten(0, 1)
    per_query = (q.unflatten(0, (stores, group)) @ mean_k.unsqueeze(1).mT).flatten(0, 1)
    codes_q, scale_q = low_bit(q - mean_q, tile)
    codes_k, scale_k = low_bit(k - mean_k, tile)
    if kernel or (kernel is None and _has_kernel(q, q_block, k_block, scale)):
        from foveate.attention.triton.low_bit import code_peaks

        asked = (codes_q.to(torch.int8), scale_q, per_query.squeeze(-1))
        held = (codes_k.to(torch.int8), scale_k, per_key)
        return code_peaks(asked, held, lse, q_block, k_block, scale=scale, softcap=softcap, tile=tile)
    scale_k = scale_k.repeat_interleave(group, dim=0).unsqueeze(1)
    peaks = q.new_full((heads, -(-n // q_block), -(-m // k_block)), -torch.inf)
    step = max(1, at_once(q.device) // (heads * m * q_block)) * q_block
    for start in range(0, n, step):
        stop = min(start + step, n)
        end = min(m, -(-(m - n + stop) // k_block) * k_block)
        part = codes_q[:, start:stop].unflatten(0, (stores, group)).flatten(1, 2) @ codes_k[:, :end].mT
        part = part.view(heads, stop - start, end) * scale_q[:, start:stop, None] * scale_k[..., :end]
        part = (part + per_query[:, start:stop] + per_key[:, None, :end]) * scale
        if softcap is not None:
            part = torch.tanh(part / softcap) * softcap
        part = part - lse[:, start:stop, None].float()
        part = F.pad(part, (0, -end % k_block, 0, (start - stop) % q_block), value=-torch.inf)
        part = part.unflatten(2, (-1, k_block)).amax(-1).unflatten(1, (-1, q_block)).amax(2)
        peaks[:, start // q_block : start // q_block + part.shape[1], : part.shape[2]] = part
    return peaks


def _has_kernel(q: Tensor, q_block: int, k_block: int, scale: float) -> bool:
    if scale <= 0 or machine(q.unsqueeze(0), forced=False):
        return False
    from foveate.attention.triton.low_bit import BLOCKS

    return q_block in BLOCKS and k_block in BLOCKS
