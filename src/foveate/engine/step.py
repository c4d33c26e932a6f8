"""What the layers of a recorded step do instead of `forward.attention`."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate import compat
from foveate.attention import ALL, Parts
from foveate.cache import FoveateCache
from foveate.cache.cache import CourierLayer
from foveate.cache.fixed_store import FixedStore, FixedView
from foveate.cache.remembered import State
from foveate.engine import seal as sealing
from foveate.engine.context import LayerContext
from foveate.engine.later import now, rotation_of
from foveate.engine.plan import COLUMNS, LayerPlan
from foveate.engine.read import Reading, read
from foveate.engine.rows import Rows
from foveate.engine.standing import Standing
from foveate.errors import Refused
from foveate.methods.base import Method, Needs, Result


class StepCall:
    """What the layers of a recorded step are handed instead of `call.Call`.

    Args:
        cache: sealed, with a token per row decoded already.
        room: steps that it should serve.
    """

    def __init__(self, cache: FoveateCache, room: int) -> None:
        self.binding, self.cache = cache.owner, cache
        self.plans: dict[int, LayerPlan] = cache.owner.plans(cache)
        self.layers: dict[int, CourierLayer] = {index: cache.layers[index] for index in self.plans}
        self.recent: dict[int, Tensor] = {}
        """Newest tokens that are not freed, int64 [B], of layers that free a token in each step."""
        self.stores = {index: self._store(index, room) for index in self.layers}
        others = [layer for layer in cache.layers if not isinstance(layer, CourierLayer)]
        states = [*(partial(_mine, layer) for layer in self.layers.values()), *(partial(_stock, x) for x in others)]
        self.standing = Standing([*states, partial(_shared, cache)])
        self.scratch: dict[str, dict[str, Any]] = {}
        self.rows = Rows(np.ones(next(iter(self.stores.values())).rows, dtype=np.int64))
        self.rehearsing = False
        """Nothing that is held may be lost: the step is made to be undone."""

    def _store(self, index: int, room: int) -> FixedStore:
        layer, keeper = self.layers[index], self.binding.keeper
        if keeper is None or not keeper.every_step or layer.limit is None:
            return FixedStore(layer.store, room)
        lengths, limit = layer.store.lengths, layer.limit[:, None]
        if (lengths < limit).all():
            store = FixedStore(layer.store, room)
            store.exceeds(store.longest - 1 + int((limit - lengths).min()))  # from then on it is another step
            return store
        if (lengths != limit).any():
            raise Refused("some heads free a token in each step already, and some do not yet")
        self.recent[index] = sealing.recent_of(keeper, layer.limit, layer.store.bands[0].device)
        return FixedStore(layer.store, room, evicting=True)

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
        """One layer: append, select, attend, free, pack, on the device alone."""
        index = module.layer_idx
        plan, store = self.plans[index], self.stores[index]
        k, v = self.layers[index].take()
        projection = compat.LatentProjection(module) if plan.value_dim is not None else None
        rotation = rotation_of(query, k) if projection is None and store.turns else None
        if rotation is not None:
            store.append(rotation.k, v, turn=rotation.turn)
            rotation.taken()
        query = now(query)
        if projection is not None:
            k, v, query = torch.cat([now(k), v], dim=-1), None, projection.absorb(query)
        if rotation is None:
            store.append(now(k), v)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        how = Reading(self.rows, (), scale, softcap, s_aux, self.binding.move, angles=self.binding.angles)
        out = self._attend(plan, store, query, how)
        if index in self.recent:
            self._evict(plan, store, how)
        store.settled(self.rehearsing)
        if projection is not None:
            out = projection.values(out)
        return out.transpose(1, 2).contiguous(), None

    def _attend(self, plan: LayerPlan, store: FixedStore, q: Tensor, how: Reading) -> Tensor:
        """Select, attend, observe: q [B, H, 1, Dk] -> [B, H, 1, Dv]."""
        view, parts = FixedView(store), ALL
        managed = plan.shape.kind == "full"
        observers = self.binding.observers if managed else []
        chooser = self.binding.choosers["decode"]
        if chooser is not None and managed:
            parts = chooser.select(q, view, self._context(plan, store, chooser, how))
        result = self._everything(plan, store, q, how) if parts is ALL else None
        if result is None:
            result = self._read(plan, store, q, parts, how)
        out = result.out
        for method in observers:
            changed = method.attended(q, view, result, self._context(plan, store, method, how))
            out = out if changed is None else changed
        return out

    def _everything(self, plan: LayerPlan, store: FixedStore, q: Tensor, how: Reading) -> Result | None:
        """What the layer needs of a read of all that it holds, in as few launches as there are; None if no kernel can
        make it."""
        needs = plan.needs if plan.shape.kind == "full" else Needs()
        add = COLUMNS if needs.columns == "running" else ""
        if needs.probs or needs.lse or add:
            weighed = store.weigh(q, how.scale, how.softcap, how.sinks, probs=needs.probs, add=add)
            return None if weighed is None else Result(*weighed)
        out = store.attend(q, how.scale, how.softcap, how.sinks)
        return None if out is None else Result(out, None)

    def _read(self, plan: LayerPlan, store: FixedStore, q: Tensor, parts: Parts, how: Reading) -> Result:
        """The same of any read."""
        needs = plan.needs if plan.shape.kind == "full" else Needs()
        running = needs.columns == "running"
        result = read(store, q, parts, how, lse=needs.lse, probs=needs.probs or running)
        if running:
            assert result.probs is not None
            view = FixedView(store)
            mass = view.tag(COLUMNS)
            gained = result.probs.unflatten(1, (mass.shape[1], -1)).sum((2, 3))
            view.write(COLUMNS, mass + gained.unsqueeze(-1))
        return result

    def _evict(self, plan: LayerPlan, store: FixedStore, how: Reading) -> None:
        """Each head frees the token with the least score."""
        keeper, view = self.binding.keeper, FixedView(store)
        scores = keeper.score(view, self._context(plan, store, keeper, how))
        if store.evict(scores, keeper.protect.sink, self.recent[plan.shape.index], newest=self.rehearsing):
            return
        least = sealing.least(keeper, scores, view, self.recent[plan.shape.index])
        if self.rehearsing:
            least = view.lengths.long() - 1
        store.drop(least)

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
            ready=layer.prepared,
            clock=layer.clock,
            looks=False,
        )

    # -- between steps ------------------------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """Another number whenever something was changed by other means than a replay."""
        return sum(layer.changes for layer in self.layers.values())

    @property
    def stale(self) -> bool:
        """Something lies elsewhere now, or has no room for one more token."""
        return any(store.stale for store in self.stores.values())

    def kind(self) -> Hashable:
        """What kind of step comes next, of all layers; None if it is made in the ordinary way."""
        methods = self.binding.composition.methods
        clocked = [m for m in methods if type(m).kind is not Method.kind]
        counted = [m for m in methods if type(m).completes is not Method.completes]
        kinds = tuple(m.kind(layer.clock) for m in clocked for layer in self.layers.values())
        ends = tuple(m.completes(layer.store.seen) for m in counted for layer in self.layers.values())
        return None if None in kinds else (kinds, ends)

    def catch_up(self) -> bool:
        """Take over what came by another way since the last replay. False if a step can no longer be this one."""
        for store in self.stores.values():
            for band in store.bands:
                if band.behind:
                    band.refresh()
        return self.standing.take_over()

    def counters(self) -> list[Tensor]:
        """What a step changes besides the store's slots."""
        return [t for store in self.stores.values() for t in store.counters()] + self.standing.tensors()

    def arrived(self) -> None:
        """Count one replayed step on the host."""
        for index, store in self.stores.items():
            layer = self.layers[index]
            for band in store.bands:
                band.arrived()
                layer.dirty = layer.dirty or band.cyclic
            layer.store.seen = layer.store.seen + 1
            layer.columns += 1
            layer.clock = layer.clock + 1


def _mine(layer: CourierLayer) -> State:
    return layer.mine


def _stock(layer: Any) -> dict[str, dict[Any, Tensor | None]]:
    """States of a layer without keys, which it changes in place."""
    return {name: getattr(layer, name) for name in ("conv_states", "recurrent_states") if hasattr(layer, name)}


def _shared(cache: FoveateCache) -> State:
    return cache.shared
