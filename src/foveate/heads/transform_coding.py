"""Bases in which keys and values of a head take few bits, found from second moments over text."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.cache.transform import MOST, SCALE, Transform, losses
from foveate.heads.codebooks import random_texts
from foveate.heads.passkeys import passkey_examples, running_examples, shortest
from foveate.heads.tap import Tap, Tapped

FLOOR = 0.01
"""Share of the mean energy of queries that is added in every direction: what queries of other texts may look at."""


@dataclass
class Moments:
    """Sums over tokens of one layer, float64: `count` tokens of keys and values.

    Attributes:
        k, v: [H, D], sums.
        kk, vv, qq: [H, D, D], sums of outer products; queries are those of all query heads of the group.
    """

    k: Tensor
    v: Tensor
    kk: Tensor
    vv: Tensor
    qq: Tensor
    count: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Moments:
        """Of q [Hq, n, D], k [H, n, D] and v [H, n, Dv]."""
        grouped = q.unflatten(0, (len(k), -1)).flatten(1, 2)
        q, k, v = grouped.double(), k.double(), v.double()
        return cls(k.sum(1), v.sum(1), k.mT @ k, v.mT @ v, q.mT @ q, k.shape[1])

    def add(self, other: Moments) -> None:
        for name, x in vars(other).items():
            setattr(self, name, getattr(self, name) + x)

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """Mean [H, D] and covariance [H, D, D] of the keys."""
        return _centred(self.k / self.count, self.kk / self.count)

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        return _centred(self.v / self.count, self.vv / self.count)


def _centred(mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return mean, second - mean.unsqueeze(2) * mean.unsqueeze(1)


@torch.no_grad()
def collect(
    model: nn.Module, texts: Iterable[Any], first: int, report: Callable[[int, str], None]
) -> dict[int, Moments]:
    """Moments of every layer of full attention, of keys as they are cached.

    Args:
        texts: token ids.
        first: tokens of each text whose keys and values are left out; they are like no others.
    """
    found: dict[int, Moments] = {}

    def serve(layer: Tapped) -> Tensor:
        if layer.shape.kind == "full":
            new = Moments.of(layer.q[0], layer.k[0, :, first:], layer.v[0, :, first:])
            held = found.setdefault(layer.shape.index, new)
            if held is not new:
                held.add(new)
        return layer.attend()

    device = next(model.parameters()).device
    with Tap(model, serve):
        for ids in texts:
            compat.base_model(compat.unwrap(model))(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
            report(1, "")
    return found


def basis(covariance: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The Karhunen-Loeve basis of each head, where an error e costs e M e'.

    Args:
        covariance: [H, D, D].
        metric: M, [H, D, D]; None: all directions alike.

    Returns:
        The analysis matrix [H, D, C] (components are x @ matrix) in 8 bits; the step of each of its columns, float16
        [H, C]; and the deviation of each component under the matrix as it is held, [H, C]. The cost of an error of 1 is
        the same in all components, up to the rounding of the matrix.
    """
    covariance = covariance.double().cpu()
    eye = torch.eye(covariance.shape[-1], dtype=torch.float64)
    metric = eye.expand_as(covariance) if metric is None else metric.double().cpu()
    mean = metric.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    metric = metric / mean[:, None, None] + FLOOR * eye
    energy, axes = torch.linalg.eigh(metric)
    root = axes @ torch.diag_embed(energy.clamp_min(FLOOR / 2).sqrt()) @ axes.mT
    analysis = root @ torch.linalg.eigh(root @ covariance @ root).eigenvectors.flip(2)
    step = (analysis.abs().amax(1) / 127).half()
    codes = (analysis / step.double().unsqueeze(1)).round().clamp(-127, 127)
    held = codes * step.double().unsqueeze(1)
    return codes.to(torch.int8), step, ((covariance @ held) * held).sum(1).clamp_min(0).sqrt()


def water_filling(energy: Tensor, total: int) -> Tensor:
    """Bits of each component, int64 [H, C], `total` in every head: each next bit goes where it lowers the loss most.

    Args:
        energy: [H, C], what a component costs that has no bits; of normal numbers.

    Source: 2511.01815, section 3; the greedy order is optimal because each further bit gains less than the one before.
    """
    gains = [a - b for a, b in zip(losses(), losses()[1:], strict=False)]
    out = torch.zeros(energy.shape, dtype=torch.int64)
    for head, row in enumerate(energy.double().tolist()):
        heap = [(-e * gains[0], c) for c, e in enumerate(row)]
        heapq.heapify(heap)
        bits = [0] * len(row)
        for _ in range(min(total, MOST * len(row))):
            _, c = heapq.heappop(heap)
            bits[c] += 1
            if bits[c] < MOST:
                heapq.heappush(heap, (-row[c] * gains[bits[c]], c))
        out[head] = torch.tensor(bits)
    return out


def mixed_texts(tokenizer: Any, length: int, seed: int) -> Iterator[Sequence[int]]:
    """Endless texts of an eighth, a quarter, a half and all of `length` tokens. Of five, one has passkeys in it (if it
    has room for one), one is of random identifiers, and three are plain text."""
    sizes = [max(16, length >> shift) for shift in (3, 2, 1, 0)]
    least, number = shortest(tokenizer), 0
    while True:
        size, own = sizes[number % len(sizes)], seed + number
        if number % 5 == 3:
            yield next(random_texts(tokenizer, size, own))
        else:
            make = passkey_examples if number % 5 == 1 and size >= least else running_examples
            yield next(make(tokenizer, (size,), own)).ids
        number += 1


def held(index: int, name: str, mean: Tensor, covariance: Tensor, metric: Tensor | None = None) -> dict[str, Tensor]:
    """What a profile holds of one side of a layer: its basis in 8 bits; the mean and the basis' steps and deviations,
    float16 [H, 3, D]."""
    codes, *numbers = basis(covariance, metric)
    facts = torch.stack([x.cpu().double().clamp(-6e4, 6e4) for x in (mean, *numbers)], dim=1)
    return {f"{index}.{name}": codes, f"{index}.{name}.numbers": facts.half()}


@lru_cache(maxsize=256)
def transform(codes: Tensor, numbers: Tensor, row: int) -> Transform:
    """The transform of what `held` gives, with rows of so many bytes. A plan is made for every cache, this once."""
    mean, step, deviation = numbers.float().unbind(1)
    bits = water_filling(deviation.square(), max(0, 8 * row - SCALE))
    return Transform(mean, codes.float() * step.unsqueeze(1), deviation, bits)
