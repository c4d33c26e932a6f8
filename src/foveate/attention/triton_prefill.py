"""The Triton backend of long reads: block-sparse attention over lists and spans, forward and backward."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from foveate.attention.regrained import keys_of, queries_of, regrained
from foveate.attention.request import Request
from foveate.attention.selection import Partial, Span

name = "triton"

_FEWEST = 16
"""Fewest queries worth a tile."""
_WIDEST = 256
"""Widest head that fits the chip's memory."""
_ALL = 1 << 30
"""Queries of one list for all of them, whatever their number, so that no length has kernels of its own."""


def can_run(request: Request) -> tuple[bool, str]:
    """Lists of aligned blocks, beside a span or alone, and reads of one span, on CUDA; forced, in Triton's interpreter
    too."""
    r = request
    reason = machine(r.q, r.forced) or _read(r) or _span(r)
    return (False, reason) if reason else (True, "")


def machine(q: Tensor, forced: bool) -> str:
    """Why Triton's kernels cannot run on queries like these, or nothing."""
    if not _installed():
        return "Triton is not installed"
    device = q.device.type
    if device != "cuda" and not (forced and device == "cpu" and _interpreted()):
        return f"on {device} its kernels run in Triton's interpreter alone (TRITON_INTERPRET=1), when forced"
    if q.dtype == torch.float64:
        return "it knows no float64"
    if q.shape[3] > _WIDEST:
        return f"heads wider than {_WIDEST}"
    return ""


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _read(r: Request) -> str:
    if r.bias is not None:
        return "it adds no bias to scores"
    if not r.scale > 0:
        return f"the scale {r.scale} is not above 0"
    if any(x.stride(3) != 1 and x.shape[3] > 1 for x in (r.q, r.k, r.v)):
        return "numbers of one head must lie side by side"
    if r.v.shape[3] > _WIDEST:
        return f"heads wider than {_WIDEST}"
    if r.q.shape[2] < _FEWEST and not r.forced:
        return f"fewer than {_FEWEST} queries"
    if r.lists is None:
        return "" if len(r.visible) == 1 else "it reads lists, or a single span"
    if r.visible:
        return "it takes no spans that narrow lists"
    per, size = queries_of(r.q_block), keys_of(r.k_block)
    alone = r.span is None and not (torch.is_grad_enabled() and _trains(r))  # others are not told in other blocks
    if per != r.q_block and not (alone and _fills(r, per)):
        return f"q_block {r.q_block} is none of 16, 32, 64 and multiples of 128"
    if size != r.k_block and not alone:
        return f"k_block {r.k_block} is neither a power of two up to 128 nor a multiple of it"
    return ""


def _fills(r: Request, per: int | None) -> bool:
    """Whether blocks of `per` queries are filled at least by half, and end alike for all heads."""
    g = r.geometry
    alike = all(x is None or x.shape[1] == 1 for x in (g.first, g.lengths))
    return alike and per is not None and r.q_block is not None and per <= 2 * r.q_block


def _span(r: Request) -> str:
    span = span_of(r)
    if span is None:
        return ""
    if any(isinstance(x, Tensor) for x in (span.sink, span.window, span.beyond)):
        return "spans that differ by head"
    if r.geometry.k_positions is not None:
        return "a span over slots that do not stand at their own positions"
    if torch.is_grad_enabled() and _trains(r):
        return "no gradients through spans"
    return ""


def _trains(r: Request) -> bool:
    return any(x.requires_grad for x in (r.q, r.k, r.v))


def span_of(r: Request) -> Span | None:
    """The span that is read beside the lists, or alone."""
    return r.visible[0] if r.lists is None and r.visible else r.span


def run(request: Request) -> Partial:
    """One kernel over all tiles, after one that counts what each tile reads."""
    r, ends, row = request, None, None
    if r.lists is not None and (queries_of(r.q_block), keys_of(r.k_block)) != (r.q_block, r.k_block):
        r, ends, row = regrained(r)
    out, lse = _Read.apply(r.q, r.k, r.v, r, ends)  # type: ignore[misc]
    if row is not None:
        out, lse = out.index_select(2, row), lse.index_select(2, row)
    return Partial(out, lse)


def _arguments(r: Request, ends: Tensor | None) -> dict[str, Any]:
    from foveate.attention.triton.block_sparse_tiles import Place

    g = r.geometry
    queries = r.q.shape[2]
    if r.lists is None:
        lists = torch.empty(r.q.shape[0], 1, 1, 0, dtype=torch.int32, device=r.q.device)
        q_block, k_block = None, 64
    else:
        lists, q_block, k_block = r.lists.int(), r.q_block, r.k_block
        lists = lists if lists.stride(3) == 1 else lists.contiguous()
    span = span_of(r)
    positions = g.q_positions if span is not None else None
    return {
        "lists": lists,
        "q_block": q_block if q_block is not None else -(-queries // 128) * 128 if _trains(r) else _ALL,
        "k_block": k_block,
        "scale": r.scale,
        "softcap": r.softcap,
        "at": Place(g.first, g.lengths, None if positions is None else positions.contiguous(), span, ends),
    }


class _Read(torch.autograd.Function):
    """Forward and backward of a request; its tensors are given beside it so that gradients find them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, request: Request, ends: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from foveate.attention.triton import block_sparse

        ctx.arguments = _arguments(request, ends)
        out, lse = block_sparse.forward(q, k, v, **ctx.arguments)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from foveate.attention.triton import block_sparse_backward

        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = block_sparse_backward.backward(
            q, k, v, out=out, lse=lse, grad_out=grads[0], grad_lse=grads[1], **ctx.arguments
        )
        return grad_q, grad_k, grad_v, None, None
