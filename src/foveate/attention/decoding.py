"""The decoding backend: one query per row, split over the keys it reads, lengths and lists on the device (Triton)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.attention.request import Request
from foveate.attention.selection import Partial

if TYPE_CHECKING:
    from foveate.attention.triton.list_weights import Scored

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
    if not pages(r.k_block):
        return False, f"blocks of {r.k_block} slots are not a power of two up to {_PAGE}"
    if r.span is not None and (_near(r) is None or r.geometry.k_positions is not None):
        return False, "the span beside the lists is none of slots"
    return True, ""


def pages(size: int) -> bool:
    """Whether listed blocks of `size` slots are read."""
    return size <= _PAGE and not size & (size - 1)


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
    return bool(import_module("triton.knobs").runtime.interpret)


def run(request: Request) -> Partial:
    """One launch over all pairs, and one that merges."""
    r = request
    lengths = _lengths(r)
    k, v = r.k.flatten(0, 1), r.v.flatten(0, 1)
    if r.lists is None:
        ragged = _kernels("decode")
        return Partial(*ragged.decode_ragged(r.q, ragged.Stores(k, v, lengths.flatten()), r.scale, r.softcap))
    lists = r.lists[:, :, 0].to(torch.int32)
    counts = (lists >= 0).sum(-1, dtype=torch.int32) if r.counts is None else r.counts[:, :, 0].to(torch.int32)
    listed = _kernels("decode_lists").decode_lists
    return Partial(
        *listed(r.q, k, v, lists, counts, lengths, page=r.k_block, near=_near(r), scale=r.scale, softcap=r.softcap)
    )


class Held:
    """Bands of a store, and what is counted for their pairs, as the kernels read and fill them. It holds addresses:
    make it anew when a band moves.

    Args:
        stores: `triton.decode.Stores`; counters: `triton.arrive.Counters`; sizes: pairs of each band.
        columns: tags of one float32 number per slot: by name those of any band, and where each pair's begin.
    """

    def __init__(
        self, stores: Any, counters: Any, sizes: Sequence[int], columns: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        self.stores, self.counters, self.columns = stores, counters, columns
        self.slots: tuple[Tensor, ...] = counters.slots.split(list(sizes))
        """By band, where the newest token of each pair went, int32 [P]."""

    def attend(self, q: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention of q [B, H, 1, Dk] over all that is held: [B, H, 1, Dv]."""
        return _kernels("decode").decode_ragged(q, self.stores, scale, softcap, sinks)[0]

    def weigh(
        self, q: Tensor, width: int, scale: float, softcap: float | None, sinks: Tensor | None, *, probs: bool, add: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`attend` with its lse [B, H, 1], and what the slots weighed.

        Args:
            width: slots of the widest band.
            probs: return the probabilities, float32 [B, H, 1, width].
            add: add to this one of `columns`, of all query heads of a group; "": to none.
        """
        if not probs and not add:
            return (*_kernels("decode").decode_ragged(q, self.stores, scale, softcap, sinks), None)
        weights = _kernels("decode_weights")
        out, lse, scores = weights.decode_scored(q, self.stores, width, scale, softcap, sinks)
        if add:
            weights.add_mass(scores, lse, self.stores, *self.columns[add])
        return out, lse, weights.probabilities(scores, lse, self.stores) if probs else None

    def scored(self, q: Tensor, width: int, scale: float, softcap: float | None) -> Scored:
        """`attend` with the scores of the slots; without sinks."""
        weights = _kernels("decode_weights")
        return _kernels("list_weights").Scored(*weights.decode_scored(q, self.stores, width, scale, softcap))

    def listed(
        self, q: Tensor, lists: Tensor, counts: Tensor, windows: Tensor, width: int, scale: float,
        softcap: float | None, *, scored: bool,
    ) -> Scored:  # fmt: skip
        """Attention of q [B, H, 1, Dk] over single slots of one band that holds every pair, each store head over its
        list and its newest slots; see `triton.list_weights.decode_lists_scored`."""
        held = self.stores
        return _kernels("list_weights").decode_lists_scored(
            q, held.k, held.v, lists, counts, held.lengths, windows, width, scale, softcap, scored=scored
        )

    def token_weights(self, read: Scored, heads: Tensor, recent: int, *, mean: bool) -> Tensor:
        """What store heads (int32 [n]) of one band looked at, [B, n, S]; see `triton.list_weights.token_weights`."""
        return _kernels("list_weights").token_weights(read, self.stores.lengths, heads, recent, mean=mean)

    def replace_least(self, lists: Tensor, read: Scored, *, mean: bool) -> None:
        """The newest token takes the place of the least attended one of each list, in place; see
        `triton.list_weights.replace_least`."""
        _kernels("list_weights").replace_least(lists, read, self.stores.lengths, mean=mean)

    def arrive(self, k: Tensor, v: Tensor | None, turn: Any = None) -> None:
        """Take in a token of every pair: k [B, Hs, 1, Dk], v [B, Hs, 1, Dv] or None; its tags are filled if they are
        `tagged`, and the extremes of its block are brought up to date if they are known.

        Args:
            turn: `triton.arrive.Turn`, by which keys are turned on the way and queries in place.
        """
        _kernels("arrive").arrive(k, v, self.stores, self.counters, turn)

    @property
    def tagged(self) -> bool:
        """Whether tags come and go with the tokens here, and not elsewhere."""
        return self.counters.tags is not None

    def evict(self, scores: Tensor, sink: int, recent: Tensor, *, newest: bool = False) -> tuple[Tensor, ...]:
        """Free the token with the least score [B, Hs, C] of each pair, or its newest, which else takes that one's slot.
        It moves with its tags if they are `tagged`.

        Args:
            sink, recent: the first and the newest (int64 [B]) are never freed.

        Returns:
            By band the slots that were freed, int32 [P].
        """
        module = _kernels("evict")
        slots: Tensor = module.evict(scores, module.Guard(sink, recent), self.stores, self.counters, newest=newest)
        return slots.split([len(x) for x in self.slots])


def held(
    bands: Sequence[tuple[Tensor, Tensor, Tensor]],
    counts: tuple[Tensor, Tensor, Tensor],
    rings: Sequence[Tensor | None],
    positions: Sequence[Tensor | None],
    tags: Sequence[Mapping[str, tuple[Tensor, float]]],
    extremes: Sequence[Tensor] = (),
    block: int = 0,
) -> Held:
    """Bands of k [P, C, Dk], v [P, C, Dv] and pair numbers [P].

    Args:
        counts: of all pairs, band by band: slots in use (int32), tokens seen and turns of full windows (int64).
        rings: by band the slots of full windows in the order in which they are overwritten, int64 [P, W].
        positions: by band int32 [P, C].
        tags: by band and name values [P, C, width], and what fills those of a new token.
        extremes: by band minima and maxima of the keys of each block of `block` slots, [P, n, 2 Dk].
    """
    sizes = [len(band[2]) for band in bands]
    stores, arrive = _kernels("decode").Stores.of(bands, counts[0]), _kernels("arrive")
    words = arrive.tags_of([list(band.values()) for band in tags])
    ends = arrive.Extremes(*arrive.reached(extremes, sizes, counts[0].device), block) if extremes else None
    counters = arrive.counters(*counts, rings, positions, sizes, words, ends)
    plain = [name for name, (x, _) in tags[0].items() if x.dtype == torch.float32 and x.shape[2:] == (1,)]
    columns = {name: arrive.reached([band[name][0] for band in tags], sizes, counts[0].device) for name in plain}
    return Held(stores, counters, sizes, columns)


def merges(parts: Sequence[Partial]) -> bool:
    """Whether `merged` serves these: a few, that nobody trains through."""
    (out, lse, *_), count = parts[0], len(parts)
    if not 2 <= count <= 4 or out.dim() != 4 or 0 in out.shape or not serves(out)[0]:
        return False
    alike = all(p.out.dtype == out.dtype and p.lse.dtype == lse.dtype == torch.float32 for p in parts)
    return alike and not any(x.requires_grad for p in parts for x in (p.out, p.lse))


def merged(parts: Sequence[Partial]) -> Partial:
    """What `foveate.attention.merge` gives, in one launch."""
    return Partial(*_kernels("merge_parts").merge_parts([p.out for p in parts], [p.lse for p in parts]))


def ragged(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, softcap: float | None) -> Partial:
    """Attention of q [P, G, 1, Dk] over the first `lengths` (int32 [P]) slots of k [P, C, Dk] and v [P, C, Dv]."""
    kernels = _kernels("decode")
    return Partial(*kernels.decode_ragged(q, kernels.Stores(k, v, lengths), scale, softcap))


def window(
    q: Tensor, k: Tensor, v: Tensor, sink: int, place: Tensor, seen: Tensor, frequencies: Tensor, *, last: bool,
    scale: float, softcap: float | None,
) -> Partial:  # fmt: skip
    """Attention of q [B, H, 1, Dk] over slots that are all in use, the first `sink` of them met from position `place`
    (int64 [B]); see `triton.decode_window.decode_window`."""
    read = _kernels("decode_window").decode_window
    return Partial(*read(q, k, v, sink, place, seen, frequencies, last=last, scale=scale, softcap=softcap))


def best(scores: Tensor, k: int, limits: Tensor | None = None, *, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """The k best of each row of scores [..., n], exactly, the first of equal ones: int32 [..., min(k, n)], ascending,
    -1 behind the end, and how many they are [...]; -inf is never chosen, and no more of a row than `limits` [...]. It
    helps to know of `coarse` scores that bfloat16 can hold them."""
    chosen: tuple[Tensor, Tensor] = _kernels("topk").select_best(scores, k, limits, coarse=coarse)
    return chosen


def page_bounds(q: Tensor, summary: Tensor, lengths: Tensor, page: int, *, group: bool) -> Tensor:
    """The largest q·k of any key in each page, from minima and maxima [B * Hs, pages, 2 D] of its keys: float32
    [B, H, pages], or [B, Hs, pages] by `group`; +inf for the newest page, -inf behind it."""
    return _kernels("topk").page_bounds(q, summary, lengths, page, group=group)


def page_weights(probs: Tensor, lengths: Tensor, page: int, recent: int) -> Tensor:
    """The largest probability of any head, summed over the tokens of each page: probs [B, H, 1, C], lengths int32 [B]
    of all heads, pages a power of two -> float32 [B, pages]; +inf for the `recent` newest pages, -inf behind them."""
    return _kernels("decode_weights").page_weights(probs, lengths, page, recent)


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
    found: ModuleType = import_module(f"foveate.attention.triton.{module}")
    return found


def packed(
    q: Tensor,
    keys: Sequence[Any],
    values: Sequence[Any],
    lengths: Tensor,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of q [P, G, 1, Dk] over tokens in few bits and the exact ones behind them, of one pair per row.

    Args:
        keys, values: the fields of `triton.decode_packed.PackedSide`.
    """
    kernels = _kernels("decode_packed")
    sides = kernels.PackedSide(*keys), kernels.PackedSide(*values)
    return Partial(*kernels.decode_packed(q, *sides, lengths, scale, softcap))


def packs(bits: int, group: int, exact: int) -> bool:
    """Whether `arrive_packed` packs tokens in these bits, with so many channels per scale and newest exact tokens."""
    return _installed() and _kernels("arrive_packed").serves(bits, group, exact)


def arrive_packed(
    k: Tensor, v: Tensor | None, sides: Sequence[Sequence[Any]], lengths: Tensor, seen: Tensor, positions: Tensor | None
) -> None:
    """Take in a token of every pair, k [P, 1, Dk] and v [P, 1, Dv] or None, and pack those that leave the exact tail.

    Args:
        sides: the fields of `triton.arrive_packed.PackedArrival`, of keys and of values.
        lengths, seen: int32 and int64 [P], which grow by one; positions: int32 [P, C] or None.
    """
    kernels = _kernels("arrive_packed")
    keys, *values = (kernels.PackedArrival(*side) for side in sides)
    kernels.arrive_packed(k, v, keys, values[0] if values else None, lengths, seen, positions)
