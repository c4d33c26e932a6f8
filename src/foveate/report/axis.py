"""Scales and ticks of the plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to plot units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """At most about `wanted` round values within the scale."""
        if not self.log:
            return linear_ticks(self.low, self.high, wanted)
        for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            found = [
                step * 10.0**power
                for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                for step in steps
                if self.low * (1 - 1e-9) <= step * 10.0**power <= self.high * (1 + 1e-9)
            ]
            if len(found) <= wanted:
                return found if len(found) > 1 else linear_ticks(self.low, self.high, wanted)
        return found


def linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def decimals(ticks: Sequence[float]) -> int:
    """How many decimals tell the ticks apart."""
    for digits in range(6):
        if all(abs(round(t, digits) - t) < 1e-9 * max(1.0, abs(t)) for t in ticks):
            return digits
    return 6


def padded(
    values: Sequence[float],
    share: float,
    *,
    log: bool = False,
    floor: float = -math.inf,
    ceiling: float = math.inf,
    least: float = 0.0,
) -> tuple[float, float]:
    """The range of the values with room around it, at least `least` wide, never beyond what is possible."""
    into: Callable[[float], float] = math.log if log else float
    out: Callable[[float], float] = math.exp if log else float
    low, high = into(min(values)), into(max(values))
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    room = (high - low) * share
    return max(floor, out(low - room)), min(ceiling, out(high + room))
