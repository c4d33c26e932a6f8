"""Many pairs at once against the same test one by one."""

from __future__ import annotations

import random

import pytest

from foveate.evaluate.statistics import paired
from foveate.report.significance import paired_many


def draw(rng: random.Random, n: int, shift: float) -> tuple[list[float], list[float]]:
    base = [rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(n)]
    return [min(1.0, max(0.0, b + rng.choice([0.0, 0.0, -0.25, 0.25]) + shift)) for b in base], base


def test_many_pairs_say_what_each_says_alone():
    rng = random.Random(3)
    pairs = [draw(rng, n, shift) for n in (9, 40, 200) for shift in (-0.1, 0.0, 0.02)]
    pairs.append(([1.0, 0.0, 1.0], [1.0, 1.0, 1.0]))
    pairs.append(([0.5, 0.5], [0.25, 0.25]))
    for higher in (True, False):
        for (mine, base), found in zip(pairs, paired_many(pairs, higher_is_better=higher), strict=True):
            alone = paired(mine, base, higher_is_better=higher)
            assert (found.n, found.better, found.worse) == (alone.n, alone.better, alone.worse)
            assert found.difference == pytest.approx(alone.difference, abs=1e-12)
            assert found.p == pytest.approx(alone.p, abs=0.02)
            assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.02)
            if len(mine) <= 14:
                assert found.p == alone.p


def test_nothing_and_bad_pairs():
    assert paired_many([]) == []
    with pytest.raises(ValueError, match="one per sample of the baseline"):
        paired_many([([0.5, 0.2], [0.1])])


def test_large_samples_show_smaller_p_than_draws_can():
    rng = random.Random(4)
    base = [rng.random() for _ in range(200)]
    (found,) = paired_many([([b + rng.uniform(0, 0.5) for b in base], base)])
    assert 0 < found.p < 1e-12
    (exact,) = paired_many([([b + 0.01 * (i + 1) for i, b in enumerate(base[:14])], base[:14])])
    assert exact.p == 2 / 2**14
