"""What a method sees of one layer: its readable tokens, new ones included, every row from slot 0."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.cache.store import Store


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
        return torch.from_numpy(self.host_lengths.astype(np.int32)).to(self._store.bands[0].device)

    @property
    def fresh(self) -> Tensor:
        """How many tokens this forward added, int32 [B]."""
        return torch.from_numpy(self.host_fresh.astype(np.int32)).to(self._store.bands[0].device)

    @property
    def capacity(self) -> int:
        """C: slots of the padded tensors below."""
        return max(band.used for band in self._store.bands)

    @property
    def longest(self) -> int:
        """Tokens of the longest row so far, evicted ones counted; a host integer."""
        return int(self._store.seen.max(initial=0))

    @property
    def aligned(self) -> bool:
        """Every head of a row holds the same tokens in the same slots."""
        return self._store.aligned

    @property
    def seen(self) -> Tensor:
        """Tokens of each row so far, evicted ones counted, int64 [B]: position of the next token."""
        return torch.from_numpy(self._store.seen).to(self._store.bands[0].device)

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
