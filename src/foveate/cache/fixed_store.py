"""A layer's store as a captured decode step sees it, and what methods see of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.attention import decoding
from foveate.cache.column import Counts
from foveate.cache.fixed import FixedBand
from foveate.cache.store import UNBOUNDED, Store
from foveate.cache.summaries import minmax
from foveate.cache.view import View
from foveate.errors import Refused


class FixedStore(Store):
    """A layer's store inside a captured step.

    Args:
        store: what holds the tokens.
        room: steps that can be made, if no token leaves.
        evicting: whether each step frees a token of every pair.
    """

    bands: list[FixedBand]  # type: ignore[assignment]

    def __init__(self, store: Store, room: int, evicting: bool = False) -> None:
        self.spec, self.rows, self.origin = store.spec, store.rows, store
        self.longest = int(store.seen.max(initial=0)) + 1
        """Tokens of the longest row in the step that is recorded."""
        self.room, self.until = room, UNBOUNDED
        """Most that it may have in a step that is replayed."""
        counts = [len(band.pairs) for band in store.bands]
        device = store.bands[0].device
        self.lengths_of_all = torch.zeros(sum(counts), dtype=torch.int32, device=device)
        """Slots in use by every pair, int32, band by band."""
        self.seen_of_all, self.turn_of_all = torch.zeros(2, sum(counts), dtype=torch.int64, device=device).unbind(0)
        parts = zip(*(x.split(counts) for x in (self.lengths_of_all, self.seen_of_all, self.turn_of_all)), strict=True)
        self.bands = [
            FixedBand(band, room, lengths, seen, turn, evicting)
            for band, (lengths, seen, turn) in zip(store.bands, parts, strict=True)
        ]
        self._kernels: decoding.Held | None = None
        self._folded = ""
        """The summary that the kernels keep up to date when a token arrives."""
        self.whole = store.aligned and not any(band.bounded for band in store.bands)

    @property
    def aligned(self) -> bool:
        return self.whole

    @property
    def stale(self) -> bool:
        """It is no longer where the layer's tokens are, or cannot take one more."""
        origin = self.origin
        if self.rows != origin.rows or len(self.bands) != len(origin.bands):
            return True
        if any(b.stale or b.band is not now for b, now in zip(self.bands, origin.bands, strict=True)):
            return True
        return int(origin.seen.max(initial=0)) + 1 > self.until

    def exceeds(self, tokens: int) -> bool:
        """Whether the longest row has more tokens than that: the answer holds for all steps that are replayed."""
        if self.longest <= tokens:
            self.until = min(self.until, tokens)
        return self.longest > tokens

    @property
    def kernels(self) -> decoding.Held | None:
        """All bands as the kernels read and fill them, or None where there are no kernels for them."""
        exact = all(band.exact for band in self.bands)
        blocks = self.bands[0].declared
        name = next((name for name, spec in blocks.items() if spec.fold is minmax), "")
        if self._kernels is None and exact and decoding.serves(self.bands[0].keys())[0]:
            self._kernels = decoding.held(
                [(b.keys(), b.values(), b.index) for b in self.bands],
                (self.lengths_of_all, self.seen_of_all, self.turn_of_all),
                [b.ring for b in self.bands],
                [None if b.positions is None else b.positions.data for b in self.bands],
                [{name: (c.data, c.column.fill) for name, c in b.marks.items()} for b in self.bands],
                [b.summaries[name] for b in self.bands] if name else (),
                blocks[name].size if name else 0,
            )
            self._folded = name
        return self._kernels

    @property
    def turns(self) -> bool:
        """Whether a token may come in before it is turned."""
        return self.kernels is not None

    def attend(self, q: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor | None:
        """All that is held, of all bands in one launch, q [B, H, 1, Dk] -> [B, H, 1, Dv]; None where no kernel can."""
        kernels = self.kernels
        return None if kernels is None else kernels.attend(q, scale, softcap, sinks)

    def weigh(
        self, q: Tensor, scale: float, softcap: float | None, sinks: Tensor | None, *, probs: bool, add: str
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """`attend` with the lse [B, H, 1] and, with `probs`, the probabilities over slots [B, H, 1, C], float32.

        Args:
            add: the tag of one number per slot to which they are added, of all query heads of a group; "": none.
        """
        kernels = self.kernels
        if kernels is None or (add and add not in kernels.columns):
            return None
        return kernels.weigh(q, max(b.used for b in self.bands), scale, softcap, sinks, probs=probs, add=add)

    def append(self, k: Tensor, v: Tensor | None, fresh: object = None, turn: Any = None) -> None:
        """Append one token of every row: k [B, Hs, 1, Dk], v [B, Hs, 1, Dv].

        Args:
            turn: what the keys and queries are still to be turned by (`decoding.Held.arrive`), where the kernels are.
        """
        kernels = self.kernels
        if kernels is not None:
            kernels.arrive(k, v, turn)
            for band, slot in zip(self.bands, kernels.slots, strict=True):
                if band.declared.keys() - {self._folded} or (band.tags and not kernels.tagged):
                    band.note(slot.long(), tagged=kernels.tagged, folded=self._folded)
            return
        flat_k, flat_v = k.flatten(0, 1), None if v is None else v.flatten(0, 1)
        for band in self.bands:
            if len(band.pairs) == flat_k.shape[0]:
                band.append(flat_k, flat_v)
            else:
                band.append(flat_k[band.index], None if flat_v is None else flat_v[band.index])

    def drop(self, slots: Tensor) -> None:
        """Free one slot of each (row, head) pair, [B, Hs]."""
        flat = slots.flatten()
        for band in self.bands:
            band.drop(flat[band.index])

    def evict(self, scores: Tensor, sink: int, recent: Tensor, *, newest: bool) -> bool:
        """Free the token of least score [B, Hs or 1, C] of each pair, or its newest. False where no kernel can.

        Args:
            sink, recent: the first and the newest (int64 [B]) are never freed.
        """
        kernels = self.kernels
        if kernels is None or any(band.positions is None for band in self.bands):
            return False
        scores = scores.expand(self.rows, self.spec.heads, -1)
        scores = scores if scores.stride(2) == 1 else scores.contiguous()
        for band, slot in zip(self.bands, kernels.evict(scores, sink, recent, newest=newest), strict=True):
            if band.declared or (band.tags and not kernels.tagged):
                band.dropped(slot.long(), tagged=kernels.tagged)
        return True

    def settled(self, rehearsing: bool = False) -> None:
        """What a step does to the tokens when it has attended."""
        for band in self.bands:
            band.settle(rehearsing)

    def newest(self, fresh: Counts) -> Tensor:
        return self.row_seen() - 1

    def row_seen(self) -> Tensor:
        """Position of each row's next token, int64 [B]."""
        heads = self.spec.heads
        out = torch.empty(self.rows * heads, dtype=torch.int64, device=self.bands[0].index.device)
        for band in self.bands:
            out[band.index] = band.seen
        return out.view(-1, heads)[:, 0]

    def counters(self) -> list[Tensor]:
        """What a step changes besides the slots that it fills."""
        found = [t for band in self.bands for t in band.counters]
        return found + [c.data for band in self.bands for c in band.marks.values()]


class FixedView(View):
    """What a method sees of a layer inside a captured step: device values only, the newest token included."""

    def __init__(self, store: FixedStore) -> None:
        super().__init__(store, np.ones(store.rows, dtype=np.int64))
        self._fixed = store

    @property
    def lengths(self) -> Tensor:
        bands = [band.device_lengths().unsqueeze(1) for band in self._fixed.bands]
        return self._fixed.grid(bands, fill=0).squeeze(2)

    @property
    def held(self) -> decoding.Held | None:
        return self._fixed.kernels if self.aligned and len(self._fixed.bands) == 1 else None

    @property
    def fresh(self) -> Tensor:
        return torch.ones(self._fixed.rows, dtype=torch.int32, device=self._fixed.bands[0].index.device)

    @property
    def seen(self) -> Tensor:
        """Position of the next token, int64 [B]."""
        return self._fixed.row_seen()

    @property
    def still(self) -> bool:
        return not any(band.cyclic or band.evicting for band in self._fixed.bands)

    @property
    def host_lengths(self) -> np.ndarray:
        raise Refused("a captured step knows no lengths on the host")

    @property
    def longest(self) -> int:
        raise Refused("a captured step knows no lengths on the host")

    def exceeds(self, tokens: int) -> bool:
        return self._fixed.exceeds(tokens)

    @property
    def reach(self) -> int:
        self._fixed.exceeds(self._fixed.longest + self._fixed.room)
        return self._fixed.longest + self._fixed.room
