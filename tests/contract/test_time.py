"""No look into the future, and no change of mind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import EXACT, assert_used, decode, forward, prompt, run, tokens
from tests.contract.subjects import Case, applied, each_method, model, precise, profiles
from tests.contract.trace import same_reads, tracing

from foveate.attention import Partial, Selection
from foveate.engine.plan import feasible
from foveate.methods import Method
from foveate.models.shape import ModelShape

LENGTH, CHANGED = 73, 50


@contextmanager
def selecting(case: Case, replaced: Callable[..., Any]) -> Iterator[None]:
    """Put `replaced(original, method, q, view, ctx)` in the place of the method's `select`."""
    original = case.cls.select
    own = "select" in vars(case.cls)
    case.cls.select = lambda method, q, view, ctx: replaced(original, method, q, view, ctx)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            case.cls.select = original  # type: ignore[method-assign]
        else:
            del case.cls.select


def as_list(parts: Any) -> list[Selection | Partial]:
    return [parts] if isinstance(parts, Selection | Partial) else list(parts)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_no_future_value(case: Case, family: str, seed: int) -> None:
    """With what is selected held fixed, a changed token changes nothing before it."""
    if case.cls.causality == "prompt" and "weights" in case.cls.slots:
        return  # what it chooses is no selection that could be held from here; its own test file does
    net = model(family)
    ids = tokens(seed, 1, LENGTH)
    changed = ids.clone()
    changed[0, CHANGED] = (ids[0, CHANGED] + 1 - 3) % 200 + 3
    taken: list[list[Selection | Partial]] = []

    def record(original: Any, method: Method, q: Any, view: Any, ctx: Any) -> Any:
        taken.append(as_list(original(method, q, view, ctx)))
        return taken[-1]

    def replay(original: Any, method: Method, q: Any, view: Any, ctx: Any) -> Any:
        # A part that the method attended itself holds values, so only selections are taken from the first run.
        fresh, before = as_list(original(method, q, view, ctx)), taken.pop(0)
        return [b if isinstance(b, Selection) else f for f, b in zip(fresh, before, strict=True)]

    with applied(net, case) as handle:
        cache = handle.cache()
        with selecting(case, record):
            first = prompt(net, cache, ids)
        assert_used(net, cache, less=case.holds_less)
        with selecting(case, replay):
            second = prompt(net, handle.cache(), changed)
    assert not taken
    assert torch.equal(first[:, :CHANGED], second[:, :CHANGED])
    assert not torch.equal(first[:, CHANGED:], second[:, CHANGED:])


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
@each_method(causality="strict")
def test_no_future_selection_in_the_prompt(case: Case, family: str, chunk: int | None, seed: int) -> None:
    """Which pairs are read before a token does not depend on it."""
    net = model(family)
    ids = tokens(seed, 1, LENGTH)
    changed = ids.clone()
    changed[0, CHANGED] = (ids[0, CHANGED] + 1 - 3) % 200 + 3
    with applied(net, case) as handle:
        with tracing(LENGTH) as before:
            first = prompt(net, handle.cache(), ids, chunk=chunk)
        with tracing(LENGTH) as after:
            second = prompt(net, handle.cache(), changed, chunk=chunk)
    same_reads(before.pairs, after.pairs, slice(0, CHANGED))
    assert torch.equal(first[:, :CHANGED], second[:, :CHANGED])
    assert not torch.equal(first[:, CHANGED:], second[:, CHANGED:])


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
@each_method()
def test_no_future_selection_behind_the_prompt(case: Case, family: str, seed: int) -> None:
    """Several tokens in one step, as assisted decoding sends them: a later one decides nothing for an earlier one."""
    net = model(family)
    ids, then = tokens(seed, 1, LENGTH), tokens(seed + 1, 1, 9)
    changed = then.clone()
    changed[0, 5:] = (then[0, 5:] + 1 - 3) % 200 + 3
    with applied(net, case) as handle:
        one = handle.cache()
        prompt(net, one, ids)
        other = one.fork()
        with tracing(LENGTH + 9) as before:
            first = forward(net, one, then)
        with tracing(LENGTH + 9) as after:
            second = forward(net, other, changed)
        assert_used(net, one, less=case.holds_less)
    same_reads(before.pairs, after.pairs, slice(LENGTH, LENGTH + 5))
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5:], second[:, 5:])


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_a_role_is_for_ever(case: Case, family: str) -> None:
    """Plans follow from method, model, profile and length alone."""
    net = model(family)
    shape, profile = ModelShape.of(net), profiles(case, net)
    with applied(net, case):
        for length in (1, 61, 200):
            one, other = (
                [
                    (role.name, str(role.visible), role.in_prompt, str(dict(role.extra)))
                    for role in feasible(lambda n, made=made: made.plan(shape, profile, n), length, shape)
                ]
                for made in (case.method(), case.method())
            )
            assert one == other
            assert len(one) == len(shape.layers)


@each_method()
def test_select_twice_is_the_same(case: Case, seed: int) -> None:
    """Equal state, equal lists; and to ask leaves no trace."""
    net = model(case.family)
    ids, then = tokens(seed, 2, LENGTH), tokens(seed + 1, 2, 6)

    def twice(original: Any, method: Method, q: Any, view: Any, ctx: Any) -> Any:
        one, other = as_list(original(method, q, view, ctx)), as_list(original(method, q, view, ctx))
        for a, b in zip(one, other, strict=True):
            if isinstance(a, Selection) and isinstance(b, Selection) and a.lists is not None:
                assert b.lists is not None
                assert torch.equal(a.lists, b.lists)
            assert type(a) is type(b)
        return other

    with applied(net, case) as handle:
        with tracing(LENGTH + 6) as once:
            want = run(net, handle.cache(), ids, then)
        with selecting(case, twice), tracing(LENGTH + 6) as again:
            got = run(net, handle.cache(), ids, then)
    assert torch.equal(got.prompt, want.prompt)
    assert torch.equal(got.steps, want.steps)
    same_reads(once.pairs, again.pairs)


@each_method()
def test_one_step_or_several_read_the_same(case: Case, seed: int) -> None:
    """Where several tokens can be taken back, a step with several reads what single steps would have read.

    How a token is held may differ: what is packed after each single step is still exact inside a step of several.
    """
    net = precise(case)
    ids, then = tokens(seed, 1, LENGTH), tokens(seed + 1, 1, 3)
    with applied(net, case) as handle:
        if not handle.binding.croppable:
            return
        one = handle.cache()
        prompt(net, one, ids)
        other = one.fork()
        with tracing(LENGTH + 3) as singly:
            want = decode(net, one, then)
        with tracing(LENGTH + 3) as jointly:
            got = forward(net, other, then)
    same_reads(singly.pairs, jointly.pairs)
    if "format" not in case.cls.slots:
        assert_close(got, want, EXACT)
