"""Runs of tiny models that the methods' tests share."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.cache import FoveateCache, Store
from foveate.engine import forward as engine
from foveate.models import tiny

TOLERANCE = 2e-5
"""Largest relative RMS that float32 explains over three layers of a tiny model."""


def prompt(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [B, length] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 250, (batch, length), generator=generator)


def logits(model: Any, ids: Tensor, steps: Tensor | None = None, chunks: int | None = None) -> tuple[Tensor, Any]:
    """Logits [B, *, V] of the prompt's last position and of each of the `steps` [B, S] fed one by one; and the cache.

    On an applied model the cache is Foveate's and the prompt is announced, so that it is sealed once.
    """
    pieces = [ids] if chunks is None else list(ids.split(chunks, dim=1))
    cache = None
    with torch.no_grad():
        out = None
        for piece in pieces:
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        assert out is not None
        rows = [out.logits[:, -1]]
        for i in range(0 if steps is None else steps.shape[1]):
            rows.append(model(steps[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(rows, dim=1), cache


def applied(
    model: Any, method: Any, ids: Tensor, steps: Tensor | None = None, chunks: int | None = None, **kwargs: Any
):
    """`logits` under a method, through an announced cache."""
    with foveate.apply(model, method, **kwargs) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(ids.shape[1])
        out = None
        for piece in [ids] if chunks is None else ids.split(chunks, dim=1):
            out = model(piece, past_key_values=cache)
        assert out is not None
        rows = [out.logits[:, -1]]
        for i in range(0 if steps is None else steps.shape[1]):
            rows.append(model(steps[:, i : i + 1], past_key_values=cache).logits[:, -1])
        assert isinstance(cache, FoveateCache)
        return torch.stack(rows, dim=1), cache


def stores(cache: FoveateCache) -> list[Store]:
    """The store of every managed layer."""
    return [layer.store for layer in cache.couriers()]


def held(store: Store) -> list[list[int]]:
    """Logical positions each (row, head) pair holds, ascending, pairs in order."""
    found: dict[int, list[int]] = {}
    for band in store.bands:
        for pair, n, row in zip(band.pairs, band.lengths, band.slot_positions(), strict=True):
            found[int(pair)] = sorted(row[: int(n)].tolist())
    return [found[pair] for pair in sorted(found)]


@contextmanager
def watching() -> Iterator[list[dict[str, Any]]]:
    """Every read of the engine, in order: layer's store, queries, parts, result."""
    seen: list[dict[str, Any]] = []
    original = engine.read

    def read(store: Store, q: Tensor, parts: Any, how: Any, **kwargs: Any):
        result = original(store, q, parts, how, **kwargs)
        seen.append({"store": store, "q": q, "parts": parts, "how": how, "result": result})
        return result

    engine.read = read
    try:
        yield seen
    finally:
        engine.read = original


def llama(**kwargs: Any) -> Any:
    """A tiny llama with grouped heads."""
    return tiny("llama", **{"heads": 6, "kv_heads": 2, **kwargs})


def memory_of(run: Callable[[], FoveateCache]) -> tuple[FoveateCache, int]:
    """A cache that `run` fills, and by how many bytes that raised what the process has in use (glibc's own count)."""
    gc.collect()
    before = _in_use()
    cache = run()
    gc.collect()
    return cache, _in_use() - before


def _in_use() -> int:
    class Info(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keep"]
        ]

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not say how much memory is in use")
    libc.mallinfo2.restype = Info
    info = libc.mallinfo2()
    return int(info.used + info.hblkhd)


def sealed_memory(model: Any, method: Any, ids: Tensor, **kwargs: Any) -> tuple[FoveateCache, int]:
    """A prompt's cache under a method, and what the process has more in use for it."""
    with foveate.apply(model, method, **kwargs) as handle, torch.no_grad():

        def run() -> FoveateCache:
            cache = handle.cache()
            cache.expect(ids.shape[1])
            model(ids, past_key_values=cache, logits_to_keep=1)
            return cache

        run()  # what a first forward leaves behind (plans, rotary tables) is not the cache's
        return memory_of(run)
