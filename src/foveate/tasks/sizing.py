"""The largest prompt that still fits, for tasks whose body is made as a whole instead of filled with haystack."""

from __future__ import annotations

from collections.abc import Callable

from foveate.tasks.generation import Request
from foveate.tasks.prompt import Draft, room

_SPARE = 24  # tokens left for the last line, which brings the prompt to its exact length
_PROBES = 12


def grow(request: Request, build: Callable[[int], Draft], least: int) -> Draft:
    """The draft of the largest size that leaves some tokens of the length, or one less than a size below it.

    Args:
        build: a draft for a size; more size is more tokens, at about the same rate.
        least: the smallest size there is; it is what the shortest prompt is made of.
    """
    best = build(least)
    if not request.length:
        return best
    low, left = least, room(request.tokenizer, best, request.length) - _SPARE
    if left < 0:
        return best
    high: int | None = None
    step = max(1, least)
    for _ in range(_PROBES):
        size = low + max(1, step) if high is None else min(low + max(1, step), high - 1)
        if size == low:
            break
        draft = build(size)
        rest = room(request.tokenizer, draft, request.length) - _SPARE
        rate = max(0.01, (left - rest) / (size - low))  # tokens per size
        if rest >= 0:
            best, low, left = draft, size, rest
        else:
            high = size
        step = int(left / rate)
        if step == 0 and high is None:
            high = low + 2  # one more may still fit
    return best
