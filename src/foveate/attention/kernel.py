"""Softmax attention over all given keys by PyTorch's own kernels, with lse. Their private names live here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate.attention.at_once import at_once


def _op(name: str) -> Callable[..., Any] | None:
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else packet.default


_FLASH_CPU = _op("_scaled_dot_product_flash_attention_for_cpu")
_FLASH_CUDA = _op("_scaled_dot_product_flash_attention")
_EFFICIENT_CUDA = _op("_scaled_dot_product_efficient_attention")

_CUDNN_FROM = 8192
"""Queries from which cuDNN is asked first on Hopper and later: a plan of its own for every new shape costs it more than
it saves on shorter prompts, and at 128K it needs 0.57 of FlashAttention's time."""


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    some: Tensor | None = None,
    causal: bool = False,
    lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all queries over all keys, or those in `mask`, or those not in the future.

    Args:
        q: [B, H, N, Dk]; k: [B, Hk, M, Dk]; v: [B, Hk, M, Dv], Hk divides H; nothing is empty.
        scale: factor of the scores.
        mask: bool [1 or B, 1 or H, 1 or N, M]; a row may see nothing, which gives out 0 and lse -inf.
        some: with a mask, whether each row sees anything, if that is known: bool [1 or B, 1 or H, 1 or N].
        causal: query i sees keys 0..i. Where `ends_with_keys` says so, N < M is allowed and means 0..M - N + i.
        lse: whether lse is needed; it may be returned all the same.

    Returns:
        out [B, H, N, Dv], and lse [B, H, N] in float32 (float64 for float64) or None.
    """
    k_dim, v_dim = q.shape[-1], v.shape[-1]
    if k_dim != v_dim:
        q, k, v = _same_dim(q, k, v)
    out, mass = _attend(q, k, v, scale, mask, causal, lse)
    if out.shape[-1] != v_dim:
        out = out[..., :v_dim]
    if mask is not None:
        # The kernels call the lse of an empty row 0 or leave it undefined, and its out is NaN if the keys are.
        some = any_of(mask, -1) if some is None else some
        out = torch.where(some.unsqueeze(-1), out, 0.0)
        mass = None if mass is None else torch.where(some, mass, -torch.inf)
    return out, mass


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`softmax_attention` with Dk == Dv. The lse of rows that see nothing is undefined."""
    # Called by name the kernels take contiguous rows for granted, and read others wrongly without a word.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.device.type == "cpu" and _FLASH_CPU is not None:
        out, mass = _FLASH_CPU(
            q, k, v, 0.0, causal, attn_mask=None if mask is None else additive(mask, q.dtype), scale=scale
        )
        return out, mass
    if q.device.type == "cuda":
        if mask is None and causal and not lse and _cudnn(q, k):
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                grouped = q.shape[1] != k.shape[1]
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped), None
        if mask is None and _flash_cuda(q):
            assert _FLASH_CUDA is not None
            return _FLASH_CUDA(q, k, v, 0.0, causal, False, scale=scale)[:2]
        if lse and _EFFICIENT_CUDA is not None and q.dtype != torch.float64 and q.shape[-1] % 8 == 0:
            return _efficient(q, k, v, scale, mask, causal)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out, _lse(q, k, scale, mask, causal) if lse else None


def ends_with_keys(q: Tensor, v: Tensor) -> bool:
    """Whether `causal` may be asked for with N < M too: the kernel for such inputs lets the last query see all keys."""
    return q.device.type == "cuda" and _flash_cuda(q if q.shape[-1] >= v.shape[-1] else v)


def _cudnn(q: Tensor, k: Tensor) -> bool:
    queries, keys, dim = q.shape[2], k.shape[2], q.shape[3]
    if queries != keys or queries < _CUDNN_FROM or dim > 128 or not _flash_cuda(q):
        return False
    return torch.cuda.get_device_capability(q.device) >= (9, 0)


def _flash_cuda(q: Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return _FLASH_CUDA is not None and half and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """The memory-efficient CUDA kernel: no shared heads, masks aligned to 16 bytes, lse padded to whole tiles."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    if heads != k.shape[1]:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    bias = None
    if mask is not None:
        bias = q.new_zeros(*mask.shape[:-1], -(-keys // 16) * 16)
        bias[..., :keys].masked_fill_(~mask, -torch.inf)
        bias = bias[..., :keys].expand(batch, heads, queries, keys)
    assert _EFFICIENT_CUDA is not None
    out, lse = _EFFICIENT_CUDA(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    return out, lse[..., :queries]


def _lse(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """lse alone, exactly, query block by query block, for devices whose kernel does not tell it."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(wide).transpose(-1, -2)
    step = max(1, at_once(q.device) // (batch * heads * keys))
    parts = []
    for start in range(0, queries, step):
        rows = q[:, :, start : start + step].to(wide)
        scores = (fold(rows, k.shape[1]) @ k).mul_(scale)
        scores = scores.view(batch, heads, rows.shape[2], keys)
        if causal:
            future = torch.ones(rows.shape[2], keys, dtype=torch.bool, device=q.device).triu_(start + 1)
            scores.masked_fill_(future, -torch.inf)
        if mask is not None:
            scores.masked_fill_(~(mask if mask.shape[2] == 1 else mask[:, :, start : start + step]), -torch.inf)
        parts.append(scores.logsumexp(-1))
    return torch.cat(parts, dim=2)


def fold(q: Tensor, k_heads: int) -> Tensor:
    """[B, H, N, D] -> [B, Hk, G * N, D]: the query heads that share a key head, as rows of one matrix."""
    return q.reshape(q.shape[0], k_heads, -1, q.shape[-1])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores: 0 where seen, -inf elsewhere."""
    whole, hidden = _HIDDEN[dtype]
    # The bits of -inf as an integer times 0 or 1: twenty times faster on a CPU than torch.where of two numbers.
    return mask.logical_not().to(whole).mul_(hidden).view(dtype)


_HIDDEN = {
    torch.float64: (torch.int64, -(1 << 52)),
    torch.float32: (torch.int32, -(1 << 23)),
    torch.bfloat16: (torch.int16, -(1 << 7)),
    torch.float16: (torch.int16, -(1 << 10)),
}
"""For each float type the integer type of its size, and the integer whose bits are -inf."""


def any_of(mask: Tensor, dim: int) -> Tensor:
    """`mask.any(dim)` for a dim that is not empty; as a maximum of bytes it is fifty times faster on a CPU."""
    return mask.view(torch.uint8).amax(dim).view(torch.bool)


def shares(k: Tensor, v: Tensor) -> bool:
    """Whether V is the beginning of every row of K (MLA in its absorbed form)."""
    return v.shape[3] <= k.shape[3] and v.shape[:3] == k.shape[:3] and v.is_set_to(k[..., : v.shape[3]])


def _same_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with one head size. Zeros change no score and no output; K serves as V where V is its beginning (MLA)."""
    k_dim, v_dim = k.shape[-1], v.shape[-1]
    if v_dim < k_dim:
        if shares(k, v):
            return q, k, k
        return q, k, F.pad(v, (0, k_dim - v_dim))
    return F.pad(q, (0, v_dim - k_dim)), F.pad(k, (0, v_dim - k_dim)), v
