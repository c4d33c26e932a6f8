"""FlashInfer's kernels on the inputs of our cases (interface of its releases 0.6; it compiles each kernel once).

Its plans are made before the clock runs, as a server makes them once for all layers of a step.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from foveate.bench.kernels.case import Kernel

NAME = "flashinfer"
_WORKSPACE = 1 << 28
"""Bytes that a plan may split its work into."""
_PAGE = 64
"""Tokens in a page of latents."""


def installed(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec(NAME) is not None


def dense_prompt(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """Causal attention, q [1, H, N, D]; k, v [1, Hk, N, D]."""
    first = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]  # [N, H, D]
    return Kernel(
        NAME,
        lambda: _library().single_prefill_with_kv_cache(*first, causal=True),
        lambda out: out.transpose(0, 1).unsqueeze(0),
    )


def dense_step(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """One query over all keys, q [1, H, 1, D]; k, v [1, Hk, M, D]."""
    one, keys, values = q[0, :, 0].contiguous(), *(x[0].transpose(0, 1).contiguous() for x in (k, v))
    return Kernel(
        NAME, lambda: _library().single_decode_with_kv_cache(one, keys, values), lambda out: out.view(q.shape)
    )


def listed_step(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, page: int) -> Kernel:
    """One query over listed pages, each kv head as a request of its own.

    Args:
        lists: int32 [1, Hk, K], ascending, no padding.
    """
    heads, dim = k.shape[1], k.shape[3]
    planned: list[Any] = []

    def work() -> Tensor:
        if not planned:
            number = torch.arange(heads, device=q.device, dtype=torch.int32)
            indices = (lists[0] + number.unsqueeze(1) * (k.shape[2] // page)).flatten()
            ends = torch.arange(heads + 1, device=q.device, dtype=torch.int32) * lists.shape[2]
            wrapper = _library().BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD")
            last = torch.full((heads,), page, dtype=torch.int32, device=q.device)
            group = q.shape[1] // heads
            how = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
            wrapper.plan(ends, indices.int(), last, group, 1, dim, page, **how)
            pages = tuple(x.reshape(-1, page, 1, dim) for x in (k[0], v[0]))
            planned.append((wrapper, q[0, :, 0].view(heads, group, dim).contiguous(), pages))
        wrapper, rows, pages = planned[0]
        return wrapper.run(rows, pages)

    return Kernel(NAME, work, lambda out: out.reshape(q.shape))


def latent_step(q: Tensor, c: Tensor, scale: float, width: int) -> Kernel:
    """Absorbed queries [B, H, 1, width + R] over latents c [B, n, width + R]."""
    planned: list[Any] = []

    def work() -> Tensor:
        if not planned:
            batch, tokens = c.shape[:2]
            count = tokens // _PAGE
            wrapper = _library("mla").BatchMLAPagedAttentionWrapper(_workspace(q.device))
            row = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
            pages = torch.arange(batch * count, device=q.device, dtype=torch.int32)
            held = torch.full((batch,), tokens, dtype=torch.int32, device=q.device)
            sizes = (q.shape[1], width, q.shape[3] - width, _PAGE, False, scale, q.dtype, c.dtype)
            wrapper.plan(row, row * count, pages, held, *sizes)
            parts = [x.reshape(-1, _PAGE, x.shape[-1]).contiguous() for x in (c[..., :width], c[..., width:])]
            rows = [x.contiguous() for x in (q[:, :, 0, :width], q[:, :, 0, width:])]
            planned.append((wrapper, (*rows, *parts)))
        wrapper, given = planned[0]
        return wrapper.run(*given)

    return Kernel(NAME, work, lambda out: out.unsqueeze(2))


def listed_prompt(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, q_block: int, k_block: int) -> Kernel:
    """Causal attention of blocks of queries over the blocks on their lists, each query head with lists of its own.

    Its masks are per kv head, so that every query head is given keys and values to itself. A block of queries is a
    request whose keys end with its own, so that causality within the request is causality in the prompt.

    Args:
        lists: int32 [1, H, N / q_block, K], ascending, padded with -1, each ending with the blocks of the queries.
    """
    planned: list[Any] = []

    def work() -> Tensor:
        if not planned:
            heads, tokens, dim = q.shape[1:]
            blocks = tokens // k_block
            number = torch.where(lists[0] >= 0, lists[0], blocks).long()
            table = torch.zeros(*number.shape[:2], blocks + 1, dtype=torch.bool, device=q.device)
            table.scatter_(2, number, True)
            wrapper = _library().VariableBlockSparseAttentionWrapper(_workspace(q.device))
            rows = torch.full((heads, tokens // q_block), q_block, dtype=torch.int32, device=q.device)
            cols = torch.full((heads, blocks), k_block, dtype=torch.int32, device=q.device)
            wrapper.plan(table[..., :-1], rows, cols, heads, heads, dim, causal=True, q_data_type=q.dtype)
            own = [x[0].repeat_interleave(heads // x.shape[1], dim=0).contiguous() for x in (q, k, v)]
            planned.append((wrapper, own))
        wrapper, own = planned[0]
        return wrapper.run(*own)

    return Kernel(NAME, work, lambda out: out.unsqueeze(0))


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)


def _library(part: str = "") -> Any:
    return import_module(f"{NAME}.{part}" if part else NAME)
