"""What a method sees of one layer: its readable tokens, new ones included, every row from slot 0."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foveate.attention import decoding
from foveate.attention.sent import sent
from foveate.cache.place import PlacedColumn
from foveate.cache.store import Store


class Away(NamedTuple):
    """Keys that lie on the host.

    Args:
        k: [B, Hs, A, Dk], there.
        counts: how many of the A are real, int64 [B, Hs], there.
        first: they stand in slots first..first + count - 1.
    """

    k: Tensor
    counts: Tensor
    first: int


class View:
    """A layer's held tokens as padded tensors [B, Hs, C, ...]; without copies when all heads hold equally many.

    Slots behind `lengths` are padding. `Hs` is the number of store heads: kv heads, or 1 latent head under MLA.
    """

    def __init__(self, store: Store, fresh: np.ndarray) -> None:
        self._store = store
        self.host_fresh = fresh

    @property
    def host_lengths(self) -> np.ndarray:
        """int64 [B, Hs] on the host."""
        return self._store.lengths

    @property
    def lengths(self) -> Tensor:
        """Readable slots, int32 [B, Hs]."""
        return sent(self.host_lengths.astype(np.int32), self._store.bands[0].device)

    @property
    def fresh(self) -> Tensor:
        """How many tokens this forward added, int32 [B]."""
        return sent(self.host_fresh.astype(np.int32), self._store.bands[0].device)

    @property
    def capacity(self) -> int:
        """C: slots of the padded tensors below."""
        return max(band.used for band in self._store.bands)

    @property
    def longest(self) -> int:
        """Tokens of the longest row so far, evicted ones counted; a host integer."""
        return int(self._store.seen.max(initial=0))

    def exceeds(self, tokens: int) -> bool:
        """Whether the longest row has had more tokens than that. Where steps are recorded and replayed, ask this: when
        the answer changes, they are recorded anew."""
        return self.longest > tokens

    @property
    def reach(self) -> int:
        """No held token stands at this position or behind it; a host integer."""
        return self.longest

    @property
    def aligned(self) -> bool:
        """Every head of a row holds the same tokens in the same slots."""
        return self._store.aligned

    @property
    def still(self) -> bool:
        """Tokens are known to stay in their slots from step to step: where steps are recorded, it is known what they
        free. Elsewhere whoever remembers slots has to look whether some have moved."""
        return False

    @property
    def held(self) -> decoding.Held | None:
        """The tokens as kernels read them where they lie, in a step that is recorded and where all heads of a row hold
        the same tokens, in one band; else None."""
        return None

    @property
    def in_place(self) -> bool:
        """Every token stands in the slot of its position: none was evicted in front of another."""
        return all(band.positions is None for band in self._store.bands)

    @property
    def seen(self) -> Tensor:
        """Tokens of each row so far, evicted ones counted, int64 [B]: position of the next token."""
        return sent(self._store.seen, self._store.bands[0].device)

    @property
    def positions(self) -> Tensor:
        """Logical position of each slot, int32 [B, Hs, C]; padding slots read -1."""
        return self._store.grid([band.slot_positions() for band in self._store.bands], fill=-1)

    def valid(self) -> Tensor:
        """Slots in use, bool [B, Hs, C]."""
        return torch.arange(self.capacity, device=self.lengths.device) < self.lengths.unsqueeze(-1)

    def k(self) -> Tensor:
        """Keys as stored (rotated), decoded: [B, Hs, C, Dk]."""
        return self._store.grid([band.keys() for band in self._store.bands], fill=0.0)

    def v(self) -> Tensor:
        """Values, decoded: [B, Hs, C, Dv]."""
        return self._store.grid([band.values() for band in self._store.bands], fill=0.0)

    @property
    def away(self) -> Away | None:
        """Keys that lie on the host, without a copy when all heads have equally many there; None: there are none."""
        store, place = self._store, self._store.spec.place
        if place is None or not any(band.away.any() for band in store.bands):
            return None
        keys = []
        for band in store.bands:
            far = band.k.far.data if isinstance(band.k, PlacedColumn) else band.k.read(0).to(place.device)
            keys.append(far[:, : int(band.away.max(initial=0))])
        counts = sent(store.away, place.device)
        return Away(store.grid(keys, fill=0.0), counts, place.sink)

    def tag(self, name: str) -> Tensor:
        """A value per slot, [B, Hs, C, width]; `write` puts a changed one back."""
        return self._store.grid([band.tags[name].read(band.used) for band in self._store.bands], fill=0.0)

    def write(self, name: str, value: Tensor) -> None:
        """Replace the tag of every slot by value [B, Hs, C, width]."""
        for band, part in zip(self._store.bands, self._store.scatter(value), strict=True):
            band.tags[name].data[:, : band.used] = part

    def blocks(self, name: str) -> Tensor:
        """A summary per block, [B, Hs, ceil(C / size), F]; blocks without tokens are padding."""
        sizes = {name: spec.size for name, spec in self._store.spec.blocks.items()}
        return self._store.grid(
            [band.summaries[name][:, : -(-band.used // sizes[name])] for band in self._store.bands], fill=0.0
        )
