"""What all decode kernels share: an even split of the tokens of all pairs over a fixed number of workers.

The blocks of tokens of all pairs stand in one row, pair behind pair; worker w of W reads the blocks from w T / W to
(w + 1) T / W of the T that there are. T comes from lengths on the device, W from the machine alone, so that a captured
step stays balanced whatever the lengths become, and no pair is padded to the longest. What worker w found of unit u is
row w + u of the partial results (a new row whenever either moves on), and a second kernel merges the rows of each unit.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import __version__, knobs

from foveate.errors import BadArgument

jit: Any = triton.jit
"""`triton.jit`, whose types say nothing of launching."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Tuning(NamedTuple):
    """How a kernel is laid out: tokens per block, warps and pipeline stages per program, workers per multiprocessor."""

    block: int
    warps: int
    stages: int
    per_sm: int


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; in the interpreter a few, so that reads are split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def knows_gluon(device: torch.device) -> tuple[bool, str]:
    """Whether kernels that are written for Hopper by hand can run on a device; if not, why."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False, "it is written for Hopper"
    if knobs.runtime.interpret:
        return False, "Triton's interpreter knows no Gluon"
    if not __version__.startswith("3.6."):
        return False, "Gluon changes from version to version of Triton: it is written for 3.6"
    return True, ""


def power_of_two(n: int) -> int:
    """The next power of two, 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def parts_of(dim: int) -> tuple[int, int]:
    """A head size as one or two powers of two that a matrix unit takes (576 = 512 + 64), the second 0 if one will do.

    Sizes that are no such sum are rounded up, and what is beyond the end is masked.
    """
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, 0 if dim <= first else max(16, power_of_two(dim - first))


def precision_of(dtype: torch.dtype) -> str:
    """Of matrix products: float32 is kept by three products of tf32, since one alone is off by 3e-4."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def shapes(k_dim: int, v_dim: int, *, shared: bool = False) -> dict[str, Any]:
    """The head sizes as constants of a kernel."""
    k0, k1 = parts_of(k_dim)
    v0, v1 = (k0, k1 if v_dim > k0 else 0) if shared else parts_of(v_dim)
    return {"DK": k_dim, "DV": v_dim, "K0": k0, "K1": k1, "V0": v0, "V1": v1}


def check_heads(q: Tensor, k_dim: int, stores: int) -> tuple[int, int, int, int]:
    """B, H, N and query heads per store head of q [B, H, N, Dk] with `stores` store heads in a row."""
    if q.dim() != 4 or q.shape[3] != k_dim:
        raise BadArgument("q", tuple(q.shape), f"it must be [batch, heads, queries, {k_dim}] like the keys")
    batch, heads, queries, _ = q.shape
    if stores < 1 or heads % stores:
        raise BadArgument("q", tuple(q.shape), f"its heads must be a multiple of the {stores} store heads")
    return batch, heads, queries, heads // stores


def check_tails(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> int:
    """Pairs of a step of q [B, H, 1, Dk] over stores whose newest tokens are exact: tails [P, T, D] of keys and values,
    lengths int32 [P]."""
    units = lengths.numel()
    check_heads(q, keys.shape[2], units // max(1, q.shape[0]))
    if q.shape[2] != 1 or units % q.shape[0] or q.dtype != keys.dtype or q.dtype != values.dtype:
        given = f"{tuple(q.shape)} {q.dtype}"
        raise BadArgument("q", given, f"one query per row, in the dtype of the {units} pairs, {keys.dtype}")
    return units


def partials(rows: int, per_row: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for what the workers find: outputs [rows, per_row, dim] and log-masses [rows, per_row], base 2."""
    out = torch.empty(rows, per_row, dim, dtype=torch.float32, device=device)
    return out, torch.empty(rows, per_row, dtype=torch.float32, device=device)


def outputs(q: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Room for what a read gives: out [B, H, N, dim] in the dtype of q [B, H, N, Dk], lse [B, H, N] float32."""
    out = torch.empty(*q.shape[:3], dim, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def in_base_2(scale: float, softcap: float | None) -> tuple[float, float]:
    """The factor and the softcap that `logits` takes."""
    if softcap is None:
        return scale * LOG2E.value, 0.0
    return scale / softcap, softcap * LOG2E.value


@jit
def begin_of(worker, workers, total):
    """The first block of a worker. No memory holds so many blocks that products of them with workers need more than 32
    bits."""
    return (tl.cast(worker, tl.uint32) * tl.cast(total, tl.uint32) // tl.cast(workers, tl.uint32)).to(tl.int32)


@jit
def share_of(worker, workers, blocks):
    """What a worker reads of units with `blocks` [UNITS] blocks each: first and end block, its first unit, and the
    number of blocks before that unit."""
    ends = tl.cumsum(blocks, 0)
    total = tl.sum(blocks, 0)
    begin = begin_of(worker, workers, total)
    end = begin_of(worker + 1, workers, total)
    unit = tl.sum((ends <= begin).to(tl.int32), 0)
    before = tl.sum(tl.where(ends <= begin, blocks, 0), 0)
    return begin, end, unit, before


@jit
def rows_of_q(q, row, valid, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """The query rows row [M] as tiles [M, K0] and [M, K1] (the first again where there is no second)."""
    d0 = tl.arange(0, K0)
    keep = valid[:, None]
    if K0 > DK:
        keep = keep & (d0 < DK)[None, :]
    q0 = tl.load(q + row[:, None] * DK + d0[None, :], mask=keep, other=0.0)
    if K1:
        d1 = K0 + tl.arange(0, K1)
        keep = valid[:, None]
        if K0 + K1 > DK:
            keep = keep & (d1 < DK)[None, :]
        return q0, tl.load(q + row[:, None] * DK + d1[None, :], mask=keep, other=0.0)
    else:
        return q0, q0


@jit
def tile_of(x, offsets, keep, FROM: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Channels FROM.. of tokens at offsets [n] behind x: [n, SIZE]; 0 for tokens that are not kept and beyond DIM."""
    d = FROM + tl.arange(0, SIZE)
    place = x + offsets[:, None] + d[None, :]
    if FROM + SIZE > DIM:
        inside = (d < DIM)[None, :]
        if MASKED:
            inside = inside & keep[:, None]
        return tl.load(place, mask=inside, other=0.0)
    else:
        if MASKED:
            return tl.load(place, mask=keep[:, None], other=0.0)
        else:
            return tl.load(place)


@jit
def capped(s, softcap):
    """softcap * tanh(s), a softcap in base 2."""
    return softcap * (1 - 2 / (1 + tl.exp2(s * (2 * LOG2E))))


@jit
def logits(q0, q1, k0, k1, factor, softcap, K1: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [M, n] in base 2; factor is scale * log2(e), or scale / softcap with a softcap (itself times log2(e))."""
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if K1:
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    s *= factor
    if CAPPED:
        s = capped(s, softcap)
    return s


@jit
def absorb(s, v0, v1, acc0, acc1, top, mass, V1: tl.constexpr, PRECISION: tl.constexpr):
    """One more block of logits and values into the running softmax. Logits of -inf weigh nothing."""
    new = tl.maximum(top, tl.max(s, 1))
    # Where nothing was seen yet the maximum is -inf, and -inf - -inf would be NaN.
    anchor = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - anchor[:, None])
    shrink = tl.exp2(top - anchor)
    mass = mass * shrink + tl.sum(p, 1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if V1:
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new, mass


@jit
def read_tokens(
    q0, q1, k, v, n, keep, acc0, acc1, top, mass, factor, softcap, stride_kt, stride_vt, DK: tl.constexpr,
    DV: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens n behind k and v, those that are kept, into the running softmax."""
    k0 = tile_of(k, n * stride_kt, keep, 0, K0, DK, True)
    k1 = k0
    if K1:
        k1 = tile_of(k, n * stride_kt, keep, K0, K1, DK, True)
    s = logits(q0, q1, k0, k1, factor, softcap, K1, CAPPED, PRECISION)
    s = tl.where(keep[None, :], s, float("-inf"))
    v0 = tile_of(v, n * stride_vt, keep, 0, V0, DV, True)
    v1 = v0
    if V1:
        v1 = tile_of(v, n * stride_vt, keep, V0, V1, DV, True)
    return absorb(s, v0, v1, acc0, acc1, top, mass, V1, PRECISION)


@jit
def leave(
    part, weight, slot, row, valid, acc0, acc1, top, mass, R: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr,
):  # fmt: skip
    """Write what a worker found of one unit: rows row [M] of R in row `slot` of the partial results."""
    seen = mass > 0
    by = 1 / tl.where(seen, mass, 1.0)
    place = slot.to(tl.int64) * R + row
    tl.store(weight + place, tl.where(seen, top + tl.log2(tl.where(seen, mass, 1.0)), float("-inf")), mask=valid)
    d = tl.arange(0, V0)
    tl.store(part + place[:, None] * DV + d[None, :], acc0 * by[:, None], mask=valid[:, None] & (d < DV)[None, :])
    if V1:
        d = V0 + tl.arange(0, V1)
        tl.store(part + place[:, None] * DV + d[None, :], acc1 * by[:, None], mask=valid[:, None] & (d < DV)[None, :])


@jit
def join(e, x, acc, top, mass):
    """Partial results x [n, D] of log-masses e [n] into a running merge."""
    new = tl.maximum(top, tl.max(e, 0))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(top - anchor)
    p = tl.exp2(e - anchor)
    return acc * shrink + tl.sum(x * p[:, None], 0), new, mass * shrink + tl.sum(p, 0)


@jit
def gather_channels(
    part, weight, unit, row, blocks, workers, top, mass, d, R: tl.constexpr, DV: tl.constexpr, UNITS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Merge all that the workers found of the channels d of one row of a unit, beside a part of value 0 and the mass
    given.

    Returns the output, as many numbers as d, and its log-mass in base 2.
    """
    number = tl.arange(0, UNITS)
    total = tl.sum(blocks, 0)
    before = tl.sum(tl.where(number < unit, blocks, 0), 0)
    mine = tl.sum(tl.where(number == unit, blocks, 0), 0)
    some = tl.cast(tl.maximum(total, 1), tl.uint32)
    # Worker w begins at or before block b as long as w T < (b + 1) W.
    first = ((tl.cast(before + 1, tl.uint32) * tl.cast(workers, tl.uint32) - 1) // some).to(tl.int32)
    last = ((tl.cast(before + mine, tl.uint32) * tl.cast(workers, tl.uint32) - 1) // some).to(tl.int32)
    last = tl.where(mine > 0, last, first - 1)
    acc = tl.zeros_like(d).to(tl.float32)
    top, mass = tl.cast(top, tl.float32), tl.cast(mass, tl.float32)
    for w0 in tl.range(first, last + 1, WIDE):
        w = w0 + tl.arange(0, WIDE)
        # With fewer blocks than workers some of them had nothing to read, and left nothing.
        busy = begin_of(w, workers, total) < begin_of(w + 1, workers, total)
        busy = busy & (w <= last)
        place = (w + unit).to(tl.int64) * R + row
        e = tl.load(weight + place, mask=busy, other=float("-inf"))
        x = tl.load(part + place[:, None] * DV + d[None, :], mask=busy[:, None] & (d < DV)[None, :], other=0.0)
        acc, top, mass = join(e, x, acc, top, mass)
    seen = mass > 0
    out = acc / tl.where(seen, mass, 1.0)
    return out, tl.where(seen, top + tl.log2(tl.where(seen, mass, 1.0)), float("-inf"))


@jit
def deliver_channels(out, lse, row, d, value, mass, first, DV: tl.constexpr):
    """Write channels d of the merged output of one row, and its natural log-mass if they are the first ones."""
    tl.store(out + row * DV + d, value.to(out.dtype.element_ty), mask=d < DV)
    tl.store(lse + row, mass * LN2, mask=first)
