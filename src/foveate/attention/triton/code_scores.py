"""Scores of tokens that are known by a code: each gets what its code gives, and no index is written for it."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.workers import jit
from foveate.errors import BadArgument

BLOCK = 1024
"""Tokens of a program."""


@jit(do_not_specialize=["capacity", "queries", "codes_of_table"])
def _scores(
    table, codes, seen, forced, out, capacity, queries, codes_of_table, ssb, ssh, ssn, fsb, fsh, fsn,
    STORES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of [B, Hs, G, N]
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = token < capacity
    query, pair = row % queries, row // queries // GROUP
    b, h = pair // STORES, pair % STORES
    kept = tl.load(seen + b * ssb + h * ssh + query * ssn + token, mask=there, other=0) != 0
    taken = tl.load(forced + b * fsb + h * fsh + query * fsn + token, mask=there, other=0) != 0
    wanted = there & kept & (taken == 0)
    code = tl.load(codes + pair * capacity + token, mask=wanted, other=0).to(tl.int32)
    x = tl.load(table + row * codes_of_table + tl.maximum(code, 0), mask=wanted, other=float("-inf"))
    tl.store(out + row * capacity + token, x, mask=there)


def code_scores(table: Tensor, codes: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
    """What the code of each token gives.

    Args:
        table: float32 [B, Hs, G, N, X], what each of X codes gives each query.
        codes: int16 [B, Hs, C].
        seen, forced: bool [B, 1 or Hs, N, C], last axis contiguous; tokens that are not seen, or are forced, get -inf.

    Returns:
        float32 [B, Hs, G, N, C].
    """
    (batch, stores, _, queries, _), capacity = table.shape, codes.shape[-1]
    shapes = {(batch, 1, queries, capacity), (batch, stores, queries, capacity)}
    if table.dtype != torch.float32 or codes.shape[:2] != (batch, stores) or not {seen.shape, forced.shape} <= shapes:
        given = f"table {tuple(table.shape)} {table.dtype}, codes {tuple(codes.shape)}, masks {tuple(seen.shape)}"
        raise BadArgument("table", f"{given}, {tuple(forced.shape)}", "give float32, codes and masks that fit it")
    return _op(
        table.contiguous(), codes.contiguous(), *(x if x.stride(3) == 1 else x.contiguous() for x in (seen, forced))
    )


@torch.library.custom_op(
    "foveate::code_scores",
    mutates_args=(),
    schema="(Tensor table, Tensor codes, Tensor seen, Tensor forced) -> Tensor",
)
def _op(table: Tensor, codes: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
    (batch, stores, group, queries, count), capacity = table.shape, codes.shape[-1]
    out = table.new_empty(batch, stores, group, queries, capacity)
    steps = [x.stride(i) if x.shape[i] > 1 else 0 for x in (seen, forced) for i in range(3)]
    _scores[(batch * stores * group * queries, -(-capacity // BLOCK))](
        table, codes, seen, forced, out, capacity, queries, count, *steps, STORES=stores, GROUP=group, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


@_op.register_fake
def _(table: Tensor, codes: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
    return table.new_empty(*table.shape[:-1], codes.shape[-1])
