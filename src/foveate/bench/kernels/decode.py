"""Decode steps: one query per row over all that is held, over lists, over latents, over packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from foveate.attention import Geometry, Selection, attend
from foveate.attention.selection import ALL
from foveate.bench.kernels import rivals
from foveate.bench.kernels.case import Case, Check, Kernel, Made, compare, has_kernels
from foveate.bench.kernels.sizes import Sizes
from foveate.bench.kernels.truth import truth

SHORT = 256
"""Tokens of the heads that keep little."""
LATENT, ROTATED = 512, 64
"""Channels of a latent store: those that are values too, and the rotated ones."""
GROUP = 32
"""Tokens or channels that share a scale in packed stores."""
TAIL = 128
"""Room for exact tokens behind packed ones."""


def ragged(sizes: Sizes, device: torch.device) -> list[Case]:
    """All tokens of stores whose heads hold equally or very differently many."""
    cases = []
    for n in sizes.lengths:
        cases.append(Case("decode", "all tokens", n, lambda g, n=n: _ragged(sizes, n, n, g), None, True))
        half = f"half of the heads hold {SHORT}"
        cases.append(Case("decode", half, n, lambda g, n=n: _ragged(sizes, n, SHORT, g), "decode", True))
    return cases


def listed(sizes: Sizes, device: torch.device) -> list[Case]:
    """Pages or tokens of each kv head, read where they lie."""
    return [
        Case(
            "listed",
            f"{tokens:,} tokens " + (f"in pages of {page}" if page > 1 else "one by one"),
            n,
            lambda g, n=n, p=page, t=tokens: _listed(sizes, n, p, t, g),
            "decode",
            True,
        )
        for n in sizes.lengths
        for page, tokens in ((16, sizes.budget), (64, sizes.budget), (1, sizes.budget), (16, 4 * sizes.budget))
        if tokens < n
    ]


def latent(sizes: Sizes, device: torch.device) -> list[Case]:
    """Absorbed queries over latents, which all heads read together."""
    return [
        Case(
            "latent",
            f"{heads} heads, batch {sizes.latent_rows}",
            n,
            lambda g, n=n, h=heads: _latent(sizes, n, h, g),
            None,
            True,
        )
        for n in sizes.lengths
        for heads in ((sizes.latent_heads, 128) if device.type == "cuda" else (sizes.latent_heads,))
    ]


def packed(sizes: Sizes, device: torch.device) -> list[Case]:
    """Stores of few bits, with some exact tokens at their end."""
    return [
        Case("packed", f"{bits} bits", n, lambda g, n=n, b=bits: _packed(sizes, n, b, g), "decode", True)
        for n in sizes.lengths
        for bits in (4, 2)
    ]


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


def _draw(sizes: Sizes, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, 1, D] and k, v [1, Hk, n, D]."""
    draw = partial(_normal, generator, sizes.dtype)
    dim = sizes.head_dim
    return 1.5 * draw(1, sizes.heads, 1, dim), draw(1, sizes.kv_heads, n, dim), draw(1, sizes.kv_heads, n, dim)


def _work(sizes: Sizes, tokens: float, nbytes: float | None = None) -> tuple[float, float]:
    """Bytes and operations of a step that reads so many tokens, all kv heads together."""
    own = 2 * sizes.heads * sizes.head_dim * sizes.itemsize
    read = tokens * 2 * sizes.head_dim * sizes.itemsize if nbytes is None else nbytes
    return read + own, 4 * sizes.head_dim * tokens * sizes.group


def _check(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection = ALL, at: Geometry | None = None, scale: float | None = None
) -> Callable[[Any], Check]:
    out, lse = truth(q, k, v, [(0, 1)], selection, at, scale=scale)
    return lambda answer: compare(answer, out, lse, q.dtype)


def _ours(module: str) -> Any:
    """A module of kernels, which need Triton."""
    return import_module(f"foveate.attention.triton.{module}")


def _ragged(sizes: Sizes, n: int, short: int, generator: torch.Generator) -> Made:
    q, k, v = _draw(sizes, n, generator)
    lengths = torch.full((1, sizes.kv_heads), n, dtype=torch.int32, device=q.device)
    lengths[:, 1::2] = short
    at = Geometry(1, 1, n, lengths=lengths.long(), first=lengths.long() - 1, device=q.device)
    tokens = int(lengths.sum())
    nbytes, flops = _work(sizes, tokens)
    if has_kernels(q.device):
        ours = _ours("decode")
        stores = ours.Stores(k[0], v[0], lengths[0])
        kernels = [Kernel("foveate decode", lambda: ours.decode_ragged(q, stores))]
    else:
        kernels = [Kernel("foveate sdpa", lambda: attend(q, k, v, geometry=at, backend="sdpa"))]
    if short == n:
        kernels += rivals.decode(q, k, v)
    return Made(kernels, _check(q, k, v, at=at), nbytes, flops, tokens / (sizes.kv_heads * n))


def _listed(sizes: Sizes, n: int, page: int, tokens: int, generator: torch.Generator) -> Made:
    q, k, v = _draw(sizes, n, generator)
    lot = torch.rand(1, sizes.kv_heads, n // page, generator=generator, device=q.device)
    lists = lot.topk(tokens // page, dim=-1).indices.sort(-1).values.int()
    selection = Selection(lists.unsqueeze(2), None, page)
    nbytes, flops = _work(sizes, sizes.kv_heads * tokens)
    if has_kernels(q.device):
        ours = _ours("decode_lists")
        counts = torch.full(lists.shape[:2], lists.shape[2], dtype=torch.int32, device=q.device)
        lengths = torch.full((1, sizes.kv_heads), n, dtype=torch.int32, device=q.device)
        kernels = [
            Kernel("foveate decode", lambda: ours.decode_lists(q, k[0], v[0], lists, counts, lengths, page=page)),
            Kernel("torch gather, sdpa", lambda: _gathered(q, k, v, lists, page)),
            *rivals.listed(q, k, v, lists, page),
        ]
    else:
        kernels = [
            Kernel("foveate gather", lambda: attend(q, k, v, selection, backend="gather")),
            Kernel("foveate sdpa, masked", lambda: attend(q, k, v, selection, backend="sdpa")),
            Kernel("torch gather, sdpa", lambda: _gathered(q, k, v, lists, page)),
        ]
    return Made(kernels, _check(q, k, v, selection), nbytes + 4 * lists.numel(), flops, tokens / n)


def _gathered(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, page: int) -> Tensor:
    """What is listed copied side by side, then PyTorch's attention."""
    slots = (lists.long().unsqueeze(-1) * page + torch.arange(page, device=q.device)).flatten(2)
    index = slots.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])
    return rivals.sdpa(None, q, k.gather(2, index), v.gather(2, index))


def _latent(sizes: Sizes, n: int, heads: int, generator: torch.Generator) -> Made:
    rows, dim = sizes.latent_rows, LATENT + ROTATED
    q = _normal(generator, sizes.dtype, rows, heads, 1, dim)
    c = _normal(generator, sizes.dtype, rows, n, dim)
    k, v = c.unsqueeze(1), c[..., :LATENT].unsqueeze(1)
    scale = 192**-0.5  # of the heads of 128 + 64 channels that were absorbed
    nbytes = (c.numel() + rows * heads * (dim + LATENT)) * sizes.itemsize
    kernels = [Kernel("torch products", lambda: _products(q, c, scale))]
    if has_kernels(q.device):
        ours = _ours("decode_latent")
        lengths = torch.full((rows,), n, dtype=torch.int32, device=q.device)
        kernels.insert(0, Kernel("foveate decode", lambda: ours.decode_latent(q, c, lengths, scale, LATENT)))
        kernels += rivals.latent(q, c, scale, LATENT)
    else:
        kernels.insert(0, Kernel("foveate sdpa", lambda: attend(q, k, v, scale=scale, backend="sdpa")))
    return Made(kernels, _check(q, k, v, scale=scale), nbytes, 2 * rows * heads * n * (dim + LATENT))


def _products(q: Tensor, c: Tensor, scale: float) -> Tensor:
    """Two matrix products and a softmax between them."""
    weights = torch.softmax((q[:, :, 0] @ c.mT).float() * scale, dim=-1)
    return (weights.to(q.dtype) @ c[..., :LATENT]).unsqueeze(2)


def _packed(sizes: Sizes, n: int, bits: int, generator: torch.Generator) -> Made:
    q = 1.5 * _normal(generator, sizes.dtype, 1, sizes.heads, 1, sizes.head_dim)
    body, held = n - TAIL, n - TAIL // 2
    sides = [_side(sizes, body, bits, key, generator) for key in (True, False)]

    def unpacked() -> list[Tensor]:
        return [
            torch.cat([_unpack(*side[:3], bits, q.dtype), side[3][:, : held - body]], dim=1).unsqueeze(0)
            for side in sides
        ]

    k, v = unpacked()
    read = sum(x.numel() * x.element_size() for side in sides for x in side[:3])
    nbytes, flops = _work(sizes, sizes.kv_heads * held, read + 2 * k[:, :, body:].numel() * sizes.itemsize)
    kernels = [Kernel("torch unpack, sdpa", lambda: rivals.sdpa(None, q, *unpacked()))]
    if has_kernels(q.device):
        ours = _ours("decode_packed")
        full = torch.full((sizes.kv_heads,), body, dtype=torch.int32, device=q.device)
        lengths = torch.full_like(full, held)
        keys, values = (ours.PackedSide(*side, full, bits, GROUP) for side in sides)
        kernels.insert(0, Kernel("foveate decode", lambda: ours.decode_packed(q, keys, values, lengths)))
    share = nbytes / _work(sizes, sizes.kv_heads * n)[0]
    return Made(kernels, _check(q, k, v), nbytes, flops, share)


Side = tuple[Tensor, Tensor, Tensor, Tensor]
"""Codes, scales, zero points and tail, in the layout of `decode_packed.PackedSide`."""


def _side(sizes: Sizes, body: int, bits: int, key: bool, generator: torch.Generator) -> Side:
    """Random keys or values: codes by lot, scales that spread them about 0."""
    heads, dim, device = sizes.kv_heads, sizes.head_dim, generator.device
    size = (heads, body, dim * bits // 8)
    codes = torch.randint(0, 256, size, generator=generator, device=device, dtype=torch.uint8)
    shape = (heads, body // GROUP, dim) if key else (heads, body, dim // GROUP)
    top = 2**bits - 1
    scale = (2 + 2 * torch.rand(shape, generator=generator, device=device)) / top
    tail = _normal(generator, sizes.dtype, heads, TAIL, dim)
    return codes, scale.half(), (-scale * top / 2).half(), tail


def _unpack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Numbers [P, n, D] of packed codes, low bits first."""
    shift = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    x = ((codes.unsqueeze(-1) >> shift) & (2**bits - 1)).flatten(-2).float()
    dim = 1 if scale.shape[1] != x.shape[1] else 2
    by, low = (s.float().repeat_interleave(GROUP, dim=dim) for s in (scale, zero))
    return (x * by + low).to(dtype)
