"""The compiled GPU backend: FlexAttention, which skips the blocks of keys that a block of queries does not read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from foveate.attention.kernel import any_of
from foveate.attention.request import Request
from foveate.attention.scores import to_heads
from foveate.attention.selection import Ints, Partial, Span

name = "flex"

_TILE = 128
"""Queries and keys of a block where the selection gives no blocks that the kernel can use."""
_FEWEST = 128
"""Fewest queries worth a block mask; below, fetching the slots is cheaper than describing them."""


def can_run(request: Request) -> tuple[bool, str]:
    """Long reads with something to skip, on CUDA. Forced, it also runs elsewhere, uncompiled."""
    r = request
    if r.q.device.type == "cuda" and r.q.dtype == torch.float64:
        return False, "its GPU kernel knows no float64"
    if r.forced:
        return True, ""
    if r.q.device.type != "cuda":
        return False, f"on {r.q.device.type} it runs uncompiled and computes every score"
    if r.dense:
        return False, "every pair is read, there is nothing to skip"
    if r.q.shape[2] < _FEWEST:
        return False, f"fewer than {_FEWEST} queries"
    return True, ""


def run(request: Request) -> Partial:
    """One kernel over the listed blocks, partly read blocks under a mask."""
    r = request
    partial, full, tile = blocks(r)
    kv = [x for table in (partial, full) for x in _ordered(table)]
    block_mask = flex.BlockMask.from_kv_blocks(
        *kv, BLOCK_SIZE=tile, mask_mod=mask_mod(r), seq_lengths=(r.q.shape[2], r.k.shape[2])
    )
    options = {"BLOCK_M": _factor(tile[0]), "BLOCK_N": _factor(tile[1])} if tile != (_TILE, _TILE) else None
    out, aux = _kernel(r.q.device.type)(
        r.q,
        r.k,
        r.v,
        score_mod=_score_mod(r),
        block_mask=block_mask,
        scale=r.scale,
        enable_gqa=r.q.shape[1] != r.k.shape[1],
        kernel_options=options,
        return_aux=flex.AuxRequest(lse=True),
    )
    out = torch.where((aux.lse == -torch.inf).unsqueeze(-1), 0.0, out)
    return Partial(out, aux.lse)


@cache
def _kernel(device: str) -> Callable[..., Any]:
    if device == "cuda":
        return torch.compile(flex.flex_attention)
    return _uncompiled


def _uncompiled(*args: Any, **options: Any) -> Any:
    """FlexAttention as plain PyTorch: every score in memory, right and slow. It would else be traced at each call."""
    switch = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(flex, switch, None)
    try:
        if before is not None:
            setattr(flex, switch, True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex.flex_attention(*args, **options)
    finally:
        if before is not None:
            setattr(flex, switch, before)


def blocks(r: Request) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Which blocks of keys each block of queries reads in part and in full, bool [B, 1 or H, blocks of N, blocks of M]
    each, and the block's (queries, keys). A block read in part is masked, so naming too many costs time alone."""
    batch, heads, _, queries, keys = r.shape
    if r.lists is None or r.span is not None or not _fits(r.q_block, r.k_block):
        return _tiles(r)
    assert r.q_block is not None
    listed = to_heads(_table(r), heads)
    ends = to_heads(r.geometry.ends(), heads if listed.shape[1] == heads else 1)
    if ends.shape[1] > listed.shape[1]:
        listed, ends = to_heads(listed, heads), to_heads(ends, heads)
    short = -queries % r.q_block
    first = F.pad(ends, (0, short), value=keys).unflatten(-1, (-1, r.q_block)).amin(-1, keepdim=True)
    last = F.pad(ends, (0, short), value=0).unflatten(-1, (-1, r.q_block)).amax(-1, keepdim=True)
    start = torch.arange(listed.shape[-1], device=listed.device) * r.k_block
    some = listed & (start < last)
    full = some & ((start + r.k_block).clamp(max=keys) <= first)
    if r.visible:
        full = torch.zeros_like(some)
    partial = (some & ~full).expand(batch, -1, -1, -1)
    return partial, full.expand(batch, -1, -1, -1), (r.q_block, r.k_block)


def _fits(q_block: int | None, k_block: int) -> bool:
    return q_block is not None and q_block % 16 == 0 and k_block % 16 == 0


def _factor(block: int) -> int:
    """The largest tile of the kernel that divides a block."""
    return next(size for size in (128, 64, 32, 16) if block % size == 0)


def _tiles(r: Request) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Blocks of our own size, from the mask of one block of queries at a time."""
    batch, heads, _, queries, keys = r.shape
    some, full = [], []
    for start in range(0, queries, _TILE):
        seen = r.seen(start, min(start + _TILE, queries))
        seen = to_heads(seen, heads) if seen.shape[1] > 1 else seen
        wide = F.pad(seen, (0, -keys % _TILE), value=False).unflatten(-1, (-1, _TILE))
        some.append(any_of(any_of(wide, -1), -2))
        hidden = F.pad(~seen, (0, -keys % _TILE), value=False).unflatten(-1, (-1, _TILE))
        full.append(~any_of(any_of(hidden, -1), -2))
    every, whole = torch.stack(some, dim=2), torch.stack(full, dim=2)
    whole = whole & every
    return (every & ~whole).expand(batch, -1, -1, -1), whole.expand(batch, -1, -1, -1), (_TILE, _TILE)


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as counts and numbers, the set ones first."""
    order = torch.argsort(table.int(), dim=-1, descending=True, stable=True)
    return table.sum(-1).int().contiguous(), order.int().contiguous()


def _table(r: Request) -> Tensor:
    """Which block of keys is listed for which block of queries: bool [B, h, nq, blocks]."""
    assert r.lists is not None
    count = -(-r.k.shape[2] // r.k_block)
    table = torch.zeros(*r.lists.shape[:-1], count + 1, dtype=torch.bool, device=r.lists.device)
    table.scatter_(-1, torch.where(r.lists < 0, count, r.lists).long(), True)
    return table[..., :count].contiguous()


def mask_mod(r: Request) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pairs of a request as a function of row, query head, query and slot."""
    batch, heads, k_heads, queries, _ = r.shape
    group = heads // k_heads
    ends = r.geometry.ends()
    ends = ends.expand(batch, *ends.shape[1:]).contiguous()
    by_end = heads // ends.shape[1]
    spans = (*r.visible, *([r.span] if r.span is not None else []))
    q_at, k_at = (x.expand(batch, *x.shape[1:]).contiguous() for x in r.geometry.positions())
    by_position = heads // k_at.shape[1]
    listed = None if r.lists is None else _table(r)
    by_list = 1 if listed is None else heads // listed.shape[1]
    q_block = r.q_block or queries

    def value(x: Ints, h: Tensor) -> Ints:
        if not isinstance(x, Tensor):
            return x
        return x.reshape(-1)[h // group] if x.numel() > 1 else x.reshape(())

    def sees(span: Span, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = k_at[b, h // by_position, j]
        distance = q_at[b, 0, i] - position
        seen = (distance >= 0) & (distance >= value(span.beyond, h))
        if span.window is not None:
            seen = seen & ((position < value(span.sink, h)) | (distance < value(span.window, h)))
        return seen

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j < ends[b, h // by_end, i]
        chosen = None if listed is None else listed[b, h // by_list, i // q_block, j // r.k_block]
        for number, span in enumerate(spans):
            if number < len(r.visible):
                seen = seen & sees(span, b, h, i, j)
            else:
                assert chosen is not None
                chosen = chosen | sees(span, b, h, i, j)
        return seen if chosen is None else seen & chosen

    return mask


def _score_mod(r: Request) -> Callable[..., Tensor] | None:
    if not r.math:
        return None
    heads, softcap, bias = r.q.shape[1], r.softcap, r.bias

    def score(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        if bias is not None:
            one = [count == 1 for count in bias.shape]
            group = heads // bias.shape[1]
            x = x + bias[b * 0 if one[0] else b, h // group, i * 0 if one[2] else i, j * 0 if one[3] else j]
        return x

    return score
