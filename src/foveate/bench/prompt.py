"""Caches as a prompt would leave them, filled with random tokens, so that decoding can be timed without the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import compat
from foveate.cache import FoveateCache
from foveate.engine import seal as sealing
from foveate.engine.binding import Binding
from foveate.engine.plan import COLUMNS
from foveate.models.shape import ModelShape


def filled(binding: Binding, length: int, *, rows: int = 1, seed: int = 0) -> FoveateCache:
    """A sealed cache whose prompt had `length` tokens of random keys and values. No more layers are ever held exactly
    than are packed together, so it needs little more memory than what the methods keep.

    Methods that score tokens by what the prompt's queries did find random queries and random attention mass: what they
    keep is arbitrary, how much they keep is what they would keep of any prompt of this length.
    """
    cache = binding.cache()
    binding.plan_cache(cache, length)
    cache.managed = True
    model = binding.model
    device, dtype = model.device, model.dtype
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    for index, plan in binding.plans(cache).items():
        layer, shape = cache.layers[index], plan.shape
        k = draw(rows, shape.store_heads, length, shape.store_k_dim)
        v = draw(rows, shape.store_heads, length, shape.store_v_dim) if plan.value_dim is None else None
        layer.lazy_initialization(k, k if v is None else v)
        layer.store.append(k, v, None)
        layer.columns = length
        if plan.needs.window:
            width = shape.head_dim if plan.value_dim is None else shape.store_k_dim
            layer.window = draw(rows, shape.num_heads, plan.needs.window, width)
            layer.window_seen = torch.full((rows,), plan.needs.window, dtype=torch.int64, device=device)
        if plan.needs.queries:
            count = min(plan.needs.queries, length)
            layer.samples = draw(rows, shape.num_heads, count, shape.head_dim)
            layer.sample_order = torch.arange(count, device=device).expand(rows, -1)
        if plan.needs.columns:
            for band in layer.store.bands:
                band.tags[COLUMNS].data.uniform_(generator=generator)
        del k, v
        sealing.seal(
            layer,
            plan,
            binding.shape,
            binding.keeper,
            lambda m, at=layer, p=plan: binding.context(at, p, m),
            binding.preparers,
        )
        sealing.join(cache, plan)
        cache.touch(index)
    return cache


def plain(model: Any, length: int, *, rows: int = 1, seed: int = 0) -> Any:
    """Transformers' own DynamicCache with as many random tokens."""
    cache = compat.DynamicCache(config=model.config)
    generator = torch.Generator(model.device).manual_seed(seed)
    text = compat.text_config(model)
    for layer in ModelShape.of(model).layers:
        # A latent layer hands its cache the latent and the rotated part.
        sizes = (text.kv_lora_rank, text.qk_rope_head_dim) if layer.latent else (layer.head_dim, layer.v_head_dim)
        k, v = (
            torch.randn(
                rows, layer.store_heads, length, size, generator=generator, device=model.device, dtype=model.dtype
            )
            for size in sizes
        )
        cache.update(k, v, layer.index)
    return cache
