"""What a comparison may claim from its samples: intervals, paired tests and the Pareto front.

Nothing here knows records or methods. All random draws are seeded: the same scores give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from foveate.errors import BadArgument

LEVEL = 0.95
_DRAWS_AT_ONCE = 2_000_000  # numbers held in memory by one batch of resamples
_EXACT_UP_TO = 14  # differences whose 2^n sign patterns are enumerated instead of sampled


@dataclass(frozen=True)
class Interval:
    """An estimate from n samples and the interval that holds the truth with probability `level`."""

    estimate: float
    low: float
    high: float
    n: int
    level: float = LEVEL


@dataclass(frozen=True)
class Paired:
    """How a method differs from the baseline on the same n samples. Positive is better than the baseline.

    `p` is two-sided: the chance of a mean difference at least this large if the two were alike. `better` and `worse`
    count samples.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    better: int
    worse: int
    level: float = LEVEL

    @property
    def can_detect(self) -> bool:
        """Whether n samples could show any difference at all: the smallest two-sided p of n pairs is 2^(1-n)."""
        return 2.0 ** (1 - self.n) < 1 - self.level

    @property
    def loss(self) -> bool:
        """Whether the samples show that the method is worse than the baseline."""
        return self.difference < 0 and self.p < 1 - self.level

    @property
    def gain(self) -> bool:
        """Whether the samples show that the method is better than the baseline."""
        return self.difference > 0 and self.p < 1 - self.level


def _values(argument: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise BadArgument(argument, values, "give at least one number")
    if not np.isfinite(array).all():
        raise BadArgument(argument, values, "give finite numbers only")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadArgument("level", level, "give a probability between 0 and 1, such as 0.95")


def wilson(successes: float, n: int, level: float = LEVEL) -> Interval:
    """Score interval of a share: never leaves 0..1 and is not empty at 0 or n successes.

    `successes` may be a fraction: for scores between 0 and 1 the sum of the scores gives an interval that is too wide
    rather than too narrow, because no variable on 0..1 varies more than a 0/1 one with its mean.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    _check_level(level)
    if n < 1:
        raise BadArgument("n", n, "give at least one sample")
    if not 0 <= successes <= n:
        raise BadArgument("successes", successes, f"give a number between 0 and n={n}")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the formula gives exactly 0 or 1; rounding must not push the interval off its estimate.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high, n, level)


def bootstrap(
    values: Sequence[float], level: float = LEVEL, resamples: int = 2000, seed: int = 0, *, argument: str = "values"
) -> Interval:
    """Percentile bootstrap interval of a mean.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    _check_level(level)
    if resamples < 1:
        raise BadArgument("resamples", resamples, "give at least one")
    array = _values(argument, values)
    n = array.size
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = array[rng.integers(0, n, (stop - start, n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = float(array.mean())
    # The mean of n equal floats can differ from them in the last bit; the interval always holds its estimate.
    return Interval(mean, min(float(low), mean), max(float(high), mean), n, level)


def mean_interval(scores: Sequence[float], level: float = LEVEL, seed: int = 0) -> Interval:
    """Interval of the mean score of a method.

    0/1 scores get Wilson's. Others are bootstrapped, except when all are equal: resampling equal numbers claims
    certainty from any n, so scores within 0..1 then get Wilson's too. Equal scores outside 0..1 (a loss) have nothing
    to estimate a spread from, and the interval is the number itself.
    """
    array = _values("scores", scores)
    within = bool(((array >= 0) & (array <= 1)).all())
    if within and (np.isin(array, (0.0, 1.0)).all() or np.ptp(array) == 0):
        return wilson(min(float(array.sum()), float(array.size)), array.size, level)
    return bootstrap(scores, level, seed=seed, argument="scores")


def mcnemar_exact(better: int, worse: int) -> float:
    """Two-sided exact p of `better` wins against `worse` losses among pairs that differ.

    Source: McNemar, Psychometrika 12 (1947), with the exact binomial tail.
    """
    if better < 0 or worse < 0:
        raise BadArgument("better, worse", (better, worse), "give counts")
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip(differences: Sequence[float], draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided permutation p of a mean difference: the share of sign patterns with a mean at least as large.

    Exact (all patterns) for at most 14 differences that are not zero, else `draws` random patterns with the observed
    one counted in, so that p is never 0.

    Source: Fisher, The Design of Experiments (1935), section 21.
    """
    if draws < 1:
        raise BadArgument("draws", draws, "give at least one")
    array = _values("differences", differences)
    array = array[array != 0]
    n = array.size
    if n == 0:
        return 1.0
    # Sums that are equal on paper differ in the last bits; a tie must count as "at least as large".
    total = float(array.sum())
    seen = abs(total) * (1 - 1e-12) - 1e-300
    if n <= _EXACT_UP_TO:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ array) >= seen).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    step = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, draws, step):
        flipped = rng.integers(0, 2, (min(step, draws - start), n), dtype=np.int8)
        hits += int((np.abs(total - 2.0 * (flipped @ array)) >= seen).sum())
    return (hits + 1) / (draws + 1)


def paired(
    scores: Sequence[float],
    baseline: Sequence[float],
    *,
    higher_is_better: bool = True,
    level: float = LEVEL,
    seed: int = 0,
) -> Paired:
    """Compares a method with the baseline on the same samples, index by index.

    0/1 scores: exact McNemar test, and the adjusted Wald interval, which stays open when no pair differs. Others: sign
    flips and the bootstrap; when all differences are equal and all scores within 0..1 the adjusted Wald interval of
    that many pairs, else the number itself.

    Source of the interval: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data", J. Educational and Behavioral Statistics 37 (2012).
    """
    _check_level(level)
    mine, base = _values("scores", scores), _values("baseline", baseline)
    if mine.size != base.size:
        raise BadArgument("scores", f"{mine.size} scores", f"give one per sample of the baseline ({base.size})")
    differences = (mine - base) * (1.0 if higher_is_better else -1.0)
    n = differences.size
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    both = np.concatenate([mine, base])
    binary = bool(np.isin(both, (0.0, 1.0)).all())
    within = bool(((both >= 0) & (both <= 1)).all())
    mean = float(differences.mean())
    p = mcnemar_exact(better, worse) if binary else sign_flip(differences.tolist(), seed=seed)
    if binary or (within and np.ptp(differences) == 0):
        up, down = (better + 1) / (n + 2), (worse + 1) / (n + 2)
        half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
        low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
        low, high = min(low, mean), max(high, mean)
    else:
        interval = bootstrap(differences.tolist(), level, seed=seed)
        low, high = interval.low, interval.high
    return Paired(mean, low, high, p, n, better, worse, level)


def samples_needed(loss: float, discordant: float | None = None, level: float = LEVEL, power: float = 0.8) -> int:
    """How many paired 0/1 samples show a loss of this size with probability `power`.

    Args:
        loss: the drop of the mean score, 0..1.
        discordant: share of the samples on which the two differ; None: only those that are lost, the best case.

    Source: Connor, "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43
    (1987); never fewer than the pairs without which no exact test can be significant.
    """
    _check_level(level)
    _check_level(power)
    if not 0 < loss <= 1:
        raise BadArgument("loss", loss, "give a share above 0, at most 1")
    differ = loss if discordant is None else discordant
    if not loss <= differ <= 1:
        raise BadArgument("discordant", discordant, f"give a share of at least the loss ({loss:g}), at most 1")
    z_level, z_power = NormalDist().inv_cdf((1 + level) / 2), NormalDist().inv_cdf(power)
    n = (z_level * math.sqrt(differ) + z_power * math.sqrt(max(0.0, differ - loss**2))) ** 2 / loss**2
    fewest = math.floor(1 - math.log2(1 - level)) + 1  # differing pairs whose all-or-nothing split is significant
    return max(math.ceil(n), math.ceil(fewest / differ))


def detectable_loss(n: int, level: float = LEVEL, power: float = 0.8) -> float | None:
    """The smallest loss that n paired 0/1 samples show with probability `power` in the best case; None if none."""
    if n < 1:
        raise BadArgument("n", n, "give at least one sample")
    if samples_needed(1.0, level=level, power=power) > n:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if samples_needed(middle, level=level, power=power) <= n else (middle, high)
    return high


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for there being several: the chance of any false alarm among all of them stays at the
    level that each is compared with.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian J. of Statistics 6 (1979).
    """
    array = _values("ps", ps) if len(ps) else np.zeros(0)
    if ((array < 0) | (array > 1)).any():
        raise BadArgument("ps", list(ps), "give probabilities")
    corrected, highest = np.empty_like(array), 0.0
    for rank, i in enumerate(np.argsort(array, kind="stable")):
        highest = max(highest, min(1.0, float(array[i]) * (array.size - rank)))
        corrected[i] = highest
    return corrected.tolist()


def describe(result: Paired, digits: int = 2) -> str:
    """The result in words that claim no more than the samples show."""
    if not result.can_detect:
        return f"too few samples to detect any loss (n={result.n})"
    ends = f"{result.low:+.{digits}f} to {result.high:+.{digits}f}"
    figures = f"{result.difference:+.{digits}f}, {result.level:.0%} CI {ends}, {p_text(result.p)}"
    figures = figures.replace("-", "\N{MINUS SIGN}")
    if result.loss:
        return f"worse than dense ({figures}, n={result.n})"
    if result.gain:
        return f"better than dense ({figures}, n={result.n})"
    return f"no detectable loss at n={result.n} ({figures})"


def p_text(p: float) -> str:
    return "p<0.001" if p < 0.001 else f"p={p:.3f}" if p < 0.1 else f"p={p:.2f}"


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> list[bool]:
    """For each point whether no other is at most as costly and at least as good, and better in one of the two.

    Points that tie in both are all kept.
    """
    costs, qualities = _values("cost", cost), _values("quality", quality)
    if costs.size != qualities.size:
        raise BadArgument("cost", f"{costs.size} costs", f"give one per quality ({qualities.size})")
    front = [False] * costs.size
    order = sorted(range(costs.size), key=lambda i: (costs[i], -qualities[i]))
    best, best_cost = -math.inf, math.nan
    for i in order:
        if qualities[i] > best:
            best, best_cost = qualities[i], costs[i]
            front[i] = True
        elif qualities[i] == best and costs[i] == best_cost:
            front[i] = True
    return front
