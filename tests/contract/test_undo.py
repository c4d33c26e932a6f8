"""Undo: after the methods left, nothing in the model tells that they were there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.contract.runs import assert_used, decode, plain, prompt, run, tokens
from tests.contract.subjects import CASES, Case, applied, assert_refusal, each_method, model
from torch import nn

import foveate
from foveate.cache import FoveateCache
from foveate.errors import Refused
from foveate.models.tiny import tiny

FAMILIES = ["llama", "gemma3", "deepseek-v3"]


def anatomy(net: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by identity, hooks and parameters by key, and the configuration's content."""
    parts: dict[str, Any] = {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            parts[f"{name}.{key}"] = id(value)
            if isinstance(value, dict):
                parts |= {f"{name}.{key}[{inner}]": id(held) for inner, held in value.items()}
    parts |= {f"state {name}": (tensor.data_ptr(), tensor.shape) for name, tensor in net.state_dict().items()}
    parts["config"] = net.config.to_json_string()  # type: ignore[union-attr]
    parts["attention"] = net.config._attn_implementation  # type: ignore[union-attr]
    parts["class"] = {key: id(value) for key, value in vars(type(net)).items()}
    return parts


@pytest.mark.parametrize("family", FAMILIES)
@each_method()
def test_nothing_is_left(case: Case, family: str, seed: int) -> None:
    """Identical objects, bit-exact logits, the same tokens generated."""
    net = model(family)
    ids, then = tokens(seed, 2, 61), tokens(seed + 1, 2, 6)
    before, want = anatomy(net), plain(net, ids, then)
    generated = net.generate(ids, max_new_tokens=6, do_sample=False)
    with applied(net, case) as handle:
        cache = handle.cache()
        run(net, cache, ids, then)
        assert_used(net, cache, less=case.holds_less)
        net.generate(ids, max_new_tokens=3, do_sample=False)
        assert anatomy(net) != before
    assert anatomy(net) == before
    got = plain(net, ids, then)
    assert torch.equal(got.prompt, want.prompt)
    assert torch.equal(got.steps, want.steps)
    assert torch.equal(net.generate(ids, max_new_tokens=6, do_sample=False), generated)


def test_an_error_inside_leaves_nothing(seed: int) -> None:
    net = model()
    before = anatomy(net)
    with pytest.raises(ZeroDivisionError), applied(net, CASES["snapkv"]):
        raise ZeroDivisionError
    assert anatomy(net) == before


def test_a_refused_method_leaves_nothing() -> None:
    net = model()
    before = anatomy(net)
    for bad in ("no such method", "snapkv|h2o"):
        with pytest.raises(foveate.BadArgument):
            foveate.apply(net, bad)
    with pytest.raises(foveate.Infeasible):
        foveate.apply(net, "quest", budget=0.0001)
    assert anatomy(net) == before


def test_remove_twice_is_once() -> None:
    net = model()
    before = anatomy(net)
    handle = foveate.apply(net, CASES["snapkv"].method())
    handle.remove()
    handle.remove()
    assert anatomy(net) == before


def logits(net: nn.Module, handle: foveate.Handle, seed: int) -> torch.Tensor:
    return run(net, handle.cache(), tokens(seed, 1, 61), tokens(seed + 1, 1, 4)).steps


@pytest.mark.parametrize("order", ["last in, first out", "first in, first out"])
def test_nested(order: str, seed: int) -> None:
    """The newest method works until it is removed; whatever the order, each step and the end are clean."""
    net = model()
    before = anatomy(net)
    inner_method, outer_method = CASES["streaming-llm"].method(), CASES["snapkv"].method()
    with foveate.apply(net, inner_method) as handle:
        inner = logits(net, handle, seed)
    with foveate.apply(net, outer_method) as handle:
        outer = logits(net, handle, seed)
    assert not torch.equal(inner, outer)

    first = foveate.apply(net, inner_method)
    second = foveate.apply(net, outer_method)
    assert torch.equal(logits(net, second, seed), outer)
    if order == "last in, first out":
        second.remove()
        assert torch.equal(logits(net, first, seed), inner)
        first.remove()
    else:
        first.remove()
        assert torch.equal(logits(net, second, seed), outer)
        second.remove()
    assert anatomy(net) == before


def test_the_paused_method_is_refused_by_name_of_its_cache(seed: int) -> None:
    """A cache of the outer method cannot be used while the inner one is at work."""
    net = model()
    with foveate.apply(net, CASES["snapkv"].method()) as first:
        cache = first.cache()
        prompt(net, cache, tokens(seed, 1, 61))
        with foveate.apply(net, CASES["quest"].method()), pytest.raises(Refused) as refusal:
            decode(net, cache, tokens(seed + 1, 1, 1))
        assert_refusal(refusal.value)
        decode(net, cache, tokens(seed + 1, 1, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new", [1, 3], ids=["one token", "three tokens"])
def test_a_cache_outlives_its_method_only_with_a_refusal(family: str, new: int, seed: int) -> None:
    """Stock attention would see the new tokens alone, and say nothing where there is but one."""
    net = model(family)
    with foveate.apply(net, CASES["snapkv"].method()) as handle:
        cache = handle.cache()
        prompt(net, cache, tokens(seed, 1, 61))
        assert_used(net, cache, less=True)
    with pytest.raises(Refused) as refusal:
        decode(net, cache, tokens(seed + 1, 1, new))
    assert_refusal(refusal.value)


def test_two_models_on_one_configuration(seed: int) -> None:
    """Configurations are shared by construction; only one of the two models changes."""
    first = tiny("llama", heads=4, kv_heads=2, seed=1)
    second = type(first)(first.config).eval()
    assert second.config is first.config
    config, before = first.config, anatomy(second)
    ids, then = tokens(seed, 1, 61), tokens(seed + 1, 1, 4)
    want = plain(second, ids, then)
    with foveate.apply(first, CASES["snapkv"].method()) as handle:
        assert second.config is config
        assert first.config is not config
        assert anatomy(second) == before
        got = plain(second, ids, then)
        assert torch.equal(got.steps, want.steps)
        cache = handle.cache()
        run(first, cache, ids, then)
        assert_used(first, cache, less=True)
        with foveate.apply(second, CASES["quest"].method()) as other:
            run(second, other.cache(), ids, then)
    assert first.config is config
    assert anatomy(second) == before


@each_method()
def test_deepcopy_of_an_applied_model(case: Case, seed: int) -> None:
    """The copy works like its model, with a cache of its own, and neither undo touches the other."""
    net = model(case.family)
    ids = tokens(seed, 1, 61)
    with applied(net, case) as handle:
        want = run(net, handle.cache(), ids, tokens(seed + 1, 1, 4))
        generated = net.generate(ids, max_new_tokens=6, do_sample=False)
        twin = copy.deepcopy(net)
        out = twin.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(out.sequences, generated)
        assert_used(twin, out.past_key_values, less=case.holds_less)
        again = run(net, handle.cache(), ids, tokens(seed + 1, 1, 4))
        assert torch.equal(again.steps, want.steps)
    out = twin.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, generated), "undo of the original took the method off its copy"
    assert isinstance(out.past_key_values, FoveateCache)
