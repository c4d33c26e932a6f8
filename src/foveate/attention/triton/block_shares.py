"""How many blocks a layer recalls of what all layers share, and which: one program for each row.

Source: ActQKV (2502.13542), section 3.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.topk import AT_ONCE, best_of, ordered
from foveate.attention.triton.workers import jit, power_of_two
from foveate.errors import BadArgument


@jit(do_not_specialize=["blocks", "least", "most", "total", "number", "layers", "width"])
def _recall(
    scores, left, means, lists, entropy, after, blocks, least, most, total, number, layers, width, N: tl.constexpr,
    L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n, layer = tl.arange(0, N), tl.arange(0, L)
    s = tl.load(scores + b * blocks + n, mask=n < blocks, other=float("-inf"))
    there = s > float("-inf")
    ready = tl.sum(there.to(tl.int32), 0)
    top = tl.max(s, 0)
    away = tl.where(there, s - tl.where(ready > 0, top, 0.0), 0.0)
    weight = tl.where(there, tl.exp(away), 0.0)
    mass = tl.maximum(tl.sum(weight, 0), 1.0)  # the best one weighs 1
    found = (tl.log(mass) - tl.sum(weight * away, 0) / mass) / tl.log(tl.maximum(ready, 2).to(tl.float32))
    tl.store(entropy + b, tl.where(ready > 1, found, -1.0))

    past = tl.load(means + b * layers + layer, mask=layer < layers, other=0.0)
    rest = tl.sum(tl.where(layer >= number, past, 0.0), 0)
    share = tl.sum(tl.where(layer == number, past, 0.0), 0) / tl.where(rest > 0, rest, 1.0)
    known = (tl.min(past, 0) >= 0) & (rest > 0)
    share = tl.where(known, share, 1 / tl.cast(layers - number, tl.float32))
    remains = tl.cast(total, tl.int64)
    if left is not None:
        remains = tl.load(left + b)
    x = share * remains.to(tl.float32)
    whole = tl.floor(x)
    odd = (whole.to(tl.int64) & 1) == 1
    take = whole.to(tl.int64) + ((x - whole > 0.5) | ((x - whole == 0.5) & odd)).to(tl.int64)  # halves to even
    take = tl.minimum(tl.minimum(tl.maximum(take, least), most), remains - least * (layers - 1 - number))
    tl.store(after + b, remains - take)

    chosen, need = best_of(ordered(s), tl.maximum(tl.minimum(take, width), 0).to(tl.int32))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(lists + b * width + place, n, mask=chosen)
    slot = tl.arange(0, WIDE)
    tl.store(lists + b * width + slot, tl.zeros_like(slot) - 1, mask=(slot >= need) & (slot < width))


def recall_blocks(
    scores: Tensor, left: Tensor | None, means: Tensor, *, least: int, most: int, total: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best blocks of each row, as many as a layer may take of those that are left: in proportion to its mean among
    those of the layers from it on, or equally where any mean is negative.

    Args:
        scores: float32 [B, n], n up to `AT_ONCE`; -inf for what is no block.
        left: int64 [B], blocks left to this and the next layers; None: the total.
        means: float32 [B, layers].
        least, most: blocks of a layer; `least` are left to each of those behind.
        total: blocks of all layers.
        number: the layer's place among them.

    Returns:
        int32 [B, min(most, n)], ascending, -1 behind the end; the entropies of the softmax of the scores over that of
        equal ones, float32 [B], -1 where there are fewer than two; what is left then, int64 [B].
    """
    (batch, blocks), layers = scores.shape, means.shape[1]
    if scores.dtype != torch.float32 or not 1 <= blocks <= AT_ONCE:
        raise BadArgument("scores", f"{tuple(scores.shape)} {scores.dtype}", f"give float32 [B, 1 to {AT_ONCE}]")
    if means.shape != (batch, layers) or means.dtype != torch.float32 or not 0 <= number < layers:
        given = f"{tuple(means.shape)} {means.dtype}, number {number}"
        raise BadArgument("means", given, f"give float32 [{batch}, layers], and which of them it is")
    if left is not None and (left.shape != (batch,) or left.dtype != torch.int64):
        raise BadArgument("left", f"{tuple(left.shape)} {left.dtype}", f"give int64 [{batch}]")
    left = None if left is None else left.contiguous()
    return _op(scores.contiguous(), left, means.contiguous(), least, most, total, number)


@torch.library.custom_op(
    "foveate::recall_blocks",
    mutates_args=(),
    schema="(Tensor scores, Tensor? left, Tensor means, SymInt least, SymInt most, SymInt total, SymInt number) "
    "-> (Tensor, Tensor, Tensor)",
)
def _op(
    scores: Tensor, left: Tensor | None, means: Tensor, least: int, most: int, total: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    lists, entropy, after = _nothing(scores, left, means, least, most)
    (batch, blocks), layers, width = scores.shape, means.shape[1], lists.shape[1]
    wide = power_of_two(blocks)
    _recall[(batch,)](
        scores, left, means, lists, entropy, after, blocks, least, most, total, number, layers, width, N=wide,
        L=power_of_two(layers), WIDE=power_of_two(width), num_warps=4 if wide <= 1024 else 8 if wide <= 2048 else 16,
    )  # fmt: skip
    return lists, entropy, after


def _nothing(
    scores: Tensor, left: object, means: object, least: int, most: int, *others: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, blocks = scores.shape
    lists = torch.empty(batch, min(most, blocks), dtype=torch.int32, device=scores.device)
    after = torch.empty(batch, dtype=torch.int64, device=scores.device)
    return lists, scores.new_empty(batch), after


_op.register_fake(_nothing)
