"""`attend`: the one primitive through which every method reads keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from foveate.attention.backends import choose
from foveate.attention.request import normal
from foveate.attention.selection import ALL, Geometry, Partial, Selection, Span
from foveate.errors import BadArgument

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection = ALL,
    geometry: Geometry | None = None,
    *,
    visible: Sequence[Span] = (),
    k_map: Sequence[int] | None = None,
    v_map: Sequence[int] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    lse: bool = True,
    backend: str | None = None,
) -> Partial:
    """Softmax attention over the pairs of a selection.

    Heads of K and V may be shared in any way, Dk may differ from Dv, and V may be a view of K, so that MHA, GQA, MQA,
    SQA, DiffQKV, DHA and both forms of MLA are the same call.

    The selection's frame is not looked at: whoever has one moves the queries first. Slots that nobody reads must hold
    finite numbers, since a read under a mask touches them; only lists served by "gather" never do.

    Args:
        q: [B, H, N, Dk], already rotated.
        k: [B, Hk, M, Dk].
        v: [B, Hv, M, Dv].
        selection: pairs to read; the default is every causal pair.
        geometry: where queries and keys stand; None: the N queries are the last N of M keys. Whatever it and the spans
            give per store head has 1 or Hk heads. Leave its tensors None where the default is meant: it is faster.
        visible: further spans, intersected with the selection.
        k_map: the head of K that each query head reads, H ints; None: h // (H / Hk).
        v_map: the same for V and Hv.
        scale: factor of the scores; None: Dk ** -0.5.
        bias: float, added to the scaled and capped scores, broadcastable to [B, H, N, M] (head axis 1, Hk or H).
        softcap: scores become softcap * tanh(scores / softcap).
        lse: False allows lse=None in the result, which saves work on some devices.
        backend: force one by name ("triton", "decode", "flex", "gather", "sdpa"); None: the first that can run.

    Returns:
        out [B, H, N, Dv] in the dtype of q, lse [B, H, N] in float32 (float64 for float64). Where a query sees nothing,
        out is 0 and lse is -inf.

    Raises:
        BadArgument: shapes, dtypes, maps or lists that do not fit each other.
        Refused: the forced backend cannot serve this read.
    """
    k_map = None if k_map is None else tuple(k_map)
    v_map = None if v_map is None else tuple(v_map)
    _check(q, k, v, k_map, v_map, bias, softcap)
    batch, heads, queries, k_dim = q.shape
    keys = k.shape[2]
    if geometry is None:
        geometry = Geometry(batch, queries, keys, device=q.device)
    elif (geometry.batch, geometry.queries, geometry.keys) != (batch, queries, keys):
        given = (geometry.batch, geometry.queries, geometry.keys)
        raise BadArgument("geometry", given, f"q and k have batch, queries, keys = {(batch, queries, keys)}")
    if geometry.plain and queries > keys:
        raise BadArgument("q", tuple(q.shape), f"{queries} queries need at least as many keys, k has {keys}; "
                          "a geometry with `first` says otherwise")  # fmt: skip
    if selection.lists is not None:
        _check_lists(selection, batch, heads, k.shape[1], queries, keys)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        empty = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        return Partial(q.new_zeros(batch, heads, queries, v.shape[3]), empty)
    factor = k_dim**-0.5 if scale is None else float(scale)
    forced = backend is not None
    request = normal(q, k, v, selection, geometry, visible, k_map, v_map, factor, bias, softcap, lse, forced)
    with _on(q):
        return choose(request, backend).run(request)


def _on(q: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current GPU, wherever their tensors are."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(q)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_map: tuple[int, ...] | None,
    v_map: tuple[int, ...] | None,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise BadArgument(name, tuple(x.shape), "it must have four axes: batch, heads, tokens, head size")
        if x.dtype != q.dtype or x.device != q.device:
            raise BadArgument(
                name, f"{x.dtype} on {x.device}", f"q is {q.dtype} on {q.device}: bring all three together"
            )
    if q.dtype not in _DTYPES:
        raise BadArgument("q", str(q.dtype), "attention is computed in float32, bfloat16, float16 or float64")
    (batch, heads, queries, k_dim), (_, k_heads, keys, _), v_heads = q.shape, k.shape, v.shape[1]
    if k.shape[0] != batch or k.shape[3] != k_dim:
        raise BadArgument("k", tuple(k.shape), f"batch and head size must be those of q {tuple(q.shape)}")
    if v.shape[0] != batch or v.shape[2] != keys:
        raise BadArgument("v", tuple(v.shape), f"batch and tokens must be those of k {tuple(k.shape)}")
    for name, given, count in (("k", k_map, k_heads), ("v", v_map, v_heads)):
        if given is None:
            if count == 0 or heads % count:
                raise BadArgument(name, f"{count} heads", f"it must divide the {heads} query heads, or give {name}_map")
        elif len(given) != heads or not all(0 <= head < count for head in given):
            raise BadArgument(f"{name}_map", given, f"give {heads} heads (one per query head) in 0..{count - 1}")
    if bias is not None:
        fits = bias.dim() == 4 and all(
            have in (1, want) for have, want in zip(bias.shape, (batch, bias.shape[1], queries, keys), strict=True)
        )
        if not fits or bias.shape[1] not in (1, k_heads, heads):
            raise BadArgument("bias", tuple(bias.shape), f"it must broadcast to {(batch, heads, queries, keys)}")
        if not bias.is_floating_point():
            raise BadArgument("bias", str(bias.dtype), "give a float tensor; what is not to be seen is -inf")
    if softcap is not None and not softcap > 0:
        raise BadArgument("softcap", softcap, "it must be above 0, or None")


def _check_lists(selection: Selection, batch: int, heads: int, k_heads: int, queries: int, keys: int) -> None:
    lists, q_block, k_block = selection.lists, selection.q_block, selection.k_block
    assert lists is not None
    if k_block < 1 or (q_block is not None and q_block < 1):
        raise BadArgument("selection", f"q_block {q_block}, k_block {k_block}", "blocks hold at least one token")
    blocks = 1 if q_block is None else -(-queries // q_block)
    fits = lists.dim() == 4 and lists.shape[0] == batch and lists.shape[1] in (1, k_heads, heads)
    if not fits or lists.shape[2] != blocks:
        want = f"[{batch}, 1, {k_heads} or {heads}, {blocks}, K]"
        raise BadArgument("selection.lists", tuple(lists.shape), f"with {queries} queries, q_block {q_block}: {want}")
    if lists.dtype not in (torch.int32, torch.int64):
        raise BadArgument("selection.lists", str(lists.dtype), "block numbers are int32")
    if selection.counts is not None and selection.counts.shape != lists.shape[:3]:
        raise BadArgument("selection.counts", tuple(selection.counts.shape), f"the lists want {tuple(lists.shape[:3])}")
    # On a GPU the largest number would have to be waited for.
    if lists.device.type == "cpu" and lists.numel() and int(lists.max()) * k_block >= keys:
        raise BadArgument(
            "selection.lists", int(lists.max()), f"{keys} keys have {-(-keys // k_block)} blocks of {k_block}"
        )
