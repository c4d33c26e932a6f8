"""Codebooks of keys: a few vectors per kv head that stand for all its keys, as queries see them."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.attention.angles import Angles
from foveate.attention.at_once import at_once
from foveate.heads.tap import Tap, Tapped

ITERATIONS = 300
"""Steps of k-means at most."""
TOLERANCE = 1e-4
"""K-means ends when its centroids move by less than this share of the variance of the points."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Vectors that stand for keys, of one kv head or of several along the first dimension.

    Attributes:
        centroids: [..., C, D], in the space of the keys.
        lower: [..., D, D], the factor L of the queries' second moment L L^T: what a query sees of a key's error e is
            ||e L|| on average.
    """

    centroids: Tensor
    lower: Tensor
    _placed: dict[torch.device, Codebook] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Codebook:
        """The same on a device; copied there once."""
        if device == self.centroids.device:
            return self
        if device not in self._placed:
            self._placed[device] = Codebook(self.centroids.to(device), self.lower.to(device))
        return self._placed[device]

    def codes(self, keys: Tensor) -> Tensor:
        """The nearest centroid of each key [..., n, D] as queries see it, int64 [..., n]; ties go to the first."""
        seen, sizes = self.metric
        return nearest(keys @ seen, self.centroids, sizes)

    @cached_property
    def metric(self) -> tuple[Tensor, Tensor]:
        """L L^T, and ||c L||^2 of each centroid."""
        return self.lower @ self.lower.mT, (self.centroids @ self.lower).square().sum(-1)

    @classmethod
    def random(cls, heads: int, centroids: int, dim: int, seed: int) -> Codebook:
        """Random centroids under a metric that sees all channels alike."""
        x = torch.randn(heads, centroids, dim, generator=torch.Generator().manual_seed(seed))
        return cls(x, torch.eye(dim).expand(heads, dim, dim))

    @classmethod
    def stacked(cls, books: Sequence[Codebook]) -> Codebook:
        """Codebooks of several heads as one; those with fewer centroids repeat their last, which nobody gets."""
        most = max(len(book.centroids) for book in books)
        rows = [torch.cat([b.centroids, b.centroids[-1:].expand(most - len(b.centroids), -1)]) for b in books]
        return cls(torch.stack(rows), torch.stack([book.lower for book in books]))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a profile holds of it: both in 8 bits, each row with a scale of its own, and of L what is not zero."""
        below = torch.tril_indices(*self.lower.shape[-2:])
        found: dict[str, Tensor] = {}
        for part, x in (("centroids", self.centroids), ("lower", self.lower)):
            scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(1e-7).half()
            codes = (x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8).cpu()
            found[f"{name}.{part}"] = codes if part == "centroids" else codes[:, below[0], below[1]]
            found[f"{name}.{part}.scale"] = scale.cpu()
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> Codebook:
        """Inverse of `tensors`, float32.

        Raises:
            KeyError: there is none of this name.
        """
        centroids = tensors[f"{name}.centroids"].float() * tensors[f"{name}.centroids.scale"].float()
        scale, packed = tensors[f"{name}.lower.scale"].float(), tensors[f"{name}.lower"]
        below = torch.tril_indices(scale.shape[1], scale.shape[1])
        lower = torch.zeros(len(scale), scale.shape[1], scale.shape[1])
        lower[:, below[0], below[1]] = packed.float()
        return cls(centroids, lower * scale)


def nearest(points: Tensor, centroids: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Index of the nearest of centroids [..., C, D] for points [..., n, D], int64 [..., n].

    Args:
        sizes: squared lengths of the centroids [..., C], where the points carry a metric; None: their plain ones.
    """
    weight = (centroids.square().sum(-1) if sizes is None else sizes).unsqueeze(-2)
    step = max(1, at_once(points.device) // max(1, centroids.shape[:-1].numel()))
    found = [
        (weight - 2 * points[..., i : i + step, :] @ centroids.mT).argmin(-1) for i in range(0, points.shape[-2], step)
    ]
    return torch.cat(found, dim=-1) if found else points.new_zeros(points.shape[:-1], dtype=torch.int64)


def query_metric(moment: Tensor) -> Tensor:
    """L of the sum [D, D] of the outer products of queries, scaled to a root mean square of 1 and kept invertible:
    then E[(q (k - c))^2] is proportional to ||(k - c) L||^2.

    Source: A2ATS (2502.12665), section 3.2, and its released code.
    """
    scaled = moment.double() / moment.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return torch.linalg.cholesky(scaled + 1e-6 * eye)


def fit(keys: Tensor, moment: Tensor, count: int, generator: torch.Generator | None = None) -> Codebook:
    """At most `count` centroids for keys [n, D] without position, under queries of this second moment [D, D]."""
    lower = query_metric(moment).to(keys.dtype)
    found = kmeans(keys @ lower, count, generator)
    return Codebook(torch.linalg.solve_triangular(lower, found, upper=False, left=False), lower)


def kmeans(points: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Centroids [min(count, distinct points), D] of points [n, D]: k-means++ and Lloyd's steps.

    A centroid that nobody is nearest to stays where it is. Points that repeat are found to be few by k-means++ itself:
    it ends when every point stands on a centroid.

    Source: Arthur and Vassilvitskii (2007); Lloyd (1982).
    """
    centroids = _spread(points, count, generator)
    spread = points.var(0, unbiased=False).mean()
    for _ in range(ITERATIONS):
        code = nearest(points, centroids)
        total = torch.zeros_like(centroids).index_add_(0, code, points)
        size = torch.bincount(code, minlength=len(centroids)).unsqueeze(1)
        moved = torch.where(size > 0, total / size.clamp_min(1), centroids)
        shift = (moved - centroids).square().sum(1).mean()
        centroids = moved
        if shift <= TOLERANCE * spread:
            break
    return centroids


def _spread(points: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """First centroids: each next point is drawn by its squared distance to the nearest one so far."""
    device = points.device
    first = torch.randint(len(points), (1,), generator=generator).to(device)
    chosen = [points[first[0]]]
    away = (points - chosen[0]).square().sum(1)
    for _ in range(count - 1):
        reach = away.double().cumsum(0)
        if not reach[-1] > 0:
            break
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(device) * reach[-1]
        index = torch.searchsorted(reach, draw, right=True).clamp_max(len(points) - 1)
        chosen.append(points[index[0]])
        away = torch.minimum(away, (points - chosen[-1]).square().sum(1))
        away[index[0]] = 0
    return torch.stack(chosen)


@torch.no_grad()
def collect(
    model: nn.Module, texts: Iterable[Any], distance: int, report: Callable[[int, str], None]
) -> dict[int, tuple[Tensor, Tensor]]:
    """What codebooks are fitted to: per layer of full attention the keys without position [Hkv, n, D], in half
    precision on the CPU, and the sum of the outer products of the queries at one position [Hkv, D, D] over all tokens
    and the query heads of a group.

    Args:
        texts: token ids.
        distance: the position at which all queries stand.
    """
    turn = Angles(*compat.rotary(model))
    keys: dict[int, list[Tensor]] = {}
    moments: dict[int, Tensor] = {}

    def serve(layer: Tapped) -> Tensor:
        if layer.shape.kind == "full":
            index, n = layer.shape.index, layer.q.shape[2]
            own = torch.arange(n, device=layer.q.device).unsqueeze(0)
            raw = turn.move(layer.k.float(), -own)[0]
            q = turn.move(layer.q.float(), distance - own)[0].unflatten(0, (raw.shape[0], -1)).flatten(1, 2)
            keys.setdefault(index, []).append(raw.half().cpu())
            moments[index] = moments.get(index, 0) + q.mT @ q
        return layer.attend()

    device = next(model.parameters()).device
    with Tap(model, serve):
        for ids in texts:
            compat.base_model(compat.unwrap(model))(input_ids=torch.tensor([ids], device=device), use_cache=False)
            report(1, "")
    return {index: (torch.cat(parts, dim=1), moments[index]) for index, parts in keys.items()}


def random_texts(tokenizer: Any, length: int, seed: int) -> Iterator[list[int]]:
    """Endless texts of random identifiers, `length` tokens each: keys that ordinary text does not have."""
    rng = random.Random(f"identifiers/{seed}")
    while True:
        ids: list[int] = []
        while len(ids) < length:
            words = "\n".join(str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(16))
            ids += tokenizer(words, add_special_tokens=not ids)["input_ids"]
        yield ids[:length]
