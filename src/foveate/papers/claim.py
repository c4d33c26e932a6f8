"""What a paper promises, and how that is looked at here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate.errors import BadArgument

MEASURES = {
    "quality": "share of the baseline's mean score kept, over the tasks that have a score",
    "perplexity": "rise of the negative log-likelihood per token over dense, nats",
    "bytes": "share of the dense cache held",
    "pairs": "share of the dense query-key pairs read per new token",
    "prompt pairs": "share of the dense query-key pairs computed for the prompt",
    "decode": "time per new token over that of dense, on a GPU",
    "prefill": "time of the prompt over that of dense, on a GPU",
}
"""What can be looked at, each in words. Of quality more is better, of all others less."""

TIMED = ("decode", "prefill")
"""The measures that come from benches; the others come from records."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One look at a claim.

    Attributes:
        measure: one of `MEASURES`.
        method: the method whose rows are looked at, as records name it; the paper's own id if empty.
        budget: the budget of the row, as records write it: the claim's own share, or the nearest measured one above
            it. None for methods that take none.
        against: the method that quality is a share of, at the same budget; dense if empty.
        holds: the value from which the claim holds.
        part: the value from which it holds in part.
        settings: parameters of the rows that are looked at, as records write them, where the sweep's own are not the
            claim's. They are looked for among the settings that were run beside the sweep.
        lengths, tasks: what the look is restricted to; all if empty.
    """

    measure: str
    holds: float
    part: float
    method: str = ""
    budget: str | None = None
    against: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise BadArgument("measure", self.measure, f"give one of {', '.join(MEASURES)}")
        if self.more_is_better != (self.holds > self.part) and self.holds != self.part:
            word = "below" if self.more_is_better else "above"
            raise BadArgument("part", self.part, f"what holds in part lies {word} what holds ({self.holds:g})")
        if self.against and self.measure != "quality":
            raise BadArgument("against", self.against, "only quality is compared with another method")

    @property
    def more_is_better(self) -> bool:
        """Whether larger values are better."""
        return self.measure == "quality"

    def reaches(self, value: float, threshold: float) -> bool:
        """Whether a value is at least as good as a threshold."""
        return value >= threshold if self.more_is_better else value <= threshold


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The headline claim of a paper.

    Attributes:
        says: the claim in one sentence.
        where: the paper's own setting, in brief.
        checks: how it is looked at here; empty if it is not.
        why: what of it cannot be tested here, and why; needed if there is no check.
    """

    says: str
    where: str
    checks: tuple[Check, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        for name in ("says", "where"):
            if not getattr(self, name).strip():
                raise BadArgument(name, getattr(self, name), "a claim has a sentence and a setting")
        if not self.checks and not self.why:
            raise BadArgument("why", self.why, "say why a claim without a check cannot be tested here")

    @classmethod
    def of(cls, id: str, fields: dict[str, Any]) -> Claim:
        """The claim of a paper from the table `[claim]` of its entry and the tables `[[claim.check]]`.

        Raises:
            BadArgument: a field is missing or not known.
        """
        fields = dict(fields)
        try:
            checks = tuple(Check(**{"method": id, **_tuples(check)}) for check in fields.pop("check", ()))
            return cls(checks=checks, **fields)
        except TypeError as error:
            raise BadArgument("claim", id, f"has fields that a claim has not, or lacks one ({error})") from None


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
