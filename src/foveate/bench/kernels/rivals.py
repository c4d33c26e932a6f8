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
    first = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]  # [N, H, D]
    second = [x.unsqueeze(0) for x in first]  # [1, N, H, D]
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "flashinfer": (
            lambda: _library("flashinfer", "single_prefill_with_kv_cache")(*first, causal=True),
            lambda x: x.transpose(0, 1).unsqueeze(0),
        ),
        "fla": (lambda: _library("fla.ops.attn", "parallel_attn")(*second), lambda x: x.transpose(1, 2)),
        "natten": (
            lambda: _library("natten", "na1d")(*second, kernel_size=q.shape[2], is_causal=True),
            lambda x: x.transpose(1, 2),
        ),
    }
    kernels += [Kernel(name, *calls[name]) for name in LIBRARIES if find_spec(name) is not None]
    return [*kernels, flex(q, k, v, causal_blocks(q.shape[2], q.device))]


def decode(q: Tensor, k: Tensor, v: Tensor) -> list[Kernel]:
    """One query over all keys, q [1, H, 1, D]; k, v [1, Hk, M, D]."""
    kernels = _torch(q, k, v, False)
    if q.device.type != "cuda":
        return kernels
    if find_spec("flashinfer") is not None:
        one, keys, values = q[0, :, 0], *(x[0].transpose(0, 1).contiguous() for x in (k, v))
        kernels.append(
            Kernel(
                "flashinfer",
                lambda: _library("flashinfer", "single_decode_with_kv_cache")(one, keys, values),
                lambda x: x.view(q.shape),
            )
        )
    return [*kernels, flex(q, k, v, None)]


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
