"""What generating costs, from counts alone: operations, bytes, seconds, and where one attention overtakes another.

Kinetics' accounting (2506.05333): operations and memory traffic of whole generations, with prompts that several trials
share. Two things differ from its released code: the sum over a growing sparse context has its correction subtracted,
not added, and is capped where the budget is never reached; and the machine's intensity is a parameter, measured here
(`clock.rates`), not the peak of one precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, inf
from typing import Literal

from foveate.bench.clock import Rates
from foveate.models.shape import ModelShape

Kind = Literal["dense", "top-k", "block-top-k", "window", "state", "quantized"]


@dataclass(frozen=True)
class Attention:
    """How keys are read while decoding.

    Args:
        kind: "dense"; "top-k": `budget` tokens whose choice costs nothing; "block-top-k": `budget` tokens in blocks of
            `block`, chosen by one pooled key per block; "window": the newest `budget` tokens; "state": a recurrent
            state of `budget` tokens' size; "quantized": all tokens, at `bits` per number.
        budget: tokens; 0 where the kind has none.
    """

    kind: Kind = "dense"
    budget: int = 0
    block: int = 16
    bits: float = 16.0


@dataclass(frozen=True)
class Model:
    """What of a model counts.

    Args:
        parameters: that a token uses.
        heads: query heads times head size, summed over layers (so that a pair costs 4 of it: product and sum for the
            score, and again for the value).
        kv: kv heads times head size, summed over layers (a token holds 2 of it, at 2 bytes each); of latent attention
            half of what is stored.
        bytes_per_weight: 2 for bf16.
    """

    parameters: float
    heads: float
    kv: float
    bytes_per_weight: float = 2.0

    @classmethod
    def of(cls, shape: ModelShape, parameters: float) -> Model:
        """A model of this geometry with so many active parameters."""
        layers = [layer for layer in shape.layers if layer.kind != "other"]
        heads = sum(layer.num_heads * (layer.head_dim + layer.v_head_dim) / 2 for layer in layers)
        return cls(parameters, heads, shape.dense_kv_bytes(1) / shape.dtype.itemsize / 2)


@dataclass(frozen=True)
class Work:
    """A prompt of C tokens, answered `trials` times with G tokens each."""

    prompt: int
    generated: int
    trials: int = 1


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of all trials together.

    Args:
        linear: operations of the parameters; attention: of scores and values, and of what chooses among keys.
        cache: bytes of keys and values (and what stands for them) that are moved; weights: of parameters, read once a
            step for all trials.
    """

    linear: float
    attention: float
    cache: float
    weights: float

    @property
    def flops(self) -> float:
        return self.linear + self.attention

    def eflops(self, intensity: float) -> float:
        """Kinetics' equivalent operations: compute plus `intensity` (operations per byte of the machine) times the
        traffic of the cache; parameters are not counted as traffic, which large batches share."""
        return self.flops + intensity * self.cache

    def seconds(self, machine: Rates) -> float:
        """The roofline of the whole generation: what takes longer, operations or bytes, weights included."""
        return max(self.flops / machine.flops, (self.cache + self.weights) / machine.bytes_per_s)


def decode(model: Model, attention: Attention, work: Work) -> Cost:
    """Generating the answers of `work`.

    The t-th new token (t = 1..G) reads the C + t tokens up to itself. The prompt's keys are read once for all trials
    where all trials read the same ones (dense, quantized), else by each.
    """
    n, c, g = work.trials, work.prompt, work.generated
    linear = 2.0 * model.parameters * g * n
    weights = model.parameters * model.bytes_per_weight * g
    pair, token = 4 * model.heads, 4 * model.kv  # operations of a pair, bytes of a token's key and value
    if attention.kind in ("dense", "quantized"):
        own = g * (g + 1) / 2
        read = c * g + n * own
        return Cost(linear, pair * n * (c * g + own), token * read * attention.bits / 16, weights)
    if attention.kind == "state":
        return Cost(linear, pair * n * g * attention.budget, 2 * token * n * g * attention.budget, weights)
    read = capped(c, g, attention.budget)
    if attention.kind != "block-top-k":
        return Cost(linear, pair * n * read, token * n * read, weights)
    blocks = (c * g + g * (g + 1) / 2) / attention.block
    shared = (c * g + n * g * (g + 1) / 2) / attention.block
    # One pooled key a block: a product without a value, and half of a token's bytes.
    return Cost(linear, n * (pair * read + pair / 2 * blocks), token * n * read + token / 2 * shared, weights)


def capped(prompt: int, generated: int, budget: int) -> float:
    """Sum over t = 1..G of min(budget, C + t)."""
    free = min(generated, max(0, budget - prompt))  # steps at which the budget is not reached
    return prompt * free + free * (free + 1) / 2 + budget * (generated - free)


def prefill(model: Model, length: int, density: float = 1.0) -> Cost:
    """Reading a prompt of `length` tokens of which attention computes `density` of the causal pairs."""
    pairs = density * length * (length + 1) / 2
    return Cost(
        2.0 * model.parameters * length,
        4 * model.heads * pairs,
        4 * model.kv * length,
        model.parameters * model.bytes_per_weight,
    )


def crossover(first: Callable[[int], float], second: Callable[[int], float], *, longest: int = 1 << 24) -> float:
    """The smallest length from which on `first` costs less than `second`; infinity if it never does up to `longest`.

    Args:
        first, second: cost of a length; their difference must change its sign at most once.
    """
    if first(longest) >= second(longest):
        return inf
    low, high = 0, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if first(middle) < second(middle) else (middle, high)
    return float(1 if first(1) < second(1) else high)


def balance(model: Model, intensity: float) -> float:
    """The 2 C + G at which the traffic of attention costs as much as the parameters' operations."""
    return model.parameters / (model.kv * intensity)


def coverage(correct: int, tried: int, k: int) -> float:
    """Chance that at least one of k of the answers is right: 1 - C(N - c, k) / C(N, k)."""
    return 1.0 - comb(tried - correct, k) / comb(tried, k)
