"""Lists of blocks of any size as lists of blocks that the block-sparse kernel knows.

A block of 50 keys is 25 blocks of 2; a block of 50 queries is one of 64 whose last query stands there several times.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.attention.request import Request

_QUERIES = (16, 32, 64)
_KEYS = 64


def queries_of(block: int | None) -> int | None:
    """The least block of queries that the kernel knows and that holds this one; None holds all."""
    if block is None:
        return None
    return next((size for size in _QUERIES if size >= block), -(-block // 128) * 128)


def keys_of(block: int) -> int:
    """The largest block of keys that the kernel knows and that divides this one."""
    return block if block % 128 == 0 else min(block & -block, _KEYS)


def regrained(r: Request) -> tuple[Request, Tensor | None, Tensor | None]:
    """The request in blocks that the kernel knows, without a span.

    Returns:
        The request; where its queries were filled up, one past the last slot that each may read, int32 [B, N'], and
        where the queries that were asked for stand among them, int64 [N].
    """
    assert r.lists is not None
    size, per = keys_of(r.k_block), queries_of(r.q_block)
    if size != r.k_block:
        parts = r.k_block // size
        lists = r.lists.unsqueeze(-1) * parts + torch.arange(parts, dtype=r.lists.dtype, device=r.lists.device)
        lists = torch.where(r.lists.unsqueeze(-1) < 0, -1, lists).flatten(-2)
        r = replace(r, lists=lists, k_block=size, counts=None)
    if per == r.q_block or per is None or r.q_block is None:
        return r, None, None
    assert r.lists is not None
    queries, blocks = r.q.shape[2], r.lists.shape[2]
    block = torch.arange(blocks, device=r.q.device).unsqueeze(-1) * r.q_block
    row = (block + torch.arange(per, device=r.q.device).clamp_max(r.q_block - 1)).clamp_max(queries - 1).flatten()
    number = torch.arange(queries, device=r.q.device)
    ends = r.geometry.ends()[:, 0].int().index_select(1, row)
    return replace(r, q=r.q.index_select(2, row), q_block=per), ends, number // r.q_block * per + number % r.q_block
