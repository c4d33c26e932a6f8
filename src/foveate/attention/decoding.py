"""The decoding backend: one query per row, split over the keys it reads, lengths and lists on the device (Triton)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from foveate.attention.request import Request
from foveate.attention.selection import Partial

name = "decode"

_PAGE = 128
"""Most slots of a listed block."""


def can_run(request: Request) -> tuple[bool, str]:
    """One query per row on a CUDA device, of which only lists and lengths say what it reads."""
    r = request
    if r.q.shape[2] != 1:
        return False, "it serves one query per row"
    able, reason = serves(r.q, r.forced)
    if not able:
        return False, reason
    if r.bias is not None:
        return False, "it adds no bias"
    if r.visible:
        return False, "it knows no positions"
    if r.lists is None:
        return True, ""
    if r.k_block > _PAGE or r.k_block & (r.k_block - 1):
        return False, f"blocks of {r.k_block} slots are not a power of two up to {_PAGE}"
    if r.span is not None and (_near(r) is None or r.geometry.k_positions is not None):
        return False, "the span beside the lists is none of slots"
    return True, ""


def serves(q: Tensor, forced: bool = False) -> tuple[bool, str]:
    """Whether the kernels can be used on this device and dtype."""
    if q.dtype == torch.float64:
        return False, "the kernels know no float64"
    if not _installed():
        return False, "Triton is not installed: pip install foveate[gpu]"
    if q.device.type != "cuda" and not (forced and _interpreted()):
        return False, "it needs a CUDA device"
    return True, ""


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def run(request: Request) -> Partial:
    """One launch over all pairs, and one that merges."""
    r = request
    lengths = _lengths(r)
    k, v = r.k.flatten(0, 1), r.v.flatten(0, 1)
    if r.lists is None:
        ragged = _kernels("decode")
        return Partial(*ragged.decode_ragged(r.q, ragged.Stores(k, v, lengths.flatten()), r.scale, r.softcap))
    lists = r.lists[:, :, 0].to(torch.int32).contiguous()
    counts = (lists >= 0).sum(-1, dtype=torch.int32)
    listed = _kernels("decode_lists").decode_lists
    return Partial(
        *listed(r.q, k, v, lists, counts, lengths, page=r.k_block, near=_near(r), scale=r.scale, softcap=r.softcap)
    )


def stores(bands: Sequence[tuple[Tensor, Tensor, Tensor]], lengths: Tensor) -> Any:
    """Stores that one launch reads: bands of k [P, C, Dk], v [P, C, Dv] and pair numbers [P], and the slots in use of
    all pairs, int32, band by band. It holds addresses: make it anew when a band moves."""
    return _kernels("decode").Stores.of(bands, lengths)


def attend(q: Tensor, held: Any, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention of q [B, H, 1, Dk] over all that `stores` hold: [B, H, 1, Dv]."""
    return _kernels("decode").decode_ragged(q, held, scale, softcap, sinks)[0]


def _lengths(r: Request) -> Tensor:
    """Slots that the query of each (row, store head) may read, int32 [B, Hk]."""
    batch, _, stores, _, keys = r.shape
    g = r.geometry
    if g.first is not None:
        ends = g.ends()[..., 0]
    elif g.lengths is not None:
        ends = g.lengths
    else:
        return torch.full((batch, stores), keys, dtype=torch.int32, device=r.q.device)
    return ends.to(torch.int32).expand(batch, stores).contiguous()


def _near(r: Request) -> tuple[int, int] | None:
    """First and newest slots that are read besides the lists."""
    span = r.span
    if span is None or not isinstance(span.sink, int) or not isinstance(span.window, int) or span.beyond != 0:
        return None
    return span.sink, span.window


def _kernels(module: str) -> Any:
    from importlib import import_module

    found: ModuleType = import_module(f"foveate.attention.triton.{module}")
    return found
