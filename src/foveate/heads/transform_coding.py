"""Bases in which keys and values of a head take few bits, and bytes that layers are worth, from moments over text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.cache.transform import MOST, SCALE, Transform, losses
from foveate.heads.codebooks import random_texts
from foveate.heads.passkeys import passkey_examples, running_examples, shortest
from foveate.heads.tap import Tap, Tapped, frozen

FLOOR = 0.01
"""Share of the mean sensitivity that is added in every direction: what queries of other texts may look at."""


SIDES = ("keys", "values")


@dataclass
class Moments:
    """Sums over tokens of one layer, float64: `count` tokens of keys and values.

    Attributes:
        k, v: [H, D], sums.
        kk, vv: [H, D, D], sums of outer products.
    """

    k: Tensor
    v: Tensor
    kk: Tensor
    vv: Tensor
    count: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Moments:
        """Of k [H, n, D] and v [H, n, Dv]."""
        k, v = k.double(), v.double()
        return cls(k.sum(1), v.sum(1), k.mT @ k, v.mT @ v, k.shape[1])

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
            new = Moments.of(layer.k[0, :, first:], layer.v[0, :, first:])
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


def sensitivity(
    model: nn.Module,
    texts: Iterable[tuple[Sequence[int], int]],
    first: int,
    seed: int,
    report: Callable[[int, str], None],
) -> dict[tuple[int, str], Tensor]:
    """What errors of keys and values cost a model in likelihood: second moments of the gradients of its loss by those
    of a layer, float64 [H, D, D] by layer and side. All of them together have a trace of 1.

    The loss is that of tokens drawn from the model's own predictions, so that the moments are Fisher's information: to
    second order they say how far predictions move.

    Args:
        texts: token ids, and the first token whose prediction counts.
        first: tokens of each text whose keys and values are left out.
        seed: of the tokens that are drawn.
    """
    found: dict[tuple[int, str], Tensor] = {}
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for ids, judged in texts:
        added: dict[tuple[int, str], Tensor] = {}

        def serve(layer: Tapped, added: dict[tuple[int, str], Tensor] = added) -> Tensor:
            if layer.shape.kind != "full":
                return layer.attend()
            k, v = (torch.zeros_like(x, requires_grad=True) for x in (layer.k, layer.v))
            added[layer.shape.index, "keys"], added[layer.shape.index, "values"] = k, v
            return replace(layer, k=layer.k + k, v=layer.v + v).attend()

        with frozen(model), Tap(model, serve), torch.enable_grad():
            rows = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0, judged - 1 :]
            likely = rows.float().log_softmax(-1)
            drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(likely.gather(1, drawn).sum(), list(added.values()))
        for name, gradient in zip(added, gradients, strict=True):
            g = gradient[0, :, first:].double()
            found[name] = found.get(name, 0) + g.mT @ g
        report(1, "")
    total = sum(float(x.diagonal(dim1=1, dim2=2).sum()) for x in found.values())
    return {name: x / total for name, x in found.items()}


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
    taken = _gains(energy).flatten(1).argsort(dim=1, descending=True, stable=True)[:, :total] // MOST
    return torch.zeros(energy.shape, dtype=torch.int64).scatter_add_(1, taken, torch.ones_like(taken))


def _gains(energy: Tensor) -> Tensor:
    """What each bit of a component saves after those before it, [H, C, MOST]."""
    lost = torch.tensor(losses(), dtype=torch.float64)
    return energy.double().cpu().unsqueeze(2) * (lost[:-1] - lost[1:])


def longest(dim: int) -> int:
    """Bytes of a row in which every component has all the bits that it can have."""
    return -(-(SCALE + MOST * dim) // 8)


@lru_cache(maxsize=64)
def share_out(sides: tuple[tuple[Tensor, tuple[float, ...]], ...], total: int) -> tuple[int, ...]:
    """Bytes of a packed token of one head on each side (the keys or the values of a layer), at least 1: each next byte
    goes where it lowers the loss most.

    Args:
        sides: the numbers of each as `held` gives them, and what an error costs in each of its heads.
        total: bytes of a token in all heads of all sides, at most.

    Source: reverse water-filling as in 2511.01815, section 3, here over layers, too.
    """
    gains, costs = [], []
    for numbers, weights in sides:
        saved = _gains(numbers[:, 2].double().square()).flatten(1).sort(dim=1, descending=True).values.cumsum(1)
        rows = torch.arange(1, longest(numbers.shape[2]) + 1)
        reached = (8 * rows - SCALE).clamp_max(saved.shape[1]) - 1
        gains.append((saved[:, reached] * torch.tensor(weights, dtype=torch.float64).unsqueeze(1)).sum(0).diff())
        costs.append(len(numbers))
    which = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor([len(x) for x in gains]))
    cost = torch.tensor(costs)[which]
    order = (torch.cat(gains) / cost).argsort(descending=True, stable=True)
    taken = order[cost[order].cumsum(0) <= total - sum(costs)]
    return tuple((1 + torch.bincount(which[taken], minlength=len(sides))).tolist())


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


def asked_texts(tokenizer: Any, sizes: Sequence[int], each: int, seed: int) -> list[tuple[Sequence[int], int]]:
    """Texts of these lengths in tokens, and the first token at which each is judged. Of a length there are `each` plain
    ones, as many with passkeys, where there is room for one, and one of random identifiers, all judged throughout;
    those with passkeys are judged once more at questions and answers alone."""
    found: list[tuple[Sequence[int], int]] = []
    for size in sizes:
        found += [(x.ids, 1) for x in islice(running_examples(tokenizer, (size,), seed), each)]
        found += [(ids, 1) for ids in islice(random_texts(tokenizer, size, seed), 1)]
        if size >= shortest(tokenizer):
            for x in islice(passkey_examples(tokenizer, (size,), seed), each):
                found += [(x.ids, 1), (x.ids, x.labels)]
    return found


def fit(
    model: nn.Module,
    read: Iterable[Sequence[int]],
    asked: Iterable[tuple[Sequence[int], int]],
    first: int,
    seed: int,
    report: Callable[[int, str], None],
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Bases of every layer's keys and values as `held` gives them, and by the same names what an error of 1 costs in
    each head.

    Args:
        read: texts that the bases are fitted to.
        asked: texts that say what errors cost, as in `sensitivity`; those that are judged throughout weigh as much in
            all as the others.
    """
    kinds: list[list[tuple[Sequence[int], int]]] = [[], []]
    for ids, judged in asked:
        kinds[judged > 1].append((ids, judged))
    costs = [sensitivity(model, kind, first, seed, report) for kind in kinds if kind]
    tensors: dict[str, Tensor] = {}
    weights: dict[str, list[float]] = {}
    for index, moments in collect(model, read, first, report).items():
        for name, found in zip(SIDES, (moments.keys, moments.values), strict=True):
            metric = torch.stack([cost[index, name] for cost in costs]).mean(0)
            tensors |= held(index, name, *found, metric)
            mean = metric.diagonal(dim1=1, dim2=2).mean(1)
            weights[f"{index}.{name}"] = [float(f"{x:.4g}") for x in mean.tolist()]
    return tensors, weights


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
