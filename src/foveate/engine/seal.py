"""What happens to the held tokens when the prompt is over, and at each step after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from foveate.cache import FoveateCache, View, hold_together
from foveate.cache.cache import CourierLayer
from foveate.engine.plan import LayerPlan, feasible
from foveate.methods.base import Method, uniform
from foveate.models.shape import ModelShape

if TYPE_CHECKING:
    from foveate.engine.context import LayerContext

MakeContext = Callable[[Method], "LayerContext"]


def seal(
    layer: CourierLayer,
    plan: LayerPlan,
    shape: ModelShape,
    keeper: Method | None,
    make: MakeContext,
    preparers: Sequence[Method] = (),
) -> None:
    """Evict, free what no span can see, pack, put into its place: once, when the prompt is complete.

    Args:
        keeper: the method that evicts by score, or None.
        preparers: methods that make something of the prompt.
    """
    if keeper is not None and plan.shape.kind == "full":
        grants = [_granted(keeper, plan, shape, int(n)) for n in layer.store.seen]
        if all(g is not None for g in grants):
            layer.limit = np.array(grants, dtype=np.int64)
            evict(layer, keeper, make(keeper))
    layer.sealed = True
    if plan.codec is not None:
        layer.store.pack(plan.codec.keys, plan.codec.values, layer.window, layer.window_valid)
    for method in preparers if plan.shape.kind == "full" else ():
        view = View(layer.store, np.zeros(layer.store.rows, dtype=np.int64))
        made = method.prepare(view, make(method))
        where = None if plan.place is None else plan.place.device
        layer.prepared[method.id] = {name: x if where is None else x.to(where) for name, x in made.items()}
    layer.window = layer.window_seen = layer.samples = layer.sample_order = None
    layer.sealed_at = layer.columns
    layer.store.settle(layer.store.seen)
    layer.store.depart()
    layer.dirty = False


def join(cache: FoveateCache, plan: LayerPlan) -> None:
    """Hold the layers of a group together, if this layer, which was just sealed, is the last of it."""
    joint = None if plan.codec is None else plan.codec.joint
    if joint is None or joint.layers[-1] != plan.shape.index:
        return
    stores = [cache.layers[index].store for index in joint.layers]
    hold_together(stores, joint.keys, joint.values, cache.owner if joint.turned else None)
    for index in joint.layers:
        cache.touch(index)


def _granted(keeper: Method, plan: LayerPlan, shape: ModelShape, length: int) -> int | None:
    """Tokens per head that a layer may hold of a row of this length; no layer evicts from one that fits on average."""
    average = feasible(lambda n: keeper.total(shape, n), length, shape)
    if average is None or average >= length:
        return average
    role, index = plan.roles[keeper.id], plan.shape.index
    return feasible(lambda n: keeper.layer_total(role, shape, index, n), length, shape)


def settle(layer: CourierLayer, keeper: Method | None, make: MakeContext) -> None:
    """The steady state after the prompt: evict what exceeds the grant, expire windows, flush tails."""
    if keeper is not None and keeper.every_step and layer.limit is not None:
        evict(layer, keeper, make(keeper))
    layer.store.settle(layer.store.seen)
    layer.dirty = False


def evict(layer: CourierLayer, keeper: Method, ctx: LayerContext) -> None:
    """Hold at most what the keeper's rule grants each head, by its scores."""
    store = layer.store
    assert layer.limit is not None
    view = View(store, np.zeros(store.rows, dtype=np.int64))
    lengths = view.host_lengths
    if (lengths <= layer.limit[:, None]).all():
        return
    recent = recent_of(keeper, layer.limit, store.bands[0].device)
    excess = lengths - layer.limit[:, None]
    if (excess == 1).all() and keeper.rule is uniform:
        victims = least(keeper, keeper.score(view, ctx), view, recent).flatten()
        for band in store.bands:
            band.drop_one(victims[band.index], np.arange(len(band.pairs)))
        return
    scores = protected(keeper, keeper.score(view, ctx), view, recent)
    counts = keeper.rule(scores, view, torch.from_numpy(layer.limit), ctx).cpu().numpy()
    order = scores.argsort(dim=-1, descending=True, stable=True).cpu().numpy()
    kept: dict[int, np.ndarray] = {}
    for b in range(store.rows):
        for h in range(store.spec.heads):
            if counts[b, h] < lengths[b, h]:
                kept[b * store.spec.heads + h] = np.sort(order[b, h, : counts[b, h]])
    store.keep(kept, store.seen)


def recent_of(keeper: Method, limit: np.ndarray, device: torch.device) -> Tensor:
    """Newest tokens of each row that are never evicted, int64 [B], where it holds limit [B] per head."""
    return torch.tensor([keeper.protect.recent_of(int(n)) for n in limit], device=device)


def least(keeper: Method, scores: Tensor, view: View, recent: Tensor) -> Tensor:
    """The slot of each head's token with the least score, [B, Hs]."""
    return protected(keeper, scores, view, recent).masked_fill(~view.valid(), torch.inf).argmin(-1)


def protected(keeper: Method, scores: Tensor, view: View, recent: Tensor) -> Tensor:
    """Scores [B, Hs, C] with +inf on protected slots and -inf behind the end of each row.

    Args:
        recent: newest tokens that are protected, int64 [B].
    """
    lengths, slots = view.lengths, view.capacity
    scores = scores[..., :slots].float().expand(*lengths.shape, -1).clone()
    positions = view.positions[..., : scores.shape[-1]]
    guard = keeper.protect
    if guard.sink:
        scores.masked_fill_(positions < guard.sink, torch.inf)
    if guard.recent:
        newest = view.seen.to(scores.device)[:, None, None] - recent[:, None, None]
        scores.masked_fill_(positions >= newest, torch.inf)
    slot = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(slot >= lengths.unsqueeze(-1), -torch.inf)
