"""One forward of a model, as its layers see it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.cache import FoveateCache
from foveate.cache.remembered import State, brought
from foveate.engine.rows import Rows
from foveate.errors import Refused

if TYPE_CHECKING:
    from foveate.engine.binding import Binding


class Call:
    """One forward of the model: which cache it fills, and what kind of tokens it brings.

    Args:
        binding: the methods at work (those of the cache).
        cache: None for forwards without one, which read sparsely but hold nothing.
        queries: columns N of this forward.
    """

    def __init__(self, binding: Binding, cache: FoveateCache | None, queries: int) -> None:
        self.binding, self.cache, self.queries = binding, cache, queries
        self.scratch: dict[str, dict[str, Any]] = {}
        self.common: State = {}
        self.rows: Rows | None = None
        self.complete = False
        self.admitted = False
        """There is room for its tokens."""
        self.dense = False
        """Nobody selects: it corrects what was decoded sparsely."""
        self.pieces: tuple[Call, ...] = ()
        """The prompt and what follows it, where one forward brings both (candidates of assisted decoding)."""
        self.device: torch.device | None = None
        """Where the layer before lies."""
        if cache is None:
            self.phase = "prompt"
            return
        if len({layer.columns for layer in cache.couriers()}) > 1:
            raise Refused("the last forward of this cache did not finish; start with a new cache")
        if not cache.planned:
            cache.owner.plan_cache(cache, cache.announced or queries)  # candidates behind a prompt are none of it
        if cache.announced > 0:
            self.phase = "prompt"
            extra = max(0, queries - cache.announced)
            cache.announced = max(0, cache.announced - queries)
            self.complete = cache.announced == 0
            if extra and any(m.joint for m in binding.composition.methods):
                raise Refused(
                    f"{binding.id} holds several layers together once the prompt is over, so no candidates can come "
                    "with it; generate without an assistant"
                )
            if extra:
                self.pieces = (self._piece("prompt", queries - extra), self._piece("decode", extra))
        elif queries > 1 and not cache.managed:
            self.phase, self.complete = "prompt", True
        else:
            self.phase = "decode"

    def _piece(self, phase: str, queries: int) -> Call:
        piece = copy.copy(self)
        piece.phase, piece.queries, piece.scratch, piece.admitted = phase, queries, {}, True
        return piece

    def move_to(self, device: torch.device) -> None:
        """What methods hand from layer to layer goes along with them: a model may lie on several devices."""
        if self.device != device:
            for values in (*self.scratch.values(), *self.shared.values()):
                values.update({name: brought(value, device) for name, value in values.items()})
        self.device = device

    @property
    def shared(self) -> State:
        return self.common if self.cache is None else self.cache.shared

    def correction(self, queries: int) -> Call:
        """A dense decode of the last `queries` tokens, before this forward."""
        again = self._piece("decode", queries)
        again.pieces, again.dense = (), True
        return again

    def manages(self, module: nn.Module) -> bool:
        """Whether this attention module is one of the decoder's that Foveate serves."""
        return getattr(module, "layer_idx", None) in self.binding.layers and hasattr(module, "num_key_value_groups")

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        return self
