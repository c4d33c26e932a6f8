"""Decode over latent stores (MLA): keys of which a part are the values, read once for all heads."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.decode import Stores, decode_ragged
from foveate.attention.triton.workers import (
    LN2,
    LOG2E,
    jit,
    join,
    knows_gluon,
    multiprocessors,
    outputs,
    partials,
    power_of_two,
)
from foveate.errors import BadArgument


def decode_latent(
    q: Tensor, c: Tensor, lengths: Tensor, scale: float, value_dim: int, *, first: int = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of absorbed queries over one latent head per row.

    All heads of a row read each token together, in tiles of up to 64 heads; values are taken from the tile that the
    scores were made of. A slice of the values (tensor parallelism over the latent) needs the whole scores: lse is the
    same in every slice, and the outputs stand side by side.

    Args:
        q: [B, H, N, r + d_rope], N from 1 to 8.
        c: [B, C, r + d_rope], normed latents and rotated keys.
        lengths: int32 [B] on the device; the queries are the last N of these tokens.
        scale: factor of the scores (that of the expanded head size; nothing here can tell it).
        value_dim: channels of the values: r, or the width of the slice.
        first: first channel of the slice; a multiple of 8.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [B, H, N, value_dim] in the dtype of q, lse [B, H, N] float32; 0 and -inf where a row holds nothing.
    """
    if c.dim() != 3 or c.shape[0] != q.shape[0]:
        raise BadArgument("c", tuple(c.shape), f"give [{q.shape[0]}, tokens, {q.shape[-1]}]")
    if value_dim < 1 or first < 0 or first + value_dim > c.shape[2] or first % 8:
        given = f"channels {first} to {first + value_dim}"
        raise BadArgument("value_dim", given, f"they must lie in the {c.shape[2]} of c, the first a multiple of 8")
    return decode_ragged(q, Stores(c, c[..., first : first + value_dim], lengths), scale, softcap)


ROWS = range(64, 129)
"""Query rows of a unit for which the kernel for many heads was measured, and was faster: on an H100 with 128 rows over
4 x 2,048 to 4 x 131,072 tokens and 16 x 32,768, with 64 rows over 4 x 131,072."""
ROOM = 1 << 13
"""Tokens of all units from which on it was. How many are held is known on the device alone, so that what has room for
them counts."""


def overlaps(q: Tensor, stores: Stores, scale: float, softcap: float | None) -> tuple[bool, str]:
    """Whether `overlapped` can read these stores, and is the faster; if not, why."""
    k, v, units = stores.k, stores.v, stores.lengths.shape[0]
    rows = q.shape[1] * q.shape[2]
    if v.data_ptr() != k.data_ptr() or v.stride() != k.stride() or (k.shape[2], v.shape[2]) != (576, 512):
        return False, "the tokens have other than 576 channels of which the first 512 are the value"
    if units != q.shape[0] or rows not in ROWS or units * k.shape[1] < ROOM:
        return False, f"it was not faster for {rows} query rows over {units} x {k.shape[1]:,} tokens"
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return False, "it knows half precision alone"
    if softcap is not None or scale <= 0:
        return False, "it knows no softcap, and no scale that is not positive"
    step = k.stride(1)
    if stores.starts is not None or step < 576 or step % 8 or k.stride(0) % step or (q.data_ptr() | k.data_ptr()) % 16:
        return False, "the tokens of all rows do not lie in one grid"
    return knows_gluon(q.device)


def overlapped(q: Tensor, stores: Stores, scale: float, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """`decode.run` where products take as long as reading (see `decode_latent_hopper`); for what `overlaps`."""
    hopper: Any = import_module("foveate.attention.triton.decode_latent_hopper")
    rows, units = q.shape[1] * q.shape[2], stores.lengths.shape[0]
    workers = max(1, multiprocessors(q.device) // -(-rows // hopper.TILE))
    part, weight = partials(workers + units, rows, stores.v.shape[2], q.device)
    hopper.start(q, stores.k, stores.lengths, stores.pairs, part, weight, scale * LOG2E.value, workers)
    return merge(q, part, weight, stores.lengths, stores.pairs, sinks, workers, hopper.BLOCK)


def merge(
    q: Tensor,
    part: Tensor,
    weight: Tensor,
    lengths: Tensor,
    pairs: Tensor | None,
    sinks: Tensor | None,
    workers: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Outputs and lse of what workers found of units whose blocks of tokens were split evenly among them.

    With many rows there is much to merge: a program of two warps takes one row, of eight workers at a time (an H100
    took 6 and 7 us so for 4 x 128 and 16 x 128 rows, and 12 and 38 with 32 workers at a time by four warps).

    Args:
        q: [B, H, N, Dk], for its shape and dtype.
        part: [workers + P, H * N, Dv], weight (log-masses, base 2): [workers + P, H * N]; float32.
        lengths: int32 [P]; pairs: int32 [P] or None; sinks: [H] or None.
    """
    (_, heads, queries, _), units, dim = q.shape, lengths.shape[0], part.shape[2]
    out, lse = outputs(q, dim)
    width = min(512, power_of_two(dim))
    _merge[(units * heads * queries, -(-dim // width))](
        part, weight, lengths, lengths if pairs is None else pairs, lengths if sinks is None else sinks, out, lse,
        units, workers, heads, queries, DV=dim, WIDTH=width, UNITS=power_of_two(units), BLOCK=block, WIDE=8,
        PAIRS=pairs is not None, SINKS=sinks is not None, num_warps=2,
    )  # fmt: skip
    return out, lse


@jit(do_not_specialize=["units", "workers", "heads", "queries"])
def _merge(
    part, weight, lengths, pairs, sinks, out, lse, units, workers, heads, queries, DV: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    rows = heads * queries
    unit, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    pair = unit
    if PAIRS:
        pair = tl.load(pairs + unit)
    place = pair.to(tl.int64) * rows + row
    top, mass = tl.cast(float("-inf"), tl.float32), tl.cast(0.0, tl.float32)
    if SINKS:
        top = tl.load(sinks + row // queries).to(tl.float32) * LOG2E
        mass = tl.cast(1.0, tl.float32)
    number = tl.arange(0, UNITS)
    blocks = (tl.load(lengths + number, mask=number < units, other=0) + BLOCK - 1) // BLOCK
    total = tl.sum(blocks, 0)
    before = tl.sum(tl.where(number < unit, blocks, 0), 0)
    mine = tl.sum(tl.where(number == unit, blocks, 0), 0)
    # Worker w begins at or before block b as long as w T < (b + 1) W. No memory holds so many blocks that products of
    # them with workers need 64 bits.
    some = tl.maximum(total, 1)
    first = ((before + 1) * workers - 1) // some
    last = tl.where(mine > 0, ((before + mine) * workers - 1) // some, first - 1)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], dtype=tl.float32)
    for w0 in tl.range(first, last + 1, WIDE, num_stages=1):
        w = w0 + tl.arange(0, WIDE)
        # With fewer blocks than workers some of them had nothing to read, and left nothing.
        busy = (w <= last) & (w * total // workers < (w + 1) * total // workers)
        slot = (w + unit).to(tl.int64) * rows + row
        e = tl.load(weight + slot, mask=busy, other=float("-inf"))
        x = tl.load(part + slot[:, None] * DV + d[None, :], mask=busy[:, None] & (d < DV)[None, :], other=0.0)
        acc, top, mass = join(e, x, acc, top, mass)
    seen = mass > 0
    mass = tl.where(seen, mass, 1.0)
    tl.store(out + place * DV + d, (acc / mass).to(out.dtype.element_ty), mask=d < DV)
    if tl.program_id(1) == 0:
        tl.store(lse + place, tl.where(seen, (top + tl.log2(mass)) * LN2, float("-inf")))
