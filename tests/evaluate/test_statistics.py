"""The statistics against brute force: enumeration of all outcomes, all resamples, all sign patterns."""

from __future__ import annotations

import itertools
import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import BadArgument
from foveate.evaluate.statistics import (
    Paired,
    bootstrap,
    describe,
    detectable_loss,
    holm,
    mcnemar_exact,
    mean_interval,
    paired,
    pareto_front,
    samples_needed,
    sign_flip,
    wilson,
)


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_ends_are_the_shares_whose_score_test_is_just_passed(level: float):
    z = NormalDist().inv_cdf((1 + level) / 2)
    for n in (1, 2, 7, 30):
        for k in range(n + 1):
            interval = wilson(k, n, level)
            assert interval.low <= k / n <= interval.high
            for end in (interval.low, interval.high):
                if 0 < end < 1:
                    assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert wilson(0, 5).low == 0
    assert wilson(0, 5).high > 0.3
    assert wilson(5, 5).high == 1
    assert wilson(5, 5).low < 0.7


def test_wilson_covers_the_truth_as_often_as_it_says():
    n = 25
    intervals = [wilson(k, n) for k in range(n + 1)]
    shares = [i / 200 for i in range(1, 200)]
    covered = [sum(binomial(n, k, p) for k, i in enumerate(intervals) if i.low <= p <= i.high) for p in shares]
    assert 0.94 < sum(covered) / len(covered) < 0.97


def test_bootstrap_ends_are_quantiles_of_all_resamples():
    rng = random.Random(3)
    for n in (3, 5):
        values = [rng.gauss(0, 1) for _ in range(n)]
        means = np.sort([sum(pick) / n for pick in itertools.product(values, repeat=n)])
        interval = bootstrap(values, 0.9, resamples=40_000, seed=1)
        assert interval.estimate == pytest.approx(sum(values) / n)
        for end, share in ((interval.low, 0.05), (interval.high, 0.95)):
            below = np.searchsorted(means, end - 1e-9) / means.size
            upto = np.searchsorted(means, end + 1e-9, side="right") / means.size
            # A resampled share of 5 % has a standard error of 0.1 % at 40,000 draws.
            assert below - 0.006 <= share <= upto + 0.006


def test_bootstrap_is_seeded_and_does_not_depend_on_how_it_is_cut_into_batches():
    rng = random.Random(4)
    values = [rng.random() for _ in range(1500)]
    first = bootstrap(values, resamples=3000, seed=5)
    assert first == bootstrap(values, resamples=3000, seed=5)
    assert first != bootstrap(values, resamples=3000, seed=6)
    spread = np.std(values) / math.sqrt(len(values))
    assert first.high - first.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_equal_scores_do_not_claim_certainty():
    assert mean_interval([1, 1, 1, 1, 1]) == wilson(5, 5)
    assert mean_interval([0.75] * 6) == wilson(4.5, 6)
    assert mean_interval([1, 0, 1]) == wilson(2, 3)
    loss = mean_interval([2.5, 2.5, 2.5])
    assert (loss.low, loss.high) == (2.5, 2.5)
    assert mean_interval([0.5, 0.75, 1.0]) == bootstrap([0.5, 0.75, 1.0])
    tenth = mean_interval([0.1] * 3)
    assert tenth.low < 0.1 < tenth.high


def brute_sign_flip(differences: list[float]) -> float:
    seen = abs(math.fsum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(math.fsum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in patterns]
    return sum(total >= seen - 1e-9 for total in sums) / len(patterns)


def test_mcnemar_is_the_sign_flip_test_of_pairs_that_differ():
    for better in range(7):
        for worse in range(7 - better):
            differences = [1.0] * better + [-1.0] * worse
            expected = brute_sign_flip(differences) if differences else 1.0
            assert mcnemar_exact(better, worse) == pytest.approx(expected)


def test_sign_flip_enumerates_small_samples():
    rng = random.Random(9)
    for n in range(1, 11):
        differences = [rng.choice([-0.5, 0.0, 0.1, 0.25, rng.gauss(0.2, 1)]) for _ in range(n)]
        assert sign_flip(differences) == pytest.approx(brute_sign_flip(differences))
    assert sign_flip([0.0, 0.0]) == 1.0


def test_sign_flip_samples_large_ones_close_to_the_truth():
    rng = random.Random(10)
    differences = [rng.gauss(0.25, 1) for _ in range(16)]
    exact = brute_sign_flip(differences)
    error = math.sqrt(exact * (1 - exact) / 20_000)
    assert abs(sign_flip(differences, draws=20_000, seed=2) - exact) < 4 * error
    assert sign_flip([1.0] * 60) == pytest.approx(1 / 10_001)


def test_paired_counts_and_signs():
    rng = random.Random(11)
    for _ in range(20):
        n = rng.randrange(1, 12)
        mine, base = [[float(rng.random() < 0.6) for _ in range(n)] for _ in range(2)]
        result = paired(mine, base)
        differences = [a - b for a, b in zip(mine, base, strict=True)]
        assert result.difference == pytest.approx(sum(differences) / n)
        assert (result.better, result.worse) == (differences.count(1.0), differences.count(-1.0))
        assert result.p == pytest.approx(brute_sign_flip(differences))
        assert -1 <= result.low <= result.difference <= result.high <= 1
        back = paired(base, mine)
        assert (back.difference, back.p) == (-result.difference, result.p)
        assert (back.low, back.high) == pytest.approx((-result.high, -result.low))


def test_paired_turns_losses_round():
    rng = random.Random(12)
    base = [rng.gauss(2.5, 0.3) for _ in range(40)]
    worse = [x + abs(rng.gauss(0.1, 0.02)) for x in base]
    result = paired(worse, base, higher_is_better=False)
    assert result.difference < 0
    assert result.loss
    assert result.high < 0
    assert paired(worse, base).gain


def test_paired_interval_of_01_scores_covers_the_truth():
    """All outcomes of 14 pairs, by their trinomial probabilities."""
    n = 14
    intervals = {}
    for better in range(n + 1):
        for worse in range(n + 1 - better):
            mine = [1.0] * better + [0.0] * worse + [1.0] * (n - better - worse)
            base = [0.0] * better + [1.0] * worse + [1.0] * (n - better - worse)
            intervals[better, worse] = paired(mine, base)
    for up, down in ((0.0, 0.05), (0.05, 0.05), (0.1, 0.3), (0.02, 0.5), (0.3, 0.3)):
        covered = 0.0
        for (better, worse), result in intervals.items():
            same = n - better - worse
            ways = math.comb(n, better) * math.comb(n - better, worse)
            if result.low - 1e-12 <= up - down <= result.high + 1e-12:
                covered += ways * up**better * down**worse * (1 - up - down) ** same
        assert covered > 0.93, (up, down)


def test_no_pair_that_differs_is_not_proof_of_no_loss():
    result = paired([1.0] * 20, [1.0] * 20)
    assert (result.difference, result.p) == (0, 1)
    assert result.low < -0.05
    assert result.high > 0.05
    assert paired([0.5] * 20, [0.5] * 20).low < -0.05


@pytest.mark.parametrize(("n", "can"), [(1, False), (5, False), (6, True), (50, True)])
def test_can_detect_is_whether_all_pairs_lost_would_show(n: int, can: bool):
    result = paired([0.0] * n, [1.0] * n)
    assert result.can_detect is can
    assert result.loss is can


def test_words_claim_no_more_than_the_samples_show():
    assert describe(paired([0.0] * 4, [1.0] * 4)) == "too few samples to detect any loss (n=4)"
    alike = describe(paired([1.0, 0.0] * 30, [1.0, 0.0] * 30))
    assert alike.startswith("no detectable loss at n=60 (+0.00, 95% CI −0.")
    assert alike.endswith(", p=1.00)")
    worse = describe(Paired(-0.12, -0.2, -0.05, 0.0004, 60, 1, 9))
    assert worse == "worse than dense (−0.12, 95% CI −0.20 to −0.05, p<0.001, n=60)"
    assert describe(Paired(0.12, 0.05, 0.2, 0.012, 60, 9, 1)).startswith("better than dense (+0.12")


def test_pareto_front_is_what_nothing_dominates():
    rng = random.Random(13)
    for _ in range(200):
        n = rng.randrange(1, 12)
        # Few distinct values: ties in cost, in quality and in both.
        cost = [rng.randrange(4) / 2 for _ in range(n)]
        quality = [rng.randrange(4) / 3 for _ in range(n)]
        expected = [
            not any(
                cost[j] <= cost[i] and quality[j] >= quality[i] and (cost[j] < cost[i] or quality[j] > quality[i])
                for j in range(n)
            )
            for i in range(n)
        ]
        assert pareto_front(cost, quality) == expected


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: wilson(1, 0), "n"),
        (lambda: wilson(3, 2), "successes"),
        (lambda: wilson(1, 2, level=1.0), "level"),
        (lambda: bootstrap([]), "values"),
        (lambda: bootstrap([1.0], resamples=0), "resamples"),
        (lambda: mean_interval([float("nan")]), "scores"),
        (lambda: sign_flip([]), "differences"),
        (lambda: mcnemar_exact(-1, 0), "better, worse"),
        (lambda: paired([1.0], [1.0, 0.0]), "scores"),
        (lambda: pareto_front([1.0], [1.0, 2.0]), "cost"),
    ],
)
def test_bad_arguments_are_named(call, argument: str):
    with pytest.raises(BadArgument) as caught:
        call()
    assert caught.value.argument == argument


@pytest.mark.parametrize(("loss", "discordant"), [(0.1, None), (0.2, 0.3), (0.05, 0.1), (0.5, 0.6)])
def test_samples_needed_give_the_power_they_promise(loss: float, discordant: float | None) -> None:
    n = samples_needed(loss, discordant)
    differ = loss if discordant is None else discordant
    rng = np.random.default_rng(7)
    worse_of = (differ + loss) / 2
    found = []
    for _ in range(1500):
        worse, better, _ = rng.multinomial(n, [worse_of, differ - worse_of, 1 - differ])
        found.append(worse > better and mcnemar_exact(int(better), int(worse)) < 0.05)
    # The formula is the normal one, the test the exact one, which is more careful with few pairs.
    assert 0.64 <= np.mean(found) <= 0.97


def test_the_detectable_loss_is_the_inverse_of_the_samples_needed() -> None:
    for n in (8, 20, 100, 1000):
        loss = detectable_loss(n)
        assert loss is not None
        assert samples_needed(loss) <= n < samples_needed(loss * 0.98) + 1
    assert detectable_loss(5) is None  # 2^(1-5) is above 5 %
    assert detectable_loss(6) == pytest.approx(1.0)


def test_holm_against_the_definition() -> None:
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_and_keeps_their_order(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(a >= b for a, b in zip(corrected, ps, strict=True))
    order = sorted(range(len(ps)), key=lambda i: (ps[i], i))
    assert [corrected[i] for i in order] == sorted(corrected)
    assert max(corrected) <= 1


@pytest.mark.parametrize("bad", [0.0, 1.5, -0.1])
def test_a_loss_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(BadArgument, match="loss"):
        samples_needed(bad)
