"""Claims are well-formed: each working method has one, or says why it cannot be looked at here."""

from __future__ import annotations

import pytest

from foveate.errors import BadArgument
from foveate.methods import METHODS
from foveate.papers import MEASURES, TIMED, Check, Claim, Paper, papers
from foveate.tasks import TASKS

CLAIMED = [entry for entry in papers() if entry.claim is not None]
CHECKS = [(entry, check) for entry in CLAIMED if entry.claim for check in entry.claim.checks]


def test_every_working_method_of_a_paper_has_a_claim() -> None:
    claimed = {entry.id for entry in CLAIMED}
    of_papers = {id for id, method in METHODS.items() if method.slots and method.paper}
    assert of_papers - claimed == set()
    assert claimed <= {entry.id for entry in papers() if entry.status == "works"}


@pytest.mark.parametrize("entry", CLAIMED, ids=lambda entry: entry.id)
def test_a_claim_is_a_sentence_with_a_check_or_a_reason(entry: Paper) -> None:
    claim = entry.claim
    assert claim is not None
    assert claim.says.endswith(".") and claim.says[0].isupper() and "\n" not in claim.says
    assert 8 <= len(claim.says.split()) <= 45
    assert claim.where and not claim.where.endswith(".")
    assert claim.checks or claim.why
    assert not claim.why or claim.why.endswith(".")


@pytest.mark.parametrize(("entry", "check"), CHECKS, ids=lambda value: getattr(value, "id", None))
def test_a_check_looks_at_what_the_sweep_and_the_benches_have(entry: Paper, check: Check) -> None:
    assert check.measure in MEASURES
    for method in filter(None, [check.method, check.against]):
        assert set(method.split("|")) <= METHODS.keys()
    assert check.budget in (None, "0.125", "0.25", "0.5")
    assert set(check.tasks) <= TASKS.keys()
    assert set(check.lengths) <= {1024, 2048, 4096}
    if check.measure not in TIMED and not check.settings:
        assert (check.budget is None) == (not METHODS[check.method].budgeted)
    assert min(check.part, check.holds) > 0


def test_better_than_another_method_means_more_than_it() -> None:
    assert all(check.holds >= 1 for _, check in CHECKS if check.against)


def test_a_claim_that_says_nothing_is_refused() -> None:
    with pytest.raises(BadArgument, match="why"):
        Claim(says="It is faster.", where="somewhere")
    with pytest.raises(BadArgument, match="says"):
        Claim.of("probe", {"says": " ", "where": "somewhere", "why": "Nothing."})
    with pytest.raises(BadArgument, match="measured"):
        Claim.of("probe", {"says": "It is.", "where": "here", "why": "No.", "measured": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"measure": "speed", "holds": 1.0, "part": 0.9}, "measure"),
        ({"measure": "quality", "holds": 0.9, "part": 1.0}, "part"),
        ({"measure": "bytes", "holds": 0.9, "part": 0.5}, "part"),
        ({"measure": "bytes", "holds": 0.5, "part": 0.9, "against": "snapkv"}, "against"),
    ],
)
def test_a_check_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        Check(method="snapkv", **fields)


def test_checks_look_at_the_method_of_their_entry_unless_they_say_so() -> None:
    check = {"measure": "quality", "holds": 0.98, "part": 0.9, "tasks": ["vt"]}
    claim = Claim.of("snapkv", {"says": "It is.", "where": "here", "check": [check, {**check, "method": "h2o|kivi"}]})
    assert [c.method for c in claim.checks] == ["snapkv", "h2o|kivi"]
    assert claim.checks[0].tasks == ("vt",)
    assert claim.checks[0].reaches(0.98, 0.98) and not claim.checks[0].reaches(0.97, 0.98)
