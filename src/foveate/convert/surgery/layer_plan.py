"""Which layers of a hybrid become what: by count, evenly, or by how much the model's output depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.compat import layer_types
from foveate.errors import BadArgument
from foveate.models.converted import decoder_layers


def every(layers: int, step: int, start: int = 0) -> list[int]:
    """Every step-th layer from `start` on: (32, 4) gives 0, 4, ..., 28.

    Raises:
        BadArgument: a step below 1, or a start that is no layer.
    """
    if step < 1:
        raise BadArgument("step", step, "give at least 1")
    if not 0 <= start < layers:
        raise BadArgument("start", start, f"give 0 to {layers - 1}")
    return list(range(start, layers, step))


def spread(layers: int, count: int) -> list[int]:
    """`count` layers evenly spread, the first layer among them.

    Raises:
        BadArgument: a count outside 1..layers.
    """
    _check_count(layers, count)
    return [index * layers // count for index in range(count)]


def listed(layers: int, chosen: Sequence[int]) -> list[int]:
    """Layers by their numbers, checked and sorted.

    Raises:
        BadArgument: numbers twice, or of no layer.
    """
    if len(set(chosen)) != len(chosen) or any(not 0 <= index < layers for index in chosen):
        raise BadArgument("layers", list(chosen), f"give different numbers from 0 to {layers - 1}")
    return sorted(chosen)


def smart(scores: Sequence[float], count: int) -> list[int]:
    """The `count` layers with the largest sum of scores that are spread nearly evenly (SMART, Zebra-Llama, arXiv
    2505.17272, section 3.3).

    With L layers and n to choose, the first one is the best-scored of the first L // n, the last one of the last
    L // n, and the steps between neighbours differ by at most one. The lists of layers that were published with the
    paper's models keep these rules.

    Args:
        scores: one per layer, larger where the choice helps more.

    Raises:
        BadArgument: a count outside 1..layers.
    """
    layers = len(scores)
    _check_count(layers, count)
    ends = layers // count
    first = max(range(ends), key=lambda index: scores[index])
    if count == 1:
        return [first]
    last = max(range(layers - ends, layers), key=lambda index: scores[index])
    low = (last - first) // (count - 1)
    steps = (low,) if low * (count - 1) == last - first else (low, low + 1)
    best: dict[int, tuple[float, list[int]]] = {first: (scores[first], [first])}
    for _ in range(count - 1):
        found: dict[int, tuple[float, list[int]]] = {}
        for place, (total, path) in best.items():
            for index in (place + step for step in steps):
                if index <= last and (index not in found or total + scores[index] > found[index][0]):
                    found[index] = (total + scores[index], [*path, index])
        best = found
    return best[last][1]


@torch.no_grad()
def sensitivities(
    teacher: Any, student: Any, donor: Any, batches: Iterable[Tensor], watch: Callable[[int], None] = lambda layer: None
) -> list[float]:
    """By layer, how much nearer to the teacher the student comes with the donor's layer in place of its own.

    KL(teacher ‖ student) - KL(teacher ‖ student with the donor's layer), mean over tokens, nats. The student is left as
    it was.

    Args:
        student, donor: models of converted types with the same layers but for their attention.
        batches: [B, N] token ids without padding.
        watch: told each layer when it was tried.

    Raises:
        BadArgument: no batch.
    """
    count, tokens = len(decoder_layers(student)), 0
    sums = torch.zeros(count, dtype=torch.float64)
    for batch in batches:
        ids = batch.to(student.device)
        wanted = teacher(ids, use_cache=False).logits.float().log_softmax(-1)
        plain = _divergence(wanted, student, ids)
        for layer in range(count):
            with swapped(student, layer, donor):
                sums[layer] += plain - _divergence(wanted, student, ids)
            watch(layer)
        tokens += ids.numel()
    if not tokens:
        raise BadArgument("batches", "none", "give at least one batch of token ids [B, N]")
    return (sums / tokens).tolist()


def _divergence(wanted: Tensor, student: Any, ids: Tensor) -> float:
    """Summed over tokens."""
    ours = student(ids, use_cache=False).logits.float().log_softmax(-1)
    return float((wanted.exp() * (wanted - ours)).sum(-1).double().sum())


@contextmanager
def swapped(model: Any, layer: int, donor: Any) -> Iterator[None]:
    """The model with one decoder layer of another one."""
    layers, said = decoder_layers(model), getattr(model.config, "layer_types", None)
    mine, types = layers[layer], list(said or layer_types(model))
    types[layer] = (getattr(donor.config, "layer_types", None) or layer_types(donor))[layer]
    try:
        layers[layer] = decoder_layers(donor)[layer]
        # Decoders that look masks up by layer type read it here.
        model.config.layer_types = types
        yield
    finally:
        layers[layer] = mine
        if said is None:
            del model.config.layer_types
        else:
            model.config.layer_types = said


def _check_count(layers: int, count: int) -> None:
    if not 1 <= count <= layers:
        raise BadArgument("count", count, f"give 1 to {layers} layers")
