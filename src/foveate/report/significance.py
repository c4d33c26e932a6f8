"""Many intervals and paired tests at once: those of `evaluate.statistics`, their random draws shared by all.

0/1 scores need no draws. For others every pair would draw the same number of sign patterns and resamples for itself;
drawn once for all pairs of equal length they are a matrix product, and a report with thousands of pairs is made in
seconds. Each p and each interval is as good as alone: sharing draws only makes their errors go together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from foveate.evaluate.statistics import LEVEL, Interval, Paired, mean_interval, paired, sign_flip

_FLIPS = 10_000
_RESAMPLES = 2_000
_EXACT_UP_TO = 14  # sign_flip enumerates the patterns of as many differences
_AT_ONCE = 1_000  # draws held in memory

Scores = Sequence[float]


def mean_intervals(samples: Sequence[Scores]) -> list[Interval]:
    """`mean_interval(scores)` of every list of scores, in order."""
    found: dict[int, Interval] = {}
    waiting: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for i, scores in enumerate(samples):
        values = np.asarray(scores, dtype=np.float64)
        if values.size == 0 or np.ptp(values) == 0 or np.isin(values, (0.0, 1.0)).all():
            found[i] = mean_interval(scores)
        else:
            waiting[values.size].append((i, values))
    for entries in waiting.values():
        low, high = _ends(np.stack([values for _, values in entries], axis=1))
        for (i, values), start, end in zip(entries, low.tolist(), high.tolist(), strict=True):
            mean = float(values.mean())
            found[i] = Interval(mean, min(start, mean), max(end, mean), values.size, LEVEL)
    return [found[i] for i in range(len(samples))]


def paired_many(pairs: Sequence[tuple[Scores, Scores]], *, higher_is_better: bool = True) -> list[Paired]:
    """`paired(scores, baseline)` of every pair, in order."""
    found: dict[int, Paired] = {}
    waiting: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for i, (scores, baseline) in enumerate(pairs):
        mine, base = np.asarray(scores, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
        differences = (mine - base) * (1.0 if higher_is_better else -1.0) if mine.size == base.size else mine
        binary = bool(np.isin(np.concatenate([mine, base]), (0.0, 1.0)).all())
        if binary or mine.size != base.size or np.ptp(differences) == 0:
            found[i] = paired(scores, baseline, higher_is_better=higher_is_better)
        else:
            waiting[differences.size].append((i, differences))
    for entries in waiting.values():
        for (i, _), result in zip(entries, _tested(np.stack([d for _, d in entries], axis=1)), strict=True):
            found[i] = result
    return [found[i] for i in range(len(pairs))]


def _tested(differences: np.ndarray) -> list[Paired]:
    """Results of the columns of [n, pairs]."""
    n = len(differences)
    low, high = _ends(differences)
    sizes = (differences != 0).sum(0)
    ps = _flipped(differences)
    results = []
    for column, p in zip(differences.T, ps, strict=True):
        i = len(results)
        mean = float(column.mean())
        if sizes[i] <= _EXACT_UP_TO:
            p = sign_flip(column.tolist())
        better, worse = int((column > 0).sum()), int((column < 0).sum())
        ends = (min(float(low[i]), mean), max(float(high[i]), mean))
        results.append(Paired(mean, *ends, float(p), n, better, worse, LEVEL))
    return results


def _ends(differences: np.ndarray) -> np.ndarray:
    """Percentile bootstrap intervals of the column means, [2, pairs]."""
    rng, n = np.random.default_rng(0), len(differences)
    means = np.empty((_RESAMPLES, differences.shape[1]))
    for start in range(0, _RESAMPLES, _AT_ONCE):
        stop = min(start + _AT_ONCE, _RESAMPLES)
        drawn = rng.integers(0, n, (stop - start, n)) + n * np.arange(stop - start)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=(stop - start) * n).reshape(stop - start, n)
        means[start:stop] = counts @ differences / n
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def _flipped(differences: np.ndarray) -> np.ndarray:
    """Two-sided sign-flip p of the column sums, [pairs]; the observed pattern is counted in.

    So many draws cannot show a p below 1e-4, which corrections for hundreds of pairs ask for. Hoeffding's bound of the
    exact p takes their place where it is smaller: it is never below the exact p.

    Source of the bound: Hoeffding, "Probability inequalities for sums of bounded random variables", JASA 58 (1963).
    """
    rng, total = np.random.default_rng(0), differences.sum(0)
    # Sums that are equal on paper differ in the last bits; a tie must count as "at least as large".
    seen = np.abs(total) - 1e-12 * np.abs(differences).sum(0)
    hits = np.zeros(differences.shape[1], dtype=np.int64)
    for start in range(0, _FLIPS, _AT_ONCE):
        flips = rng.integers(0, 2, (min(_AT_ONCE, _FLIPS - start), len(differences)), dtype=np.int8)
        hits += (np.abs(total - 2.0 * (flips.astype(np.float64) @ differences)) >= seen).sum(0)
    bound = 2 * np.exp(-(total**2) / (2 * (differences**2).sum(0)))
    return np.minimum((hits + 1) / (_FLIPS + 1), bound)
