"""State tracking as tensors for layers that are trained on it: word problems of finite groups, and flip-flops.

After The Illusion of State (arXiv 2404.08819): tokens are elements of a group, and the target at each position is the
product of all elements so far. Parity is the group of two; S5 and A5 are not solvable, which is what makes them hard
for models of constant depth.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.errors import BadArgument

GroupName = Literal["parity", "Z60", "S3", "S5", "A5", "A4xZ5"]


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group by its table.

    Attributes:
        table: [n, n]; table[a, b] is a·b: first a, then b. Element 0 is the neutral one.
    """

    name: str
    table: Tensor

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.table.shape[0]


@functools.cache
def group(name: GroupName) -> Group:
    """A group by its name.

    Raises:
        BadArgument: there is none of that name.
    """
    if name == "parity":
        return Group(name, _cyclic(2))
    if name == "Z60":
        return Group(name, _cyclic(60))
    if name in ("S3", "S5", "A5"):
        return Group(name, _permutations(int(name[1]), name[0] == "A"))
    if name == "A4xZ5":
        return Group(name, _product(_permutations(4, True), _cyclic(5)))
    raise BadArgument("group", name, "use one of parity, Z60, S3, S5, A5, A4xZ5")


def _cyclic(size: int) -> Tensor:
    numbers = torch.arange(size)
    return (numbers.unsqueeze(1) + numbers) % size


def _permutations(points: int, even: bool) -> Tensor:
    """Table of the symmetric group, or of the even permutations alone; in the order of their writing."""
    elements = [p for p in itertools.permutations(range(points)) if not even or _is_even(p)]
    number = {element: index for index, element in enumerate(elements)}
    rows = [[number[tuple(b[a[point]] for point in range(points))] for b in elements] for a in elements]
    return torch.tensor(rows)


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Table of the direct product; element (a, b) has the number a * |second| + b."""
    sizes = len(first), len(second)
    pairs = first[:, None, :, None] * sizes[1] + second[None, :, None, :]
    return pairs.reshape(sizes[0] * sizes[1], sizes[0] * sizes[1])


@dataclass(frozen=True)
class Words:
    """Tokens and what is to be said at each: both [B, L]; targets of -100 are not scored.

    Attributes:
        reads: [B, L] the first position of what the target depends on; everything from there on is evidence.
    """

    inputs: Tensor
    targets: Tensor
    reads: Tensor


def word_problem(name: GroupName, length: int, samples: int, seed: int) -> Words:
    """Random words of a group, the product of all elements so far as the target; equal seeds give equal words."""
    if length < 1:
        raise BadArgument("length", length, "give at least 1")
    found = group(name)
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randint(found.size, (samples, length), generator=rng)
    targets = inputs.clone()
    for step in range(1, length):
        targets[:, step] = found.table[targets[:, step - 1], inputs[:, step]]
    return Words(inputs, targets, torch.zeros_like(inputs))


WRITE, IGNORE, READ, ZERO, ONE = range(5)
"""Tokens of the flip-flop language."""


def flip_flop(length: int, samples: int, seed: int, ignore: float = 0.8) -> Words:
    """The flip-flop language: an instruction (write, ignore, read) and a bit in turn; a read is followed by the bit
    that was written last. It starts with a write and ends with a read; the other instructions are `ignore` with this
    probability, else a write or a read. The target of a read is the bit behind it; other positions are not scored.

    Raises:
        BadArgument: the length is odd or below 4, or the probability is none.
    """
    if length % 2 or length < 4:
        raise BadArgument("length", length, "give an even number of at least 4")
    if not 0 <= ignore <= 1:
        raise BadArgument("ignore", ignore, "give a probability")
    rng = torch.Generator().manual_seed(seed)
    steps = length // 2
    drawn = torch.rand(samples, steps, generator=rng)
    orders = torch.where(drawn < ignore, IGNORE, torch.where(drawn < (1 + ignore) / 2, WRITE, READ))
    orders[:, 0], orders[:, -1] = WRITE, READ
    bits = torch.randint(2, (samples, steps), generator=rng)
    turns = torch.arange(steps).expand(samples, steps)
    last = torch.where(orders == WRITE, turns, 0).cummax(1).values  # the step of the last write
    bits = torch.where(orders == READ, bits.gather(1, last), bits) + ZERO
    inputs = torch.stack([orders, bits], dim=2).reshape(samples, length)
    targets, reads = torch.full_like(inputs, -100), torch.zeros_like(inputs)
    targets[:, ::2] = torch.where(orders == READ, bits, -100)
    reads[:, ::2] = 2 * last
    return Words(inputs, targets, reads)


@dataclass(frozen=True)
class Tracked:
    """How well states were tracked.

    Attributes:
        sequence: share of the sequences in which every scored position is right.
        position: share that is right at each position, [L]; nan where nothing is scored.
        majority: share that always saying the most frequent target would get, to be shown beside.
    """

    sequence: float
    position: Tensor
    majority: float


def tracked(predictions: Tensor, words: Words) -> Tracked:
    """Scores predictions: ids [B, L] or logits [B, L, n] at the positions of the targets."""
    found = predictions.argmax(-1) if predictions.dim() > 2 else predictions
    scored = words.targets != -100
    right = (found == words.targets) & scored
    counts = torch.bincount(words.targets[scored])
    return Tracked(
        sequence=float((right | ~scored).all(1).double().mean()),
        position=right.sum(0) / scored.sum(0),
        majority=float(counts.max() / counts.sum()),
    )
