"""Composition: any two methods run together or are refused when they are put together, by slot or with a reason."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.runs import EXACT, Run, assert_used, dense_bytes, held, plain, run, spare_bytes, tokens
from tests.contract.subjects import CASES, Case, assert_refusal, model, precise, profiles
from tests.contract.trace import same_reads, tracing
from torch import nn

import foveate
from foveate.errors import BadArgument, Refused
from foveate.methods import Composition, Method, Profile
from foveate.methods.base import EXCLUSIVE

PAIRS = [
    pytest.param(CASES[a], CASES[b], id=f"{a}-{b}")
    for a, b in combinations([c for c in CASES if CASES[c].cls.slots], 2)
]


def together(net: nn.Module, first: tuple[Case, Method], second: tuple[Case, Method]) -> foveate.Handle | None:
    """A | B applied, or None where that is refused by slot or with a reason that names both methods or the missing."""
    (case, method), (other, partner) = first, second
    shared = method.fills & partner.fills & EXCLUSIVE
    found: list[Profile] = [p for p in (profiles(case, net), profiles(other, net)) if p is not None]
    try:
        handle = foveate.apply(net, method | partner, profile=found or None)
    except (BadArgument, Refused) as error:
        assert_refusal(error)
        if shared:
            assert any(repr(slot) in str(error) for slot in shared), str(error)
        if isinstance(error, BadArgument):  # else it is the model that one of them cannot be had on
            assert case.id in str(error), str(error)
            assert other.id in str(error), str(error)
        return None
    assert not shared, f"{case.id} and {other.id} both fill {sorted(shared)}"
    return handle


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
@pytest.mark.parametrize(("case", "other"), PAIRS)
def test_every_pair(case: Case, other: Case, family: str, seed: int) -> None:
    """Runs with finite logits, holds and reads no more than either alone, in both orders the same; or is refused."""
    net = model(family)
    ids, then = tokens(seed, 1, 101), tokens(seed + 1, 1, 4)
    runs: list[Run] = []
    for first, second in (
        ((case, case.method()), (other, other.method())),
        ((other, other.method()), (case, case.method())),
    ):
        handle = together(net, first, second)
        if handle is None:
            assert not runs, "one order runs, the other is refused"
            continue
        with handle:
            cache = handle.cache()
            cache.meter = {}
            runs.append(run(net, cache, ids, then))
            alone = [cost(net, handle, one, ids, then) for one in (CASES["dense"], case, other)]
            (dense, _), (one_holds, one_reads), (other_holds, other_reads) = alone
            # Who reads less by choice holds all, and summaries besides.
            summaries = max(0, one_holds - dense) + max(0, other_holds - dense)
            assert_used(net, cache, less=min(one_holds, other_holds) + summaries < dense_bytes(net, cache))
            assert cache.nbytes <= min(one_holds, other_holds) + summaries + spare_bytes(net, cache)
            assert cache.meter["decode_read"] <= min(one_reads, other_reads) * 1.02
    if runs:
        got, again = runs
        assert got.prompt.isfinite().all()
        assert got.steps.isfinite().all()
        assert_close(got.prompt, again.prompt, EXACT)
        assert_close(got.steps, again.steps, EXACT)


def cost(
    net: nn.Module, handle: foveate.Handle, case: Case, ids: torch.Tensor, then: torch.Tensor
) -> tuple[float, float]:
    """Bytes held and pairs read in decode by one method alone."""
    cache = handle.bind(case.method(), profile=profiles(case, net)).cache()
    cache.meter = {}
    run(net, cache, ids, then)
    return cache.nbytes, cache.meter["decode_read"]


@pytest.mark.parametrize(("case", "other"), PAIRS)
def test_a_partner_that_leaves_nothing_out_changes_nothing(case: Case, other: Case, seed: int) -> None:
    # One read in two parts rounds otherwise, and the last bit of a float32 decides which code a key gets.
    net = precise(case if {"format", "weights"} & case.cls.slots else other)
    ids, then = tokens(seed, 1, 101), tokens(seed + 1, 1, 4)
    for acting, idle in ((case, other), (other, case)):
        handle = together(net, (acting, acting.method()), (idle, idle.whole()))
        if handle is None:
            continue
        with handle, tracing(105) as joint:
            both = handle.cache()
            got = run(net, both, ids, then)
        with foveate.apply(net, acting.method(), profile=profiles(acting, net)) as handle, tracing(105) as single:
            alone = handle.cache()
            want = run(net, alone, ids, then)
            assert_used(net, alone, less=acting.holds_less)
        assert_close(got.prompt, want.prompt, EXACT)
        assert_close(got.steps, want.steps, EXACT)
        assert held(both, 0) == held(alone, 0)
        same_reads(joint.pairs, single.pairs)


def test_three_slots_at_once(seed: int) -> None:
    """A method for the prompt, one for what is held and one for how: each does its part, and undo is exact."""
    net = model()
    ids, then = tokens(seed, 1, 101), tokens(seed + 1, 1, 4)
    chosen: list[Case] = []
    for slot in ("prefill", "keep", "format"):
        fitting = [case for case in CASES.values() if case.cls.slots == {slot} and case.method().fills == {slot}]
        fitting = [case for case in fitting if not case.cls.every_step]
        assert fitting, f"no method fills {slot} alone"
        chosen.append(fitting[0])
    found = [p for p in (profiles(case, net) for case in chosen) if p is not None]
    composition = Composition(tuple(case.method() for case in chosen))
    with foveate.apply(net, composition, profile=found or None) as handle:
        assert handle.id == "|".join(case.id for case in chosen)
        cache = handle.cache()
        got = run(net, cache, ids, then)
        assert_used(net, cache, less=True)
    want = plain(net, ids, then)
    assert relative_rms(got.prompt, want.prompt) > 1e-3
    assert relative_rms(got.steps, want.steps) > 1e-3


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.id)
def test_a_method_beside_itself_is_refused_by_slot(case: Case) -> None:
    slots = sorted(case.method().fills & EXCLUSIVE)
    if not slots:
        return
    with pytest.raises(BadArgument) as refusal:
        case.method() | case.method()
    assert_refusal(refusal.value)
    assert repr(slots[0]) in str(refusal.value)
    assert case.id in str(refusal.value)


def test_a_free_budget_needs_one_taker() -> None:
    free = [case for case in CASES.values() if case.cls.budgeted and case.cls.slots]
    for a, b in combinations(free, 2):
        methods = [case.cls(**{k: v for k, v in case.small.items() if k != "budget"}) for case in (a, b)]
        try:
            composition = methods[0] | methods[1]
        except BadArgument:
            continue
        with pytest.raises(BadArgument) as refusal:
            composition.with_budget(foveate.Budget.of(0.5))
        assert_refusal(refusal.value)
        given = (methods[0] | methods[1].with_budget(0.5)).with_budget(foveate.Budget.of(0.25))
        assert [str(m.budget) for m in given.methods] == ["0.25", "0.5"]


def test_every_method_comes_with_small_settings() -> None:
    """What the contract cannot guess: settings that act on a tiny model, and a profile where one is needed."""
    from tests.contract.subjects import ALL_CASES, test_module

    for case in ALL_CASES.values():
        if case.cls.slots:
            assert case.small, f"{test_module(case.cls)} states no SMALL"
        assert not case.cls.calibrated or case.profile_for, f"{test_module(case.cls)} states no profile_for"
        assert case.cls.budgeted or case.full or not case.cls.slots, f"{test_module(case.cls)} states no FULL"
