"""A composition of methods bound to one model: roles, caches, forks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate import compat
from foveate.attention.angles import Angles
from foveate.cache import FoveateCache, Store, StoreSpec
from foveate.cache.cache import CourierLayer
from foveate.engine import samples
from foveate.engine import seal as sealing
from foveate.engine.context import LayerContext
from foveate.engine.plan import LayerPlan, plan_layers, scoring
from foveate.engine.read import Reading
from foveate.engine.rows import Rows
from foveate.errors import BadArgument, Refused
from foveate.methods.base import Composition, Method, Needs, Profile, uniform
from foveate.methods.profile import fingerprint
from foveate.models.shape import ModelShape


class Binding:
    """Methods × model. It holds no per-token state; every cache it makes does.

    Args:
        model: the transformers model (unwrapped).
        composition: the methods, budgets included.
        profiles: calibration results by method id.
        installation: says whether Foveate is still applied to the model.
        capture: further needs of methods that will share this binding's prompts; such prompts are never sealed.
    """

    def __init__(
        self,
        model: Any,
        composition: Composition,
        profiles: Mapping[str, Profile],
        installation: Any,
        capture: Needs | None = None,
    ) -> None:
        self.model, self.composition, self.profiles = model, composition, dict(profiles)
        self.installation, self.capture = installation, capture
        self.holds = capture is not None
        self.shape = ModelShape.of(model)
        self.layers = frozenset(layer.index for layer in self.shape.layers if layer.kind != "other")
        self.ranks = {m.layer_idx: m.kv_lora_rank for m in compat.attention_modules(model) if compat.is_latent(m)}
        self.scales = {m.layer_idx: float(m.scaling) for m in compat.attention_modules(model)}
        self.keeper = scoring(composition)
        self.choosers = {"prompt": composition.filling("prefill"), "decode": composition.filling("decode")}
        """Who selects, by phase."""
        self.observers = [m for m in composition.methods if type(m).attended is not Method.attended]
        self.preparers = [m for m in composition.methods if type(m).prepare is not Method.prepare]
        self._plans: dict[int, dict[int, LayerPlan]] = {}
        self._angles: Angles | None = None
        for method in composition.methods:
            profile = self.profiles.get(method.id)
            if profile is not None and profile.model != fingerprint(self.shape):
                raise BadArgument(
                    "profile",
                    profile.model,
                    f"this profile of {method.id} was made on another model; calibrate on {fingerprint(self.shape)}",
                )
        self._plan(self.shape.max_positions)  # bad settings fail now, not in the first forward

    @property
    def id(self) -> str:
        return self.composition.id

    @property
    def graph(self) -> bool:
        """Whether a decode step of these methods is device work alone, which a GPU can record and replay."""
        return not self.ungraphed

    @property
    def ungraphed(self) -> str:
        """Why a decode step of these methods cannot be recorded; empty if it can."""
        chooser = self.choosers["decode"]
        hooks = [*self.observers, *([] if chooser is None else [chooser])]
        for m in self.composition.methods:
            if m.corrects:
                return f"{m.id} takes tokens back to correct them"
            if m.offloads:
                return f"{m.id} holds tokens in the host's memory and attends to them there"
            if m.every_step and m.rule is not uniform:
                return f"{m.id} decides over all heads together which tokens leave at each step"
            if (m.every_step or m in hooks) and not m.graph:
                return f"{m.id} looks at values on the host at each step"
        return ""

    @property
    def active(self) -> bool:
        """False once the model was restored."""
        return self.installation.active

    @property
    def croppable(self) -> bool:
        """Whether tokens can be taken back after the prompt."""
        return all(m.croppable and not m.every_step for m in self.composition.methods)

    @property
    def corrects(self) -> int:
        """Decoded tokens after which they are taken back and given again densely; 0: never."""
        return max(m.corrects for m in self.composition.methods)

    def move(self, x: Tensor, delta: Tensor) -> Tensor:
        """Turn rotated queries by delta positions."""
        return self.angles().move(x, delta)

    def angles(self) -> Angles:
        """By how much `move` turns."""
        if self._angles is None:
            self._angles = Angles(*compat.rotary(self.model))
        return self._angles

    # -- plans --------------------------------------------------------------------------------------------------------

    def _plan(self, length: int) -> dict[int, LayerPlan]:
        if length not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()
            self._plans[length] = plan_layers(
                self.composition, self.shape, self.profiles, length, self.ranks, self.capture
            )
        return self._plans[length]

    def transient_plan(self, length: int) -> dict[int, LayerPlan]:
        """Plan of a forward without a cache."""
        return self._plan(length)

    def plans(self, cache: FoveateCache) -> dict[int, LayerPlan]:
        """The plan that a cache was made under."""
        return self._plan(cache.length)

    def check(self, length: int) -> None:
        """Raise Infeasible or Refused if these settings cannot be had for a prompt of exactly `length` tokens."""
        for method in self.composition.methods:
            method.plan(self.shape, self.profiles.get(method.id), length)
            if "keep" in method.fills:
                method.total(self.shape, length)
            for layer in self.shape.layers:
                if layer.kind == "full":
                    role = self._plan(self.shape.max_positions)[layer.index].roles[method.id]
                    method.codec(role, self.shape, length)
                    break

    # -- caches -------------------------------------------------------------------------------------------------------

    def cache(self) -> FoveateCache:
        """An empty cache under these methods."""
        layers = []
        for index, stock in enumerate(compat.stock_layers(self.model)):
            ours = index in self.layers and not compat.is_linear_layer(stock)
            heads = self.shape.layers[index].store_heads if index in self.layers else 1
            layers.append(CourierLayer(StoreSpec(heads=heads), index) if ours else stock)
        return FoveateCache(layers, self)

    def plan_cache(self, cache: FoveateCache, length: int) -> None:
        """Decide roles for a cache whose first prompt has `length` columns."""
        cache.length, cache.planned = length, True
        for index, plan in self._plan(length).items():
            cache.layers[index].store = Store(plan.store_spec())
            cache.layers[index].length = length

    def adopt(self, cache: FoveateCache) -> FoveateCache:
        """A copy of a cache that holds a dense prompt, planned and sealed by this binding.

        Raises:
            Refused: if tokens were evicted from it, or these methods act inside the prompt.
        """
        if not self.shares_prefill:
            raise Refused(f"{self.id} acts inside the prompt, so it cannot take over one that was computed densely")
        new = self.cache()
        old_layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CourierLayer)}
        if any(layer.store.spec.spans == () and not layer.store.aligned for layer in old_layers.values()):
            raise Refused("tokens were evicted from this cache already; fork one that holds its whole prompt")
        length = next(iter(old_layers.values())).columns
        new.length, new.planned, new.managed = length, True, True
        for index, plan in self._plan(length).items():
            source, target = old_layers[index], new.layers[index]
            target.__dict__.update(source.fork(plan.store_spec() if plan.shape.kind == "full" else None).__dict__)
            target.owner, target.length, target.mine, target.prepared = self, length, {}, {}
            if plan.needs.window and source.window is not None:
                target.window = source.window[:, :, -plan.needs.window :].clone()
                target.window_seen = source.window_seen.clamp_max(plan.needs.window)  # type: ignore[union-attr]
            target.samples, target.sample_order = samples.first(source, plan.needs.queries)
            with torch.cuda.device_of(target.store.bands[0].keys()):  # kernels start on the current GPU
                sealing.seal(
                    target,
                    plan,
                    self.shape,
                    self.keeper,
                    lambda m, t=target, p=plan: self.context(t, p, m),
                    self.preparers,
                )
            new.touch(index)
            sealing.join(new, plan)
        return new

    @property
    def shares_prefill(self) -> bool:
        """True if these methods leave the prompt's own attention dense, so that one pass can serve several of them."""
        plans = self._plan(self.shape.max_positions).values()
        inside = any({"prefill", "weights"} & m.fills for m in self.composition.methods)
        return not inside and all(p.prompt_spans == () or p.shape.kind == "sliding" for p in plans)

    @property
    def prompt_needs(self) -> Needs:
        """What has to be captured in a shared prompt for these methods."""
        plans = self._plan(self.shape.max_positions).values()
        return Needs(
            window=max((p.needs.window for p in plans), default=0),
            columns=next((p.needs.columns for p in plans if p.needs.columns), ""),
            queries=max((p.needs.queries for p in plans), default=0),
        )

    # -- steady state -------------------------------------------------------------------------------------------------

    def context(self, layer: CourierLayer, plan: LayerPlan, method: Method) -> LayerContext:
        """A context outside any forward, for sealing and settling."""
        scale = self.scales[plan.shape.index]
        return LayerContext(
            id=method.id,
            phase="decode",
            layer=plan.shape.index,
            shape=plan.shape,
            role=plan.roles[method.id],
            store=layer.store,
            how=Reading(
                Rows(np.zeros(layer.store.rows, dtype=np.int64)), None, scale, move=self.move, angles=self.angles
            ),
            rope=self,
            own=layer.mine,
            common={},
            scratch={},
            window=layer.window,
            window_seen=layer.window_seen,
            granted=layer.limit,
            samples=layer.samples,
            sample_order=layer.sample_order,
            ready=layer.prepared,
        )

    def settle(self, layer: CourierLayer) -> None:
        """Evict, expire and pack what became due."""
        plan = self._plan(layer.length)[layer.index]
        sealing.settle(layer, self.keeper, lambda m: self.context(layer, plan, m))
