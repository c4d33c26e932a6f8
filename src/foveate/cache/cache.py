"""FoveateCache: a transformers cache whose layers only carry new tokens to the attention function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.cache.remembered import State, clone_state, select_rows, state_tensors
from foveate.cache.store import Store, StoreSpec
from foveate.compat import CacheBase, CacheLayerBase, is_linear_layer
from foveate.errors import BadArgument, Refused

WARMUP = 2
"""Decode steps that are made in the ordinary way before one is recorded: a short answer needs no graph."""


class CourierLayer(CacheLayerBase):
    """One layer: `update` stages the new tokens and returns those alone; the attention function called next appends
    them to the store, selects, attends and settles. Nothing is concatenated on the way.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, spec: StoreSpec, index: int = 0) -> None:
        super().__init__()
        self.store = Store(spec)
        self.index = index
        self.length = 0
        """Prompt length for which the layer's roles were planned."""
        self.columns = 0
        """Tokens of the batch so far, padding included: what transformers counts."""
        self.padded = 0
        """Columns up to which some row holds padding; a crop cannot go behind it."""
        self.staged: tuple[Tensor, Tensor] | None = None
        self.record_past = False
        self.window: Tensor | None = None
        """[B, H, W, D] last prompt queries, right-aligned, while somebody needs them."""
        self.window_seen: Tensor | None = None
        """How many of them are real, int64 [B]."""
        self.samples: Tensor | None = None
        """[B, H, n, D] prompt queries by chance, while somebody needs them."""
        self.sample_order: Tensor | None = None
        """What decides who is sampled, int64 [B, n], ascending; the largest number where there is none."""
        self.mine: State = {}
        self.prepared: State = {}
        """What methods made of the prompt when it was complete."""
        self.sealed_at = 0
        """Columns of the prompt they made it of."""
        self.limit: np.ndarray | None = None
        """Tokens per head that a keep method granted this layer, per row; set when the prompt ends."""
        self.sealed = False
        """The prompt is complete: what methods evict was evicted."""
        self.dirty = False
        """Tokens arrived since the last settling."""
        self.clock = np.zeros(0, dtype=np.int64)
        """Tokens of each row decoded since its last prompt, host int64 [B]. Never changed in place."""
        self.owner: Any = None
        self.changes = 0
        """How often anything here was changed by other means than a replayed step."""

    # -- what transformers calls --------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.owner is None or not self.owner.active:
            raise Refused(
                "this cache belongs to a model on which Foveate is not applied (any more); "
                "apply the method again or start with a new cache"
            )
        if self.staged is not None:
            raise Refused("the last forward of this cache did not finish; start with a new cache (or a fork of it)")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.staged = (key_states, value_states)
        self.changes += 1
        return key_states, value_states

    def take(self) -> tuple[Tensor, Tensor]:
        """The staged keys and values of this forward."""
        if self.staged is None:
            raise Refused("attention ran without new keys in this layer; layers that share keys are not supported")
        staged, self.staged = self.staged, None
        return staged

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        self.changes += 1
        n = -int(tokens_to_remove)
        if n < 0:
            raise BadArgument("tokens_to_remove", -n, "give 0 or a negative number of tokens")
        if n and self.columns:
            if self.columns - n < self.padded:
                raise Refused(f"cannot crop {n} tokens: they include padding of a prompt")
            if (self.sealed or self.mine) and not self.owner.croppable:
                raise Refused(f"{self.owner.id} cannot take back tokens it has used; generate without an assistant")
            removed = np.full(self.store.rows, n)
            if not self.store.croppable(removed):
                name = self.owner.id if self.owner is not None else "the method"
                raise Refused(f"cannot crop {n} tokens: {name} has already freed tokens that would be visible again")
            self.store.crop(removed)
            self.columns -= n
            self.mine, self.clock = {}, np.zeros_like(self.clock)
            if self.columns < self.sealed_at:
                self.prepared = {}
        if self.record_past and self.sealed and self.dirty:
            self.owner.settle(self)

    def _rows(self, rows: np.ndarray) -> None:
        self.changes += 1
        if not self.columns:
            return
        self.store.select_rows(rows)
        index = torch.from_numpy(rows)
        if self.window is not None and self.window_seen is not None:
            self.window = self.window.index_select(0, index.to(self.window.device))
            self.window_seen = self.window_seen.index_select(0, index.to(self.window_seen.device))
        if self.samples is not None and self.sample_order is not None:
            self.samples = self.samples.index_select(0, index.to(self.samples.device))
            self.sample_order = self.sample_order.index_select(0, index.to(self.sample_order.device))
        self.mine, self.prepared = select_rows(self.mine, rows), select_rows(self.prepared, rows)
        self.clock = self.clock[rows] if len(self.clock) else self.clock
        if self.limit is not None:
            self.limit = self.limit[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(np.arange(self.store.rows).repeat(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        self._rows(indices.cpu().numpy())

    @property
    def batch_size(self) -> int:
        return self.store.rows or -1

    def reset(self) -> None:
        changes = self.changes
        self.__init__(self.store.spec, self.index)
        self.changes = changes + 1

    def offload(self) -> None:
        raise Refused("off-loading a Foveate cache to the host is not supported; drop cache_implementation='offloaded'")

    prefetch = offload

    # -- ours ---------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds on the model's device."""
        if self.window is None and self.samples is None and not self.mine and not self.prepared:
            return self.store.nbytes
        extra = [self.window, self.window_seen, self.samples, self.sample_order]
        extra += [t for _, t in state_tensors(self.mine)]
        extra += [] if self.store.spec.place is not None else [t for _, t in state_tensors(self.prepared)]
        return self.store.nbytes + sum(t.numel() * t.element_size() for t in extra if t is not None)

    @property
    def host_nbytes(self) -> int:
        """Bytes of what this layer has put into the host's memory."""
        if self.store.spec.place is None:
            return 0
        made = sum(t.numel() * t.element_size() for _, t in state_tensors(self.prepared))
        return self.store.host_nbytes + made

    @property
    def window_valid(self) -> Tensor | None:
        """Which of the window's queries are real, bool [B, W]: prompts may be shorter than the window."""
        if self.window is None or self.window_seen is None:
            return None
        width = self.window.shape[2]
        return torch.arange(width, device=self.window.device) >= width - self.window_seen[:, None]

    def fork(self, spec: StoreSpec | None) -> CourierLayer:
        if self.staged is not None:
            raise Refused("a cache cannot be forked in the middle of a forward")
        new = copy.copy(self)
        new.store = self.store.fork(spec)
        new.window = None if self.window is None else self.window.clone()
        new.window_seen = None if self.window_seen is None else self.window_seen.clone()
        new.samples = None if self.samples is None else self.samples.clone()
        new.sample_order = None if self.sample_order is None else self.sample_order.clone()
        new.mine, new.prepared = clone_state(self.mine), clone_state(self.prepared)
        new.limit = None if self.limit is None else self.limit.copy()
        return new


class FoveateCache(CacheBase):
    """A transformers cache that holds what the applied methods keep, in the form they keep it.

    Its length (`get_seq_length`) counts all tokens seen; `nbytes` counts what is held. It works in `generate` (greedy,
    sampling, beams, assisted decoding, several turns) and in plain forwards. Make one with `handle.cache()`, or let
    `generate` make it.

    Args:
        layers: one CourierLayer per attention layer; layers of other kinds are transformers' own.
        owner: the binding of methods to the model; decides roles, budgets and hooks.
    """

    def __init__(self, layers: list[Any], owner: Any) -> None:
        super().__init__(layers=layers)
        self.layers: list[Any] = layers
        self._is_user_defined = True
        self.owner = owner
        self.shared: State = {}
        self.announced = 0
        """Prompt columns still to come."""
        self.managed = False
        """Somebody announces prompts; what is not announced is decode."""
        self.planned = False
        self.length = 0
        self.spans: dict[str, Tensor] = {}
        self.peak_nbytes = 0
        self._held: dict[int, int] = {}
        self._sum = 0
        self.meter: dict[str, float] | None = None
        """Pairs read, by phase, while measuring."""
        self.trace: Callable[..., None] | None = None
        """Told (layer, phase, band, selection, geometry, spans, heads of a pair) of every read while somebody looks."""
        self.horizon = 0
        """Tokens that generate() may reach, if it said so: room is made once."""
        self.step: Any = None
        """A recorded decode step of this cache (`engine.captured`)."""
        self.recording: Any = None
        """What its layers are handed while a step is being recorded."""
        self.waiting = WARMUP
        """Decode steps to make in the ordinary way before one is recorded."""
        self.unrecorded = ""
        """Why the last attempt to record a step was given up."""
        self.uncorrected: State = {}
        """Newest tokens that will be taken back and given again (`engine.correction`)."""
        for layer in self.couriers():
            layer.owner = owner

    def couriers(self) -> Iterator[CourierLayer]:
        """The layers that Foveate manages."""
        return (layer for layer in self.layers if isinstance(layer, CourierLayer))

    def expect(self, tokens: int) -> None:
        """Announce that the next `tokens` tokens (padding included) are a prompt.

        Methods that evict or pack do so when the announced prompt is complete. `generate` announces by itself; call
        this before bare forwards that give a prompt in pieces, or a context whose question comes later.
        """
        if tokens < 0:
            raise BadArgument("tokens", tokens, "announce 0 or more tokens")
        self.announced, self.managed = int(tokens), True

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the cache holds now on the model's device: keys, values, scales, positions, tags,
        summaries, spare slots."""
        total = sum(t.numel() * t.element_size() for s in (self.shared, self.uncorrected) for _, t in state_tensors(s))
        for layer in self.layers:
            total += layer.nbytes if isinstance(layer, CourierLayer) else _stock_bytes(layer)
        return total

    @property
    def state_nbytes(self) -> int:
        """Bytes in `nbytes` that no context adds to: recurrent states and windows of convolutions."""
        states = [getattr(layer, name, {}) for layer in self.layers for name in ("conv_states", "recurrent_states")]
        return sum(t.numel() * t.element_size() for held in states for t in held.values() if t is not None)

    @property
    def host_nbytes(self) -> int:
        """Bytes that methods have put into the host's memory, beside `nbytes`; counted apart on a CPU, too."""
        return sum(layer.host_nbytes for layer in self.couriers())

    def touch(self, layer_idx: int) -> None:
        """Take note of what a layer holds now, for the peak."""
        layer = self.layers[layer_idx]
        held = layer.nbytes
        self._sum += held - self._held.get(layer_idx, 0)
        self._held[layer_idx] = held
        self.peak_nbytes = max(self.peak_nbytes, self._sum)

    def fork(self, owner: Any = None) -> FoveateCache:
        """A deep copy; the original is untouched.

        Args:
            owner: another binding: the prompt held here (densely) is planned, sealed and decoded by that one. This is
                how methods that leave prefill dense share one prompt pass.
        """
        if owner is not None and owner is not self.owner:
            return owner.adopt(self)
        new = copy.copy(self)
        new.layers = [
            layer.fork(None) if isinstance(layer, CourierLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        new.shared, new.uncorrected = clone_state(self.shared), clone_state(self.uncorrected)
        new._held = dict(self._held)
        new.step, new.recording, new.waiting = None, None, WARMUP
        new.meter = None if self.meter is None else dict(self.meter)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> FoveateCache:
        return self.fork()

    def crop(self, tokens_to_remove: int) -> None:
        n = -int(tokens_to_remove)
        couriers = list(self.couriers())
        for layer in couriers:  # all or nothing: a refusal half-way would leave layers of different length
            if n > 0 and layer.columns and not layer.store.croppable(np.full(layer.store.rows, n)):
                layer.crop(tokens_to_remove)
        super().crop(-n)
        if n:
            self.shared = {}
            left = {
                name: {key: x[:, :-n].clone() for key, x in state.items()} for name, state in self.uncorrected.items()
            }
            self.uncorrected = {name: state for name, state in left.items() if all(x.numel() for x in state.values())}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select_shared(beam_idx.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = np.arange(next(self.couriers()).store.rows).repeat(repeats)
        for layer in self.layers:
            # Layers with a state know only how to reorder, which any choice of rows is.
            if is_linear_layer(layer):
                layer.reorder_cache(torch.from_numpy(rows))
            else:
                layer.batch_repeat_interleave(repeats)
        self._select_shared(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
        for layer in self.layers:
            if is_linear_layer(layer):
                layer.reorder_cache(rows)
            else:
                layer.batch_select_indices(indices)
        self._select_shared(rows.cpu().numpy())

    def _select_shared(self, rows: np.ndarray) -> None:
        self.shared, self.uncorrected = select_rows(self.shared, rows), select_rows(self.uncorrected, rows)

    def reset(self) -> None:
        super().reset()
        self.shared, self.uncorrected, self.announced, self.managed, self.planned = {}, {}, 0, False, False
        self.peak_nbytes, self._held, self._sum = 0, {}, 0
        self.horizon, self.step, self.recording, self.waiting = 0, None, None, WARMUP
        for layer in self.couriers():
            layer.owner = self.owner


def _stock_bytes(layer: Any) -> int:
    total = 0
    for value in vars(layer).values():
        for tensor in value.values() if isinstance(value, dict) else (value,):
            if isinstance(tensor, Tensor):
                total += tensor.numel() * tensor.element_size()
    return total
