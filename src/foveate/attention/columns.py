"""What an attention map says of its keys and queries, without the map: a second pass over the scores with a known lse.

Sums of columns, their share of the queries' entropy, and the entropies of the queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.attention.kernel import fold
from foveate.attention.scores import to_heads
from foveate.attention.selection import ALL, Geometry, Selection, Span
from foveate.attention.triton_prefill import machine
from foveate.errors import BadArgument, Refused

_FEWEST = 16
"""Fewest queries worth a kernel of their own."""


def columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    selection: Selection | Sequence[Selection] = ALL,
    geometry: Geometry | None = None,
    *,
    visible: Sequence[Span] = (),
    scale: float | None = None,
    softcap: float | None = None,
    valid: Tensor | None = None,
    each: bool = False,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Column sums of the attention map: for each key, the probabilities exp(score - lse) of all queries that read it.

    Goes query block by query block; no buffer grows with N x M. Parts of one read whose queries stand at different
    angles (a frame) take one call each, with the queries of the part and the lse of the whole: the sums add up.

    Args:
        q: [B, H, N, Dk]; k: [B, Hk, M, Dk], query head h reads head h // (H / Hk).
        lse: [B, H, N], of the whole read, all parts merged; -inf where a query saw nothing.
        selection: the pairs that were read; several must be disjoint.
        geometry, visible, scale, softcap: as given to `attend`.
        valid: int [B], how many of the N queries count in each row; None: all.
        each: a sum for each query head, instead of one for its group.
        entropy: sum p (lse - score) = -p ln p instead of p: what the key adds to the entropies of the queries, in nats.
            The sum over M is that of `entropies` of the queries that count.
        backend: "triton" for the kernel, which serves dense reads on CUDA unasked, or "torch"; None: whichever can.

    Returns:
        [B, Hk or H, M] float32 (float64 for float64), summed over the queries and the query heads of each group. The
        sum over M of probabilities is the number of queries that count, times H / Hk.

    Raises:
        BadArgument: shapes that do not fit each other, or no such backend.
        Refused: the kernel cannot serve this read.

    Source: accumulated attention scores of H2O (Zhang et al. 2023, section 4), computed here from lse.
    """
    (batch, heads), (k_heads, keys) = q.shape[:2], k.shape[1:3]
    asked = _Asked(q, k, lse, selection, geometry, visible, scale, softcap, valid)
    out = torch.zeros(batch, heads if each else k_heads, keys, dtype=asked.wide, device=q.device)
    if 0 in q.shape or keys == 0:
        return out
    slots = asked.one_list()
    if slots is not None:
        asked.take(slots)
        out = out.new_zeros(*out.shape[:2], slots.shape[-1])
    if asked.by_kernel(backend):
        from foveate.attention.triton.columns import column_sums

        out = column_sums(q, asked.k, lse, **asked.for_kernel, each=each, entropy=entropy)
    else:
        for _, _, weights in asked.weights():
            x = torch.special.entr(weights) if entropy else weights
            out[..., : x.shape[-1]] += x.unflatten(1, (out.shape[1], -1)).sum((2, 3))
    return out if slots is None else asked.spread(out, slots, k, entropy)


def entropies(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    selection: Selection | Sequence[Selection] = ALL,
    geometry: Geometry | None = None,
    *,
    visible: Sequence[Span] = (),
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entropy of each query's attention in nats: H = -sum p ln p = lse - sum p score, over the keys that it reads.

    0 where a query sees one key or none, ln of their number where it looks at all alike. Of parts of one read (frames,
    or queries that read other keys elsewhere) give the lse of the whole: what the parts return adds up.

    Args: as for `columns`.

    Returns:
        [B, H, N] float32 (float64 for float64).

    Raises:
        BadArgument: shapes that do not fit each other, or no such backend.
        Refused: the kernel cannot serve this read.
    """
    asked = _Asked(q, k, lse, selection, geometry, visible, scale, softcap, None)
    out = torch.zeros(q.shape[:3], dtype=asked.wide, device=q.device)
    if 0 in q.shape or k.shape[2] == 0:
        return out
    if asked.by_kernel(backend):
        from foveate.attention.triton.columns import row_entropies

        return row_entropies(q, k, lse, **asked.for_kernel)
    for start, stop, weights in asked.weights():
        out[:, :, start:stop] = torch.special.entr(weights).sum(-1)
    return out


class _Asked:
    """A checked read whose map is looked at.

    Attributes:
        wide: the type of the sums.
        factor: of the scores.
        slots: int64 [B, 1 or Hk, T], where the keys stand, where these are those of one list alone; as many as there
            are keys where there is none. None: each at its own number.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        selection: Selection | Sequence[Selection],
        geometry: Geometry | None,
        visible: Sequence[Span],
        scale: float | None,
        softcap: float | None,
        valid: Tensor | None,
    ) -> None:
        (batch, heads, queries, k_dim), (k_heads, keys) = q.shape, k.shape[1:3]
        if k.shape[0] != batch or k.shape[3] != k_dim or heads % k_heads:
            raise BadArgument("k", tuple(k.shape), f"it must fit q {tuple(q.shape)}")
        if lse.shape != q.shape[:3]:
            raise BadArgument("lse", tuple(lse.shape), f"one number per query: {tuple(q.shape[:3])}")
        if valid is not None and valid.shape != (batch,):
            raise BadArgument("valid", tuple(valid.shape), f"one number per row: ({batch},)")
        self.q, self.k, self.lse, self.valid = q, k, lse, valid
        self.geometry = geometry or Geometry(batch, queries, keys, device=q.device)
        self.selections = (selection,) if isinstance(selection, Selection) else tuple(selection)
        self.visible, self.softcap = visible, softcap
        self.factor = k_dim**-0.5 if scale is None else scale
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.slots: Tensor | None = None

    def one_list(self) -> Tensor | None:
        """The slots of the one list that all queries of a store head read, with at most their own key beside it:
        ascending, int64 [B, 1 or Hk, T], as many as there are keys behind the end. None: other pairs are read."""
        if len(self.selections) != 1 or not all(span.unbounded for span in self.visible):
            return None
        read, keys = self.selections[0], self.k.shape[2]
        lists = read.lists
        if lists is None or lists.shape[2] > 1 or lists.shape[1] not in (1, self.k.shape[1]):
            return None
        if read.span is not None and (read.span != Span(window=1) or self.geometry.k_positions is not None):
            return None
        slots = lists[:, :, 0, :, None].long() * read.k_block + torch.arange(read.k_block, device=lists.device)
        return slots.masked_fill(lists[:, :, 0, :, None] < 0, keys).flatten(-2).clamp_max(keys)

    def take(self, slots: Tensor) -> None:
        """Look at these keys alone."""
        self.slots = slots
        index = slots.clamp_max(self.k.shape[2] - 1).unsqueeze(-1).expand(-1, self.k.shape[1], -1, self.k.shape[3])
        self.k = self.k.gather(2, index)

    def spread(self, sums: Tensor, slots: Tensor, k: Tensor, entropy: bool) -> Tensor:
        """The sums [B, h, T] of keys of a list as those of all keys k, with those of the queries' own keys that are not
        listed: [B, h, M]."""
        batch, heads, _ = sums.shape
        keys = k.shape[2]
        out = sums.new_zeros(batch, heads, keys + 1)  # the last one for slots that are none
        out.scatter_(2, to_heads(slots, heads).expand(batch, heads, -1), sums)
        if self.selections[0].span is not None:
            listed = torch.zeros(batch, slots.shape[1], keys + 1, dtype=torch.bool, device=k.device)
            listed = listed.scatter_(2, slots.expand(batch, -1, -1), True).expand(-1, k.shape[1], -1)
            for own, weights in self._own(k, listed):
                x = torch.special.entr(weights) if entropy else weights
                out.scatter_add_(2, to_heads(own, heads).expand(-1, heads, -1), x.unflatten(1, (heads, -1)).sum(2))
        return out[..., :keys]

    def _own(self, k: Tensor, listed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Slots [B, 1 or Hk, n] of the queries' own keys, and what each gives to its own [B, H, n], 0 where it is
        listed (bool [B, Hk, M + 1]) or not seen: some queries at a time."""
        (batch, heads, queries, dim), k_heads = self.q.shape, k.shape[1]
        step = max(1, at_once(k.device) // (batch * heads * dim))
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            rows = self.geometry.rows(start, stop)
            own = rows.positions()[0].expand(batch, k_heads, -1)
            hidden = (own >= rows.ends()) | (own < 0)
            own = own.masked_fill(hidden, 0)
            mine = k.gather(2, own.unsqueeze(-1).expand(-1, -1, -1, dim)).to(self.wide).unsqueeze(2)
            scores = (self.q[:, :, start:stop].to(self.wide).unflatten(1, (k_heads, -1)) * mine).sum(-1) * self.factor
            weights = self._probabilities(scores.flatten(1, 2), start, stop)
            yield own, weights.masked_fill_(to_heads(hidden | listed.gather(2, own), heads), 0.0)

    def by_kernel(self, backend: str | None) -> bool:
        """Whether the kernel serves this read."""
        if backend not in (None, "triton", "torch"):
            raise BadArgument("backend", backend, "choose one of triton, torch")
        if backend == "torch":
            return False
        reads = (ALL,) if self.slots is not None else self.selections
        reason = machine(self.q, backend is not None) or _beyond_kernel(self.q, self.k, reads, self.visible)
        if backend is not None and reason:
            raise Refused(f"the kernel cannot sum these columns: {reason}")
        return not reason and (backend is not None or self.q.shape[2] >= _FEWEST) and self.k.shape[2] > 0

    @property
    def for_kernel(self) -> dict[str, Any]:
        from foveate.attention.triton.block_sparse_tiles import Place

        at = Place(self.geometry.first, self.geometry.lengths)
        given: dict[str, Any] = {"scale": self.factor, "softcap": self.softcap, "at": at, "valid": self.valid}
        if self.slots is not None:
            given |= {"slots": self.slots.int().expand(self.q.shape[0], -1, -1), "held": self.geometry.keys}
        return given

    def weights(self) -> Iterator[tuple[int, int, Tensor]]:
        """Probabilities [B, H, stop - start, end] of queries start..stop-1 for the first `end` keys, block by block."""
        (batch, heads, queries, _), (k_heads, keys) = self.q.shape, self.k.shape[1:3]
        turned = self.k.to(self.wide).transpose(-1, -2)
        step = max(1, at_once(self.q.device) // max(1, batch * heads * keys))
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            end = keys - queries + stop if self.geometry.plain and self.slots is None else keys
            rows = self.q[:, :, start:stop].to(self.wide)
            scores = (fold(rows, k_heads) @ turned[..., :end]).mul_(self.factor).view(batch, heads, stop - start, end)
            weights = self._probabilities(scores, start, stop)
            yield start, stop, weights.masked_fill_(~to_heads(self._mask(start, stop)[..., :end], heads), 0.0)

    def _mask(self, start: int, stop: int) -> Tensor:
        """The pairs of queries start..stop-1, bool [1 or B, 1, Hk or H, n, M or T]."""
        if self.slots is None:
            return _union(self.selections, self.geometry, self.visible, start, stop)
        return self.slots.unsqueeze(2) < self.geometry.rows(start, stop).ends().unsqueeze(3)

    def _probabilities(self, scores: Tensor, start: int, stop: int) -> Tensor:
        """exp(score - lse), in place, of scores [B, H, n, ...] of queries start..stop-1; 0 where a query does not count
        or saw nothing."""
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        mass = self.lse[:, :, start:stop].to(self.wide)
        counts = mass > -torch.inf
        if self.valid is not None:
            counts = counts & (torch.arange(start, stop, device=self.q.device) < self.valid.view(-1, 1, 1))
        mass = torch.where(counts, mass, torch.inf)
        return scores.sub_(mass.view(*mass.shape, *(1,) * (scores.dim() - 3))).exp_()


def _beyond_kernel(q: Tensor, k: Tensor, selections: Sequence[Selection], visible: Sequence[Span]) -> str:
    spans = [*visible, *(selection.span for selection in selections if selection.span is not None)]
    if len(selections) > 1 or any(x.lists is not None for x in selections) or not all(x.unbounded for x in spans):
        return "it reads all causal pairs"
    if q.stride(3) != 1 or k.stride(3) != 1:
        return "numbers of one head must lie side by side"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "it has no gradients"
    return ""


def _union(
    selections: Sequence[Selection], geometry: Geometry, visible: Sequence[Span], start: int, stop: int
) -> Tensor:
    """What queries start..stop-1 read of all selections together: bool [1 or B, 1, Hk or H, stop - start, M]."""
    rows = geometry.rows(start, stop)
    masks = [selection.rows(start, stop).seen(rows, visible) for selection in selections]
    heads = max(mask.shape[1] for mask in masks)
    union = to_heads(masks[0], heads)
    for mask in masks[1:]:
        union = union | to_heads(mask, heads)
    return union
