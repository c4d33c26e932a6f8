"""MQAR, multi-query associative recall (Zoology, arXiv 2312.04927, section 3), as tensors for layers that are trained.

A sequence is `pairs` keys with their values, then slots of two tokens; each key comes once more in a slot, and its
value is the label there. Keys are 1 .. V/2 - 1, values V/2 .. V - 1, both different within a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import BadArgument

UNLABELLED = -100


@dataclass(frozen=True)
class Recalls:
    """Sequences of recall.

    Attributes:
        inputs: token ids [B, L].
        labels: the value at the positions where a key is asked for, -100 elsewhere, [B, L].
        evidence: the position of the pair's key where a key is asked for, -1 elsewhere, [B, L]; its value stands one
            further: the evidence is [position, position + 2).
    """

    inputs: Tensor
    labels: Tensor
    evidence: Tensor


@dataclass(frozen=True)
class Mqar:
    """Sequences of `length` tokens with `pairs` pairs.

    Args:
        vocabulary: V, larger than the length.
        power: a of p(slot g) ~ a (g + 1)^(a - 1), slots drawn without replacement: small ones ask early, 1 is uniform.
        fill: put random tokens where nothing is asked (no key of the sequence among them) instead of 0.

    Raises:
        BadArgument: the pairs and their questions do not fit, or the vocabulary is too small.
    """

    length: int
    pairs: int
    vocabulary: int = 8192
    power: float = 0.01
    fill: bool = False

    def __post_init__(self) -> None:
        if self.length % 2 or self.length < 4 * self.pairs or self.pairs < 1:
            raise BadArgument("length", self.length, f"give an even number of at least {4 * max(1, self.pairs)}")
        if self.vocabulary <= self.length:
            raise BadArgument("vocabulary", self.vocabulary, f"give more than the length, {self.length}")
        if self.power <= 0:
            raise BadArgument("power", self.power, "give a positive number")

    def generate(self, samples: int, seed: int) -> Recalls:
        """`samples` sequences; equal seeds give equal ones. Training and test need different seeds."""
        rng = torch.Generator().manual_seed(seed)
        half, pairs = self.vocabulary // 2, self.pairs
        keys = 1 + _distinct(samples, half - 1, pairs, rng)
        values = half + _distinct(samples, self.vocabulary - half, pairs, rng)
        start = 2 * pairs
        slots = (self.length - start) // 2
        # The largest of log p + Gumbel noise are a draw without replacement.
        log_p = (self.power - 1) * torch.log(torch.arange(1, slots + 1, dtype=torch.float64))
        noise = -torch.log(-torch.log(torch.rand(samples, slots, generator=rng, dtype=torch.float64).clamp_min(1e-300)))
        asked = start + 2 * (log_p + noise).topk(pairs, dim=1).indices

        inputs = torch.zeros(samples, self.length, dtype=torch.int64)
        inputs[:, :start:2], inputs[:, 1:start:2] = keys, values
        if self.fill:
            inputs[:, start:] = _others(keys, half, self.length - start, rng)
        inputs.scatter_(1, asked, keys)
        labels = torch.full_like(inputs, UNLABELLED).scatter_(1, asked, values)
        places = (2 * torch.arange(pairs)).expand(samples, pairs)
        return Recalls(inputs, labels, torch.full_like(inputs, -1).scatter_(1, asked, places))


TRAINING = (
    *((Mqar(64, 4), 100_000), (Mqar(128, 8), 20_000)),
    *((Mqar(256, pairs), 20_000) for pairs in (16, 32, 64)),
)
"""Zoology's mixture for training: settings and numbers of sequences."""

TESTING = tuple(
    (Mqar(length, pairs), 1000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)
"""Zoology's tests: settings and numbers of sequences."""


def recalled(predictions: Tensor, labels: Tensor) -> Tensor:
    """The share of the labelled positions that are predicted, of each sequence, [B].

    Args:
        predictions: token ids [B, L] or logits [B, L, V] at the same positions as the labels.
    """
    found = predictions.argmax(-1) if predictions.dim() > labels.dim() else predictions
    wanted = labels != UNLABELLED
    return ((found == labels) & wanted).sum(1) / wanted.sum(1)


def _distinct(rows: int, below: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` different numbers below `below` in each row."""
    return torch.rand(rows, below, generator=rng).argsort(1)[:, :count]


def _others(keys: Tensor, half: int, length: int, rng: torch.Generator) -> Tensor:
    """Random tokens [B, length], none of which is one of the row's keys or the padding 0."""
    rows, pairs = keys.shape
    # A rank among the numbers 1 .. 2 half - 1 that are no keys is drawn; the keys below it are skipped.
    drawn = 1 + torch.randint(2 * half - 1 - pairs, (rows, length), generator=rng)
    for key in keys.sort(1).values.unbind(1):
        drawn += drawn >= key.unsqueeze(1)
    return drawn
