"""Decode steps on a GPU: recorded once as a CUDA graph, then replayed, so that no time is lost in Python.

A step of one token per row is the same device work whatever has been decoded before it: the store's tensors stay where
they are, lengths are counted on the device, and the host only says which tokens come in. Where that is not so (a method
looks at values on the host, a window is still filling, a column has to grow) the step is made in the ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate import compat
from foveate.attention import ALL
from foveate.cache import FoveateCache, Store
from foveate.cache.fixed import FixedStore, FixedView
from foveate.engine.context import LayerContext
from foveate.engine.fused import fused
from foveate.engine.plan import LayerPlan
from foveate.engine.read import Reading, read
from foveate.engine.rows import Rows
from foveate.errors import Refused
from foveate.methods.base import Method

LEAST_ROOM = 256
"""Fewest tokens that a recorded step finds room for."""

PATIENCE = 64
"""Steps after which a cache that could not be recorded is looked at again."""

_HARMLESS = frozenset({"use_cache", "return_dict", "attention_mask", "cache_position", "position_ids", "input_ids"})
"""Arguments that change nothing about a decode step: the store knows its rows, and positions are given."""


_KNOWN = _HARMLESS | {"past_key_values"}


class StepCall:
    """What the layers of a recorded step are handed instead of `forward.Call`."""

    def __init__(self, cache: FoveateCache, room: int) -> None:
        self.binding, self.cache = cache.owner, cache
        self.plans: dict[int, LayerPlan] = cache.owner.plans(cache)
        self.layers = {index: cache.layers[index] for index in self.plans}
        self.stores = {index: FixedStore(layer.store, room) for index, layer in self.layers.items()}
        self.scratch: dict[str, dict[str, Any]] = {}
        self.rows = Rows(np.ones(next(iter(self.stores.values())).rows, dtype=np.int64))

    def manages(self, module: nn.Module) -> bool:
        """Whether this attention module is one of the decoder's that Foveate serves."""
        return getattr(module, "layer_idx", None) in self.stores and hasattr(module, "num_key_value_groups")

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """One layer: append, select, attend, on the device alone."""
        index = module.layer_idx
        plan, store = self.plans[index], self.stores[index]
        k, v = self.layers[index].take()
        projection = compat.LatentProjection(module) if plan.value_dim is not None else None
        if projection is not None:
            k, v, query = torch.cat([k, v], dim=-1), None, projection.absorb(query)
        store.append(k, v)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        how = Reading(self.rows, (), scale, softcap, s_aux, self.binding.move)
        view, parts = FixedView(store), ALL
        managed = plan.shape.kind == "full"
        chooser = self.binding.choosers["decode"]
        if chooser is not None and managed:
            parts = chooser.select(query, view, self._context(plan, store, chooser, how))
        probs = plan.needs.probs and managed
        if parts is ALL and not probs and not plan.needs.lse and not (managed and self.binding.observers):
            out = store.attend(query, scale, softcap, s_aux)
            if out is not None:
                return self._given(out, projection)
        result = read(store, query, parts, how, lse=plan.needs.lse and managed, probs=probs)
        out = result.out
        for method in self.binding.observers if managed else ():
            changed = method.attended(query, view, result, self._context(plan, store, method, how))
            out = out if changed is None else changed
        return self._given(out, projection)

    @staticmethod
    def _given(out: Tensor, projection: compat.LatentProjection | None) -> tuple[Tensor, None]:
        """What the attention module is given back: [B, N, H, Dv]."""
        if projection is not None:
            out = projection.values(out)
        return out.transpose(1, 2).contiguous(), None

    def _context(self, plan: LayerPlan, store: FixedStore, method: Method, how: Reading) -> LayerContext:
        layer = self.layers[plan.shape.index]
        return LayerContext(
            id=method.id,
            phase="decode",
            layer=plan.shape.index,
            shape=plan.shape,
            role=plan.roles[method.id],
            store=store,
            how=how,
            rope=self.binding,
            own=layer.mine,
            common=self.cache.shared,
            scratch=self.scratch,
            granted=layer.limit,
        )

    # -- between steps ------------------------------------------------------------------------------------------------

    @property
    def stale(self) -> bool:
        """Something lies elsewhere now, or has no room for one more token."""
        return any(_moved(store, self.layers[index].store) for index, store in self.stores.items())

    def catch_up(self) -> None:
        """Take over what came by another way since the last replay."""
        for store in self.stores.values():
            for band in store.bands:
                if band.behind:
                    band.refresh()

    def counters(self) -> list[Tensor]:
        """What a step changes besides the store's slots."""
        return [t for s in self.stores.values() for b in s.bands for t in (b.lengths, b.seen, b.turn)]

    def arrived(self) -> None:
        """Count one replayed step on the host."""
        for index, store in self.stores.items():
            layer = self.layers[index]
            for band in store.bands:
                band.arrived()
                layer.dirty = layer.dirty or band.cyclic
            layer.store.seen = layer.store.seen + 1
            layer.columns += 1


def _moved(fixed: FixedStore, store: Store) -> bool:
    """Whether a recorded store is no longer where the layer's tokens are."""
    if fixed.rows != store.rows or len(fixed.bands) != len(store.bands):
        return True
    return any(b.stale or b.band is not now for b, now in zip(fixed.bands, store.bands, strict=True))


class Step:
    """One recorded decode step of one cache.

    Args:
        forward: the model's own forward.
        cache: sealed, with a token per row decoded already.
        ids, positions: [B, 1], as the next step brings them.
        options: further keyword arguments of the forward.
    """

    def __init__(
        self, forward: Callable[..., Any], cache: FoveateCache, ids: Tensor, positions: Tensor, options: dict[str, Any]
    ) -> None:
        seen = max(int(layer.store.seen.max(initial=0)) for layer in cache.couriers())
        room = cache.horizon - seen if cache.horizon > seen else max(LEAST_ROOM, seen // 16)
        self.call = StepCall(cache, room)
        self.ids, self.positions, self.options = ids.clone(), positions.clone(), dict(options)
        self.kind: Any = None

        def run() -> Tensor:
            cache.recording = self.call
            try:
                with fused(cache.owner.model):
                    out = forward(
                        input_ids=self.ids,
                        position_ids=self.positions,
                        past_key_values=cache,
                        use_cache=True,
                        **options,
                    )
            finally:
                cache.recording = None
            self.kind = type(out)
            return out.logits

        self._replay = record(run, self.call.counters(), ids.device)
        for index in self.call.stores:
            cache.touch(index)  # what was reserved counts

    def fits(self, ids: Tensor, options: dict[str, Any]) -> bool:
        """Whether the next step is this one."""
        return ids.shape == self.ids.shape and options == self.options and not self.call.stale

    def __call__(self, ids: Tensor, positions: Tensor) -> Any:
        """The model's output for tokens [B, 1] at positions [B, 1]."""
        self.call.catch_up()
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        logits = self._replay()
        self.call.arrived()
        return self.kind(logits=logits.clone(), past_key_values=self.call.cache)


def record(run: Callable[[], Tensor], counters: list[Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that repeats the device work of `run` and returns its result, which the next call overwrites."""
    before = [t.clone() for t in counters]

    def rewind() -> None:
        for t, value in zip(counters, before, strict=True):
            t.copy_(value)

    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # libraries initialise themselves outside the recording
        rewind()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError as error:  # something waited for the device
        torch.cuda.synchronize(device)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f"the step could not be recorded: {reason[0]}") from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Forward:
    """`model.forward` of an applied model: replays decode steps where it can, else calls the model."""

    def __init__(self, handle: Any, original: Callable[..., Any]) -> None:
        self.handle, self.original = handle, original
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if args or not isinstance(cache, FoveateCache) or cache.recording is not None:
            return self.original(*args, **kwargs)
        if not steps_alone(cache, kwargs):
            return self.original(**kwargs)
        ids = kwargs["input_ids"]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, cache.get_seq_length())
        options = {k: v for k, v in kwargs.items() if k not in _KNOWN and v is not None}
        step = cache.step
        if step is None or not step.fits(ids, options):
            step = cache.step = self._record(cache, ids, positions, options)
        return self.original(**kwargs) if step is None else step(ids, positions)

    def _record(self, cache: FoveateCache, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Step | None:
        if cache.waiting > 0:
            cache.waiting -= 1
            return None
        cache.step = None
        try:
            return Step(self.original, cache, ids, positions, options)
        except Refused as refused:
            cache.unrecorded, cache.waiting = str(refused), PATIENCE
            return None


def steps_alone(cache: FoveateCache, kwargs: dict[str, Any]) -> bool:
    """Whether a forward is one decode step that nobody watches, by methods that only need the device."""
    ids = kwargs.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or torch.is_grad_enabled():
        return False
    if kwargs.get("use_cache") is False or any(
        value for key, value in kwargs.items() if key.startswith("output_") or key in ("labels", "inputs_embeds")
    ):
        return False
    if not all(isinstance(v, int | float | str) for k, v in kwargs.items() if v is not None and k not in _KNOWN):
        return False
    if cache.meter is not None or cache.trace is not None or cache.announced or not cache.owner.graph:
        return False
    return all(layer.sealed and not layer.record_past and layer.staged is None for layer in cache.couriers())
