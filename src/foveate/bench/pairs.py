"""How many pairs of a prompt are read, and the operations that they need at least."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from foveate.attention import Geometry, Selection, Span
from foveate.bench.clock import wait
from foveate.cache import Band
from foveate.engine.binding import Binding
from foveate.models.shape import LayerShape, ModelShape


class PromptPairs:
    """A trace (see `FoveateCache.trace`) that counts the pairs of a prompt, and the seconds that counting took.

    Attributes:
        read: by layer, all heads and rows together.
        seconds: of the host, with the device waited for.
    """

    def __init__(self) -> None:
        self.read: dict[int, int] = {}
        self.seconds = 0.0

    def __call__(
        self,
        layer: int,
        phase: str,
        band: Band,
        chosen: Selection,
        at: Geometry,
        visible: Sequence[Span],
        group: int,
    ) -> None:
        if phase != "prompt":
            return
        wait(at.device)
        start = time.perf_counter()
        self.read[layer] = self.read.get(layer, 0) + int(chosen.pairs(at, group, visible).sum())
        self.seconds += time.perf_counter() - start


def narrowed(binding: Binding, length: int) -> bool:
    """Whether these methods leave pairs of a prompt of `length` tokens unread."""
    if any(method.fills & {"prefill", "weights"} for method in binding.composition.methods):
        return True
    cache = binding.cache()
    binding.plan_cache(cache, length)
    return any(plan.prompt_spans for plan in binding.plans(cache).values())


def dense_pairs(layer: LayerShape, length: int) -> int:
    """Pairs of one layer that the model itself reads of a prompt, all query heads together."""
    wide = min(layer.window or length, length)
    return layer.num_heads * (wide * (wide + 1) // 2 + (length - wide) * wide)


def density(shape: ModelShape, length: int, rows: int, read: dict[int, int]) -> float:
    """Pairs read over those that the model reads, of the layers that were counted; 1 without any."""
    causal = rows * sum(dense_pairs(shape.layers[index], length) for index in read)
    return sum(read.values()) / causal if causal else 1.0


def prompt_flops(shape: ModelShape, length: int, rows: int, weights: float, read: dict[int, int]) -> float:
    """Operations of a prompt: products with the weights, and scores and values of the pairs that are read.

    Args:
        weights: numbers that every token is multiplied with.
        read: pairs by layer; a layer that is missing reads what the model reads.
    """
    attention = 0.0
    for layer in shape.layers:
        if layer.kind != "other":
            count = read.get(layer.index, rows * dense_pairs(layer, length))
            attention += 2.0 * (layer.head_dim + layer.v_head_dim) * count
    return 2.0 * weights * rows * length + attention


def multiplied(model: torch.nn.Module, weight_bytes: int) -> float:
    """Numbers of the model that every token of a prompt meets: all that a step reads but the output head.

    Args:
        weight_bytes: that one step reads (`generation.weight_bytes`).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    size = next(model.parameters()).element_size()
    return weight_bytes / size - (0 if head is None else head.weight.numel())
