"""One attention call in its normal form: what `attend` hands to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from foveate.attention.selection import ALL, Geometry, Ints, Selection, Span, needed


@dataclass(frozen=True)
class Request:
    """One read. K and V have the same number of heads Hk, and query head h reads head h // (H / Hk).

    The pairs read are causal ∩ readable ∩ every span of `visible` ∩ (`lists` ∪ `span`); without lists, the first three.

    Args:
        q: [B, H, N, Dk].
        k: [B, Hk, M, Dk].
        v: [B, Hk, M, Dv].
        geometry: where queries and keys stand; its per-head tensors have 1 or Hk heads.
        visible: bounded spans; those that hide nothing were left out.
        lists, q_block, k_block, span, counts: as in `Selection`; lists have 1, Hk or H heads. `span` only beside lists.
        scale: factor of the scores.
        bias: added to the scaled (and capped) scores, broadcastable to [B, H, N, M], head axis 1, Hk or H.
        softcap: scores become softcap * tanh(scores / softcap).
        lse: whether the caller needs lse.
        forced: the caller named the backend, which may then serve what another one would serve better.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Geometry
    scale: float
    visible: tuple[Span, ...] = ()
    lists: Tensor | None = None
    q_block: int | None = None
    k_block: int = 1
    span: Span | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    lse: bool = True
    forced: bool = False
    counts: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, H, Hk, N, M."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def dense(self) -> bool:
        """Every causal pair is read."""
        return self.lists is None and not self.visible

    @property
    def math(self) -> bool:
        """Scores are changed before the softmax, which the ready-made kernels cannot do."""
        return self.bias is not None or self.softcap is not None

    @cached_property
    def selection(self) -> Selection:
        """The lists and the span as one Selection."""
        if self.lists is None:
            return ALL
        return Selection(self.lists, self.q_block, self.k_block, self.span, counts=self.counts)

    def seen(self, start: int, stop: int) -> Tensor:
        """The mask of queries start..stop-1: bool [1 or B, 1, Hk or H, stop - start, M]."""
        return self.selection.rows(start, stop).seen(self.geometry.rows(start, stop), self.visible)


def normal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    geometry: Geometry,
    visible: Sequence[Span],
    k_map: tuple[int, ...] | None,
    v_map: tuple[int, ...] | None,
    scale: float,
    bias: Tensor | None,
    softcap: float | None,
    lse: bool,
    forced: bool,
) -> Request:
    """The normal form of an attention call whose arguments have been checked (see `attend`)."""
    heads, k_heads = q.shape[1], k.shape[1]
    if bias is not None:
        bias = bias.to(torch.float64 if q.dtype == torch.float64 else torch.float32)  # the dtype of the scores
    if k_heads != v.shape[1] or k_map is not None or v_map is not None:
        k, v, store = _align(k, v, heads, k_map, v_map)
        if k_map is not None and bias is not None and bias.shape[1] not in (1, heads):
            bias = bias.index_select(1, torch.tensor(k_map, device=bias.device))
        if store is not None:
            selection, geometry, visible = _by_head(selection, geometry, visible, store, k_heads, heads)
    if selection.lists is None or (selection.span is not None and not _hides(selection.span, geometry)):
        # A span alone is one more bound on what is visible, and lists beside everything add nothing.
        spans = (*visible, selection.span) if selection.span is not None else tuple(visible)
        selection = ALL
    else:
        spans = tuple(visible)
    spans = needed([span for span in spans if _hides(span, geometry)])
    return Request(
        q=q,
        k=k,
        v=v,
        geometry=geometry,
        scale=scale,
        visible=spans,
        lists=selection.lists,
        q_block=selection.q_block,
        k_block=selection.k_block,
        span=selection.span if selection.lists is not None else None,
        bias=bias,
        softcap=softcap,
        lse=lse,
        forced=forced,
        counts=selection.counts if selection.lists is not None else None,
    )


def _hides(span: Span, geometry: Geometry) -> bool:
    """Whether the span can hide a pair that is not in the future. Never waits for a GPU."""
    if span.unbounded:
        return False
    if not isinstance(span.beyond, int) or span.beyond > 0:
        return True
    if not isinstance(span.window, int):
        return True
    if geometry.q_positions is None and geometry.first is None:
        # Key positions are not negative, so no distance exceeds the last query's position.
        return span.window < geometry.keys
    if geometry.q_positions is not None and geometry.q_positions.device.type == "cpu" and geometry.q_positions.numel():
        return span.window <= int(geometry.q_positions.max())
    return True


def _align(
    k: Tensor, v: Tensor, heads: int, k_map: tuple[int, ...] | None, v_map: tuple[int, ...] | None
) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    """K and V with the same heads, and for each of these the store head (head of K) that it comes from, or None if
    nothing moved. Copies only where heads are shared in a way that no kernel knows."""
    k_heads, v_heads = k.shape[1], v.shape[1]
    k_map = k_map if k_map is not None else grouped(heads, k_heads)
    v_map = v_map if v_map is not None else grouped(heads, v_heads)
    # The coarsest heads that both maps can be written in: runs of query heads that share K and V.
    for count in sorted({k_heads, v_heads, heads}):
        if heads % count:
            continue
        run = heads // count
        k_of, v_of = k_map[::run], v_map[::run]
        same = all(k_map[h] == k_of[h // run] and v_map[h] == v_of[h // run] for h in range(heads))
        if same:
            break
    else:  # unreachable: heads itself always fits
        raise AssertionError
    identity = tuple(range(count))
    store = None if k_of == identity and k_heads == count else k_of
    k = k if store is None else k.index_select(1, torch.tensor(k_of, device=k.device))
    v = v if v_of == identity and v_heads == count else v.index_select(1, torch.tensor(v_of, device=v.device))
    return k, v, store


def grouped(heads: int, store_heads: int) -> tuple[int, ...]:
    """The usual map: query head h reads store head h // (heads / store_heads)."""
    return tuple(h // (heads // store_heads) for h in range(heads))


def _by_head(
    selection: Selection, geometry: Geometry, visible: Sequence[Span], store: Sequence[int], k_heads: int, heads: int
) -> tuple[Selection, Geometry, tuple[Span, ...]]:
    """Everything that is given per store head, spread over heads of which the i-th reads store head `store[i]`."""
    moved = {}

    def spread(x: Tensor, dim: int) -> Tensor:
        if x.shape[dim] == 1:
            return x
        if x.device not in moved:
            moved[x.device] = torch.tensor(store, device=x.device)
        return x.index_select(dim, moved[x.device])

    def ints(x: Ints) -> Ints:
        return spread(x, 0) if isinstance(x, Tensor) and x.dim() else x

    def span(x: Span) -> Span:
        return Span(ints(x.sink), None if x.window is None else ints(x.window), ints(x.beyond))

    def per_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else spread(x, 1)

    geometry = replace(
        geometry,
        lengths=per_row(geometry.lengths),
        first=per_row(geometry.first),
        k_positions=per_row(geometry.k_positions),
    )
    if selection.span is not None:
        selection = replace(selection, span=span(selection.span))
    # Lists with as many heads as there are query heads speak of query heads, which no map moves.
    if selection.lists is not None and selection.lists.shape[1] not in (1, heads):
        counts = None if selection.counts is None else spread(selection.counts, 1)
        selection = replace(selection, lists=spread(selection.lists, 1), counts=counts)
    return selection, geometry, tuple(span(x) for x in visible)
