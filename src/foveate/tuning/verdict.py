"""What may be claimed of a setting's loss, and how many samples a claim needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from foveate.evaluate.statistics import LEVEL, detectable_loss, samples_needed
from foveate.tuning.outcome import Outcome


def level_of(check: int) -> float:
    """The level of the interval of the check number 0, 1, 2 …, of which the first that holds decides.

    Only the lower end of an interval is used, so the first check errs with probability (1 - LEVEL) / 2; each further
    one gets half of what the one before it had, and all of them together stay below 1 - LEVEL.
    """
    return 1 - (1 - LEVEL) / 2**check


def shortfall(loss: float, n: int, level: float = LEVEL, dense: float = 1.0) -> str | None:
    """Why n pairs of scores within 0..1 cannot support a claim about a loss of this share of dense's score.

    They must be able to show such a loss if it were there: as `samples_needed` has it, at the best of circumstances.
    """
    if samples_needed(loss * dense, level=level) <= n:
        return None
    least = detectable_loss(n, level=level)
    return f"n={n} cannot show {'any loss' if least is None else f'a loss below {100 * least / dense:.2g}%'}"


@dataclass(frozen=True)
class Verdict:
    """A setting on samples that the search has not seen.

    Args:
        outcome: with its interval at the level of this check.
        max_loss: what was allowed, as a share of dense's score.
        cells: lengths × tasks, each of which has the same number of samples.
    """

    outcome: Outcome
    max_loss: float
    cells: int

    @property
    def status(self) -> Literal["shown", "open", "over"]:
        """shown: enough samples, and their interval rules out a larger loss than allowed; open: not so; over: the
        samples lose more, or the setting costs no less than dense."""
        if not self.outcome.keeps(self.max_loss) or self.outcome.cost >= 1:
            return "over"
        able = self.short is None and self.outcome.difference.can_detect
        return "shown" if able and self.outcome.difference.low >= -self.limit - 1e-12 else "open"

    @property
    def limit(self) -> float:
        """The allowed loss in points of the score."""
        return self.max_loss * self.outcome.dense

    @property
    def short(self) -> str | None:
        """Why there are too few samples for the claim, where that can be said of their number alone."""
        found = self.outcome
        return shortfall(self.max_loss, found.n, found.difference.level, found.dense) if found.bounded else None

    @property
    def samples_needed(self) -> int:
        """Samples per length and task at which the claim could be made if the setting lost nothing, and samples
        differed as often and as much as here."""
        found = self.outcome.difference
        if self.outcome.bounded:
            differ = max(self.limit, (found.better + found.worse) / found.n)
            pairs = samples_needed(self.limit, min(1.0, differ), found.level)
        else:  # half an interval is z standard errors; z_power more of them for a fair chance to fit
            z, z_power = NormalDist().inv_cdf((1 + found.level) / 2), NormalDist().inv_cdf(0.8)
            half = (found.high - found.low) / 2 * (1 + z_power / z)
            pairs = math.ceil(found.n * (half / self.limit) ** 2)
        return max(math.ceil(pairs / self.cells), found.n // self.cells + 1)

    @property
    def sentence(self) -> str:
        """The claim, no stronger than the samples."""
        found, dense = self.outcome.difference, self.outcome.dense
        ends = f"{signed(found.low / dense)} to {signed(found.high / dense)}"
        level = f"{100 * found.level:.4g}% CI"
        seen = f"{signed(found.difference / dense)} of dense's score on fresh samples ({level} {ends}, n={found.n})"
        asked = f"{100 * self.max_loss:g}%"
        if self.status == "over":
            if self.outcome.cost >= 1:
                return f"{seen}; measured again it costs {self.outcome.cost:.2f} of dense"
            return f"{seen}; that is more than the {asked} allowed"
        if self.status == "shown":
            return f"{seen}: a loss above {asked} is ruled out"
        why = self.short or f"n={found.n} does not settle whether the loss is below {asked}"
        return f"{seen}; {why}: give --samples at least {self.samples_needed}"

    def to_json(self) -> dict[str, Any]:
        """JSON values; shares are of dense's score and of dense's cost."""
        found, dense = self.outcome.difference, self.outcome.dense
        return {
            "status": self.status,
            "sentence": self.sentence,
            "max_loss": self.max_loss,
            "loss": self.outcome.loss,
            "loss_low": -found.high / dense,
            "loss_high": -found.low / dense,
            "level": found.level,
            "p": found.p,
            "n": found.n,
            "better": found.better,
            "worse": found.worse,
            "dense": dense,
            "cost": self.outcome.cost,
            "samples_needed": None if self.status == "shown" else self.samples_needed,
        }


def signed(share: float) -> str:
    """`+1.5%`, with a true minus."""
    share = 0.0 if abs(share) < 5e-5 else share
    return f"{100 * share:+.2g}%".replace("-", "\N{MINUS SIGN}")


def forewarning(max_loss: float, samples: int, cells: int) -> str | None:
    """What can be told before anything is run: that so few samples cannot show so small a loss whatever they say.

    For tasks scored within 0..1, of which dense scores at most 1.
    """
    why = shortfall(max_loss, samples * cells)
    return why and f"{why}: give --samples at least {math.ceil(samples_needed(max_loss) / cells)}"
