"""Budgets of layers: how many tokens each may hold when together they hold a given number on average."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence


def pyramid(average: int, layers: int, *, beta: int, most: int) -> list[int]:
    """Tokens per layer on a straight line from the first layer down to the last, which add up to layers * average.

    The last layer gets average // beta, the first as much above the average as the last is below it; where the first
    would get more than `most`, it gets that and the line is less steep.

    Source: PyramidKV (2406.02069), section 4.2. The line is rounded towards its middle, alike on both sides, so that
    nothing is lost; the released code rounds its slope down, and so holds more than it was given.
    """
    above = max(0, min(average - average // beta, most - average))
    last = max(1, layers - 1)
    found = []
    for layer in range(layers):
        lean = layers - 1 - 2 * layer
        found.append(average + (lean * above // last if lean >= 0 else -(-lean * above // last)))
    return found


def error_aware(errors: Sequence[float], average: int, *, least: int, most: int) -> list[int]:
    """Tokens per layer in proportion to how much a layer's output suffers from compression, `least` and `most` tokens
    being the bounds; they add up to layers * average.

    What rounding and bounds leave over is dealt out token by token, to the layers that suffer most first; what is
    missing is taken back from those that suffer least.

    Source: CompressKV (2508.02401), section 3.3 and its released code.
    """
    layers = len(errors)
    least, most = min(least, average), max(most, average)
    whole = sum(errors)
    spare = layers * (average - least)
    found = [
        min(most, max(least, least + round(spare * error / whole if whole > 0 else spare / layers))) for error in errors
    ]
    order = sorted(range(layers), key=lambda layer: -errors[layer])
    left = layers * average - sum(found)
    while left:
        sign, bound = (1, most) if left > 0 else (-1, least)
        open_ = [layer for layer in (order if left > 0 else order[::-1]) if found[layer] != bound]
        each = max(1, abs(left) // len(open_))  # whole rounds of single tokens at once
        for layer in open_[: abs(left)]:
            given = min(each, abs(bound - found[layer]))
            found[layer] += sign * given
            left -= sign * given
    return found


def affordable(average: int, weights: Sequence[int], line: Callable[[int], list[int]]) -> list[int]:
    """`line` of the largest average, at most this, whose tokens weigh no more than this average in every layer.

    Args:
        weights: bytes of a token in each layer. Where they are equal the answer is `line(average)`.
    """

    def weight(chosen: int) -> int:
        return sum(w * tokens for w, tokens in zip(weights, line(chosen), strict=True))

    granted = sum(weights) * average
    if weight(average) > granted:  # the layers that get most are the heavier ones
        average = max(0, bisect_right(range(average), granted, key=weight) - 1)
    return line(average)
