"""Two means from different samples: interval and test of their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from foveate.evaluate.statistics import LEVEL, mean_interval

_DRAWS = 10_000
_AT_ONCE = 1_000


def unpaired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The interval of `mean(second) - mean(first)` and the two-sided p of no difference: (low, high, p).

    0/1 scores: Fisher's exact test, and Newcombe's interval from the two Wilson intervals. Others: the difference of
    two bootstrapped means, and a permutation test with the observed split counted in.

    Source of the interval: Newcombe, "Interval estimation for the difference between independent proportions",
    Statistics in Medicine 17 (1998), method 10.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    difference = float(b.mean() - a.mean())
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        one, two = mean_interval(first), mean_interval(second)
        low = difference - math.hypot(two.estimate - two.low, one.high - one.estimate)
        high = difference + math.hypot(two.high - two.estimate, one.estimate - one.low)
        return max(-1.0, low), min(1.0, high), fisher(int(a.sum()), a.size, int(b.sum()), b.size)
    rng = np.random.default_rng(0)
    means = _resampled(rng, b) - _resampled(rng, a)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return min(float(low), difference), max(float(high), difference), _permuted(rng, a, b)


def fisher(hits_a: int, n_a: int, hits_b: int, n_b: int) -> float:
    """Two-sided exact p: the splits of all hits over both sides that are no likelier than the observed one.

    Source: Fisher, "On the interpretation of chi-squared from contingency tables", J. Royal Statistical Society 85
    (1922), with the probabilities of the hypergeometric distribution.
    """
    hits = hits_a + hits_b
    weights = {k: math.comb(n_a, k) * math.comb(n_b, hits - k) for k in range(max(0, hits - n_b), min(n_a, hits) + 1)}
    return min(1.0, sum(w for w in weights.values() if w <= weights[hits_a]) / sum(weights.values()))


def smallest_p(n_a: int, n_b: int) -> float:
    """The smallest two-sided p that samples of these sizes can have."""
    return min(1.0, 2 / math.comb(n_a + n_b, n_a))


def _resampled(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    return values[rng.integers(0, values.size, (2_000, values.size))].mean(1)


def _permuted(rng: np.random.Generator, a: np.ndarray, b: np.ndarray) -> float:
    both = np.concatenate([a, b])
    if np.ptp(both) == 0:
        return 1.0
    seen = abs(b.mean() - a.mean()) - 1e-12 * np.abs(both).max()
    hits = 0
    for _ in range(0, _DRAWS, _AT_ONCE):
        shuffled = rng.permuted(np.broadcast_to(both, (_AT_ONCE, both.size)), axis=1)
        hits += int((np.abs(shuffled[:, a.size :].mean(1) - shuffled[:, : a.size].mean(1)) >= seen).sum())
    return (hits + 1) / (_DRAWS + 1)
