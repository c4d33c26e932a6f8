"""Dense attention by others: PyTorch's kernels, FlexAttention, and libraries where they are installed.

All calls are guarded where they are made: a library whose interface has moved on gives a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate.attention import attend
from foveate.bench.kernels import flashinfer
from foveate.bench.kernels.case import Kernel

LIBRARIES = ("flashinfer", "fla", "natten")
"""What is timed where it can be imported."""
BLOCK = 128
"""Queries and keys of FlexAttention's blocks."""
_UNCOMPILED = 1024
"""Longest context for FlexAttention where it is not compiled and holds all scores."""


def absent(device: torch.device) -> list[str]:
    """Libraries that would be timed on a GPU if they were installed."""
    if device.type != "cuda":
        return []
    return [name for name in LIBRARIES if find_spec(name) is None]


def sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """PyTorch's attention by one of its kernels; None: the one that it takes."""
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def _torch(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Kernel]:
    if q.device.type != "cuda":
        return [Kernel("torch sdpa", partial(sdpa, None, q, k, v, causal=causal))]
    backends = (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention", SDPBackend.FLASH_ATTENTION))
    return [Kernel(f"sdpa {name}", partial(sdpa, backend, q, k, v, causal=causal)) for name, backend in backends]


def prefill(q: Tensor, k: Tensor, v: Tensor) -> list[Kernel]:
    """Causal attention of as many queries as keys, q [1, H, N, D]; k, v [1, Hk, N, D]."""
    kernels = _torch(q, k, v, True)
    if q.device.type != "cuda":
        return [*kernels, *uncompiled(lambda: attend(q, k, v, backend="flex"), q.shape[2])]
    if flashinfer.installed(q.device):
        kernels.append(flashinfer.dense_prompt(q, k, v))
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # [1, N, H, D]
    if find_spec("fla") is not None:
        kernels.append(Kernel("fla", lambda: _library("fla.ops.attn", "parallel_attn")(*rows), _turned))
    if find_spec("natten") is not None:  # it knows no shared heads
        each = [x.repeat_interleave(q.shape[1] // x.shape[2], dim=2) for x in rows]
        how = {"kernel_size": q.shape[2], "is_causal": True}
        kernels.append(Kernel("natten", lambda: _library("natten", "na1d")(*each, **how), _turned))
    return [*kernels, flex(q, k, v, causal_blocks(q.shape[2], q.device))]


def decode(q: Tensor, k: Tensor, v: Tensor) -> list[Kernel]:
    """One query over all keys, q [1, H, 1, D]; k, v [1, Hk, M, D]."""
    kernels = _torch(q, k, v, False)
    if q.device.type != "cuda":
        return kernels
    if flashinfer.installed(q.device):
        kernels.append(flashinfer.dense_step(q, k, v))
    if find_spec("fla") is not None:
        rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        ends = torch.tensor([0, k.shape[2]], device=q.device)
        step = partial(_library, "fla.ops.attn.decoding", "attn_decoding_one_step")
        kernels.append(Kernel("fla", lambda: step()(*rows, cu_seqlens=ends), _turned))
    return [*kernels, flex(q, k, v, None)]


def listed(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, page: int) -> list[Kernel]:
    """One query over listed pages, lists [1, Hk, K]."""
    return [flashinfer.listed_step(q, k, v, lists, page)] if flashinfer.installed(q.device) else []


def latent(q: Tensor, c: Tensor, scale: float, width: int) -> list[Kernel]:
    """Absorbed queries [B, H, 1, D] over latents [B, n, D], of which the first `width` channels are values."""
    return [flashinfer.latent_step(q, c, scale, width)] if flashinfer.installed(q.device) else []


def block_sparse(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, q_block: int, k_block: int) -> list[Kernel]:
    """Causal attention over listed blocks, lists [1, H, N / q_block, K] that end with the blocks of the queries."""
    kernels = []
    if flashinfer.installed(q.device):
        kernels.append(flashinfer.listed_prompt(q, k, v, lists, q_block, k_block))
    if q_block == k_block == BLOCK:
        kernels.append(flex(q, k, v, listed_blocks(lists, q.shape[2])))
    return kernels


def _turned(out: Any) -> Tensor:
    """[1, N, H, D] -> [1, H, N, D]."""
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def uncompiled(work: Callable[[], Any], length: int) -> list[Kernel]:
    """FlexAttention where it holds all scores: for short contexts."""
    return [Kernel("foveate flex", work)] if length <= _UNCOMPILED else []


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Kernel:
    """FlexAttention, compiled; the blocks are found before the clock runs."""
    grouped = q.shape[1] != k.shape[1]
    return Kernel("FlexAttention", lambda: _compiled()(q, k, v, block_mask=mask, enable_gqa=grouped), slow=True)


def causal_blocks(n: int, device: torch.device) -> Any:
    """The block mask of causal attention."""
    number = torch.arange(n // BLOCK, device=device, dtype=torch.int32)
    return _block_mask(number.expand(len(number), -1)[None, None], number[None, None], n)


def listed_blocks(lists: Tensor, n: int) -> Any:
    """The block mask of ascending lists [1, H, n / 128, K] that end with the block of the queries."""
    blocks = n // BLOCK
    index = torch.zeros(*lists.shape[:3], blocks, dtype=torch.int32, device=lists.device)
    index[..., : lists.shape[3]] = lists.clamp(min=0)
    return _block_mask(index, (lists >= 0).sum(-1, dtype=torch.int32) - 1, n)


def _block_mask(index: Tensor, full: Tensor, n: int) -> Any:
    """The first `full` blocks of each row of `index` are read whole, and the diagonal one under the mask."""
    from torch.nn.attention.flex_attention import BlockMask

    part = torch.zeros(index.shape, dtype=torch.int32, device=index.device)
    part[..., 0] = torch.arange(n // BLOCK, device=index.device, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        torch.ones_like(full),
        part,
        full.contiguous(),
        index.contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, j: i >= j,
        seq_lengths=(n, n),
    )


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _library(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(module), name)
