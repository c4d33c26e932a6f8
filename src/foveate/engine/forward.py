"""The order of calls in one forward: append, select, attend, observe, settle or seal."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate import compat
from foveate.attention import ALL, Span
from foveate.attention.sent import sent
from foveate.cache import Column, FoveateCache, Store, View
from foveate.cache.cache import CourierLayer
from foveate.engine import samples
from foveate.engine import seal as sealing
from foveate.engine.call import Call
from foveate.engine.context import LayerContext
from foveate.engine.plan import COLUMNS, LayerPlan
from foveate.engine.read import Reading, column_sums, read
from foveate.engine.rows import Rows
from foveate.errors import Refused
from foveate.methods.base import Method


def attention(
    call: Call,
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
    """What transformers calls in every layer: query [B, H, N, D], key and value of the new tokens -> [B, N, H, Dv]."""
    index = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.ndim == 4:
        return _masked(call, module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux)
    if call.cache is not None and call.rows is None and not call.admitted:
        _admit(call, call.cache, attention_mask, query.shape[0])
    if call.pieces:
        return _in_pieces(
            call, module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux
        )
    call.move_to(query.device)
    if call.rows is None:
        call.rows = Rows.of(attention_mask, query.shape[0], query.shape[2])
    rows = call.rows
    q = rows.roll(query)
    if call.cache is None:
        plan = call.binding.transient_plan(call.queries)[index]
        store = _expanded(plan, rows.roll(key), rows.roll(value), rows.counts)
        how = _reading(call, plan, rows, scale, softcap, s_aux)
        layer = CourierLayer(store.spec)
        layer.store = store
        out, _ = _attend(call, plan, layer, store, q, how)
        return rows.unroll(out).transpose(1, 2).contiguous(), None
    layer: CourierLayer = call.cache.layers[index]
    plan = call.cache.owner.plans(call.cache)[index]
    if layer.dirty and not layer.record_past:
        call.cache.owner.settle(layer)
    clean = layer.sealed and not layer.dirty
    first = not layer.store.bands
    latent = _append(layer, plan, module, rows)
    call.cache.touch(index)
    how = _reading(call, plan, rows, scale, softcap, s_aux, skip_spans=clean and call.queries == 1)
    projection = compat.LatentProjection(module) if latent else None
    if first and projection is None and torch.is_grad_enabled() and key.requires_grad:
        # What is held is detached; the prompt itself is read from the live tensors, so that gradients reach k and v.
        store = _expanded(plan, rows.roll(key), rows.roll(value), rows.counts)
        out, _ = _attend(call, plan, layer, store, q, how)
    elif projection is not None and call.phase == "prompt":
        store = _expand_latent(plan, layer, projection, key, value, rows)
        out, _ = _attend(call, plan, layer, store, q, how, absorbed=projection.absorb)
    elif projection is not None:
        out, _ = _attend(call, plan, layer, layer.store, projection.absorb(q), how)
        out = projection.values(out)
    else:
        out, _ = _attend(call, plan, layer, layer.store, q, how)
    _finish(call, plan, layer, index, how)
    return rows.unroll(out).transpose(1, 2).contiguous(), None


def _admit(call: Call, cache: FoveateCache, mask: Tensor | None, batch: int) -> None:
    """Refuse tokens for which some layer has no place, before any layer has taken one of them."""
    call.admitted = True
    places = [(layer.store, layer.store.spec.place) for layer in cache.couriers()]
    bounded = [(store, place.limit) for store, place in places if place is not None and place.limit is not None]
    fresh = Rows.of(mask, batch, call.queries).fresh if bounded else np.zeros(batch, dtype=np.int64)
    for store, limit in bounded:
        held = store.lengths.max(axis=1, initial=0) if store.bands else 0
        most = int((held + fresh).max())
        if most > limit:
            for courier in cache.couriers():
                courier.staged = None
            raise Refused(
                f"{cache.owner.id}: a row would have {most} tokens, but device and host together take {limit}; "
                "free rows, or give it more room"
            )


def _in_pieces(
    call: Call, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The prompt is complete, and what is evicted gone, before the tokens behind it read: as in two forwards."""
    assert call.cache is not None
    layer: CourierLayer = call.cache.layers[module.layer_idx]
    k, v = layer.take()
    outs: list[Tensor] = []
    end = 0
    for piece in call.pieces:
        new = slice(end, end + piece.queries)
        end += piece.queries
        layer.staged = (k[:, :, new], v[:, :, new])
        seen = None if mask is None else mask[:, : mask.shape[1] - call.queries + end]
        out, _ = attention(piece, module, query[:, :, new], key[:, :, new], value[:, :, new], seen, **kwargs)
        outs.append(out)
    return torch.cat(outs, dim=1), None


def _reading(
    call: Call,
    plan: LayerPlan,
    rows: Rows,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    skip_spans: bool = False,
) -> Reading:
    spans: tuple[Span, ...] | None = None
    if skip_spans:
        spans = ()  # everything held is visible to the one new query
    elif call.phase == "prompt" and not plan.settles_in_prompt:
        spans = plan.prompt_spans
    meter = None
    if call.cache is not None and call.cache.meter is not None:
        tally, phase = call.cache.meter, call.phase

        def count(amount: float, of: str = "read") -> None:
            name = f"{phase}_{of}"
            tally[name] = tally.get(name, 0.0) + amount

        meter = count

    trace = None
    if call.cache is not None and call.cache.trace is not None:
        trace = partial(call.cache.trace, plan.shape.index, call.phase)
    return Reading(rows, spans, scale, softcap, sinks, call.binding.move, meter, trace, call.binding.angles)


def _append(layer: CourierLayer, plan: LayerPlan, module: Any, rows: Rows) -> bool:
    """Move the staged tokens into the store. Returns whether it holds latents."""
    k, v = layer.take()
    latent = plan.value_dim is not None
    if latent:
        k, v = torch.cat([k, v], dim=-1), None
    if torch.is_grad_enabled() and k.requires_grad:
        k, v = k.detach(), None if v is None else v.detach()
    k = rows.roll(k)
    v = None if v is None else rows.roll(v)
    if layer.store.rows and k.shape[0] != layer.store.rows:
        raise Refused(f"the cache holds {layer.store.rows} rows, but this forward has {k.shape[0]}")
    layer.store.append(k, v, rows.counts)
    layer.columns += k.shape[2]
    if len(layer.clock) != k.shape[0]:
        layer.clock = np.zeros(k.shape[0], dtype=np.int64)
    layer.dirty = True
    if rows.order is not None:
        layer.padded = layer.columns
    return latent


def _expanded(plan: LayerPlan, key: Tensor, value: Tensor, fresh: np.ndarray | None) -> Store:
    """A store that lives for one layer of one forward."""
    store = Store(plan.store_spec(heads=key.shape[1], latent=False))
    store.append(key, value, fresh)
    return store


def _expand_latent(
    plan: LayerPlan, layer: CourierLayer, projection: compat.LatentProjection, key: Tensor, value: Tensor, rows: Rows
) -> Store:
    """Heads of an MLA prompt: the module expanded the new tokens; older ones are expanded from the store here."""
    (band,) = layer.store.bands
    if (band.lengths == rows.fresh).all():
        return _expanded(plan, rows.roll(key), rows.roll(value), rows.counts)
    k, v = projection.expand(band.keys().unsqueeze(1))
    store = _expanded(plan, k, v, band.lengths)
    store.seen = layer.store.seen.copy()
    for wide in store.bands:
        wide.seen = band.seen[wide.rows]
        if band.positions is not None:
            wide.positions = Column(band.slot_positions()[torch.from_numpy(wide.rows)].contiguous())
    return store


def _attend(
    call: Call, plan: LayerPlan, layer: CourierLayer, store: Store, q: Tensor, how: Reading, absorbed: Any = None
) -> tuple[Tensor, Any]:
    """Select, attend, capture, observe."""
    binding = call.binding if call.cache is None else call.cache.owner
    view = View(store, how.fresh)
    chooser = binding.choosers[call.phase]
    managed = plan.shape.kind == "full"
    parts: Any = ALL
    if chooser is not None and managed and not call.dense:
        parts = chooser.select(q, view, _context(call, plan, layer, store, chooser, how))
    columns = bool(plan.needs.columns) and managed and (call.phase == "prompt" or plan.needs.columns == "running")
    columns = columns and (call.cache is not None or bool(binding.observers))
    probs = plan.needs.probs and call.phase == "decode" and managed
    result = read(store, q, parts, how, lse=columns or (plan.needs.lse and managed), probs=probs)
    window = plan.needs.window if call.phase == "prompt" and call.cache is not None and not layer.sealed else 0
    queries = plan.needs.queries if call.phase == "prompt" and call.cache is not None and not layer.sealed else 0
    if managed and (window or columns or queries):
        captured = q if absorbed is None else absorbed(q)
        if window:
            _capture_window(layer, captured, how.fresh, window)
        if queries:
            samples.capture(layer, captured, store.seen - how.fresh, how.fresh, queries)
        if columns:
            assert result.lse is not None
            over = parts if absorbed is None else ALL
            for band, mass in zip(
                layer.store.bands, column_sums(layer.store, captured, over, result.lse, how), strict=True
            ):
                band.tags[COLUMNS].data[:, : band.used, 0] += mass
    out = result.out
    for method in binding.observers if managed else ():
        if call.dense and method is chooser:
            continue  # its look at dense attention serves the steps that it makes sparse
        changed = method.attended(q, view, result, _context(call, plan, layer, store, method, how))
        if changed is not None:
            out = changed
    return out, result


def _context(
    call: Call, plan: LayerPlan, layer: CourierLayer, store: Store, method: Method, how: Reading
) -> LayerContext:
    return LayerContext(
        id=method.id,
        phase=call.phase,
        layer=plan.shape.index,
        shape=plan.shape,
        role=plan.roles[method.id],
        store=store,
        how=how,
        rope=call.binding,
        own=layer.mine,
        common=call.shared,
        scratch=call.scratch,
        window=None if layer.window is None else layer.window[:, :, -plan.own[method.id].window :],
        window_seen=layer.window_seen,
        granted=layer.limit,
        samples=layer.samples,
        sample_order=layer.sample_order,
        ready=layer.prepared,
        clock=layer.clock,
    )


def _capture_window(layer: CourierLayer, q: Tensor, real: np.ndarray, width: int) -> None:
    """Keep the last `width` prompt queries of each row, across chunks and without padding."""
    if layer.window is None:
        layer.window = q.new_zeros(q.shape[0], q.shape[1], width, q.shape[3])
        layer.window_seen = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    assert layer.window_seen is not None
    if (real == real[0]).all() and real[0] >= width:
        layer.window = q[:, :, real[0] - width : real[0]].detach().clone()
    else:
        joined = torch.cat([layer.window, q.detach()], dim=2)
        index = sent(real, q.device)[:, None] + torch.arange(width, device=q.device)
        layer.window = joined.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    layer.window_seen = (layer.window_seen + sent(real, q.device)).clamp_max(width)


def _finish(call: Call, plan: LayerPlan, layer: CourierLayer, index: int, how: Reading) -> None:
    """Seal at the prompt's end; keep the steady state after it."""
    layer.clock = layer.clock + how.fresh if call.phase == "decode" else np.zeros_like(layer.clock)
    assert call.cache is not None
    owner = call.cache.owner
    if call.phase == "prompt":
        if owner.holds:  # a prompt that several methods will share stays whole
            call.cache.touch(index)
            return
        if call.complete and not layer.sealed:
            sealing.seal(
                layer,
                plan,
                owner.shape,
                owner.keeper,
                lambda m: _context(call, plan, layer, layer.store, m, how),
                owner.preparers,
            )
            sealing.join(call.cache, plan)
        elif (layer.sealed or plan.settles_in_prompt) and not layer.record_past:
            owner.settle(layer)
    elif call.queries == 1 and not layer.record_past:
        if owner.keeper is None and not layer.store.settles:
            layer.dirty = False
        else:
            owner.settle(layer)
    call.cache.touch(index)


def _masked(call: Call, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any):
    """A 4-D mask from the user (or for packed sequences): dense attention under it, with nothing evicted."""
    if call.cache is not None:
        layer: CourierLayer = call.cache.layers[module.layer_idx]
        plan = call.cache.owner.plans(call.cache)[module.layer_idx]
        if layer.sealed and not layer.store.aligned:
            raise Refused("a 4-D attention mask cannot be applied to a cache from which tokens were evicted")
        latent = _append(layer, plan, module, Rows(np.full(query.shape[0], query.shape[2])))
        call.cache.touch(module.layer_idx)
        view = View(layer.store, np.full(query.shape[0], query.shape[2]))
        key, value = compat.LatentProjection(module).expand(view.k()) if latent else (view.k(), view.v())
        if mask.shape[-1] > key.shape[2]:
            mask = mask[..., : key.shape[2]]
    return compat.sdpa_attention_forward(
        module, query, key, value, mask, **{k: v for k, v in kwargs.items() if v is not None}
    )
