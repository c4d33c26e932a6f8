"""The context a method's hooks receive."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.attention import ALL, Parts
from foveate.cache import Store, View
from foveate.cache.fixed_store import FixedStore
from foveate.cache.remembered import State
from foveate.engine.read import Reading, head_columns, read
from foveate.engine.samples import NEVER
from foveate.methods.base import Result, Role
from foveate.methods.context import Rope
from foveate.models.shape import LayerShape


@dataclass
class LayerContext:
    """One method's view of one layer in one forward; see `methods.base.Context`."""

    id: str
    phase: str
    layer: int
    shape: LayerShape
    role: Role
    store: Store
    how: Reading
    rope: Rope
    own: State
    common: State
    scratch: dict[str, dict[str, Any]]
    window: Tensor | None = None
    window_seen: Tensor | None = None
    granted: np.ndarray | None = None
    samples: Tensor | None = None
    sample_order: Tensor | None = None
    ready: State = field(default_factory=dict)
    clock: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    looks: bool = True
    """Whether the host may look at values of the device."""

    def sure(self, flags: Tensor) -> bool:
        """Whether all flags are known to be set."""
        return self.looks and bool(flags.all())

    @property
    def seen(self) -> np.ndarray:
        if isinstance(self.store, FixedStore):
            return self.store.origin.seen
        return self.store.seen - self.how.fresh

    @property
    def scale(self) -> float:
        return self.how.scale

    @property
    def softcap(self) -> float | None:
        return self.how.softcap

    @property
    def window_valid(self) -> Tensor | None:
        """Which of the window's queries are real, bool [B, W]: prompts may be shorter than the window."""
        if self.window is None or self.window_seen is None:
            return None
        width = self.window.shape[2]
        return torch.arange(width, device=self.window.device) >= width - self.window_seen[:, None]

    @property
    def samples_valid(self) -> Tensor | None:
        """Which of the samples are queries, bool [B, n]: prompts may be shorter than that."""
        return None if self.sample_order is None else self.sample_order < NEVER

    @property
    def prepared(self) -> dict[str, Tensor]:
        return self.ready.get(self.id, {})

    @property
    def limit(self) -> Tensor | None:
        """Tokens per head that this layer may hold, int64 [B]."""
        return None if self.granted is None else torch.from_numpy(self.granted)

    @property
    def mine(self) -> dict[str, Tensor]:
        return self.own.setdefault(self.id, {})

    @property
    def shared(self) -> dict[str, Tensor]:
        return self.common.setdefault(self.id, {})

    @property
    def forward(self) -> dict[str, Any]:
        return self.scratch.setdefault(self.id, {})

    def attend(self, q: Tensor, view: View, parts: Parts, *, probs: bool = False, keys: Tensor | None = None) -> Result:
        """Attend now, over a part that `select` then returns as a Partial; to other keys than those held, if given."""
        # Learned sinks take their mass once, when all parts are merged.
        how = replace(self.how, sinks=None)
        return read(self.store, q, parts, how, lse=True, probs=probs, keys_instead=keys)

    def columns(self, q: Tensor, lse: Tensor) -> Tensor:
        """Attention mass of each slot over this forward's real queries, all of which read all that they may."""
        return head_columns(self.store, q, ALL, lse, self.how)

    @property
    def counts(self) -> bool:
        """Whether somebody counts."""
        return self.how.meter is not None

    def count(self, amount: float, of: str = "read") -> None:
        """Say how many query-key pairs a Partial read that the method attended by itself, or how much of another cost
        arose."""
        if self.how.meter is not None:
            self.how.meter(float(amount), of)
