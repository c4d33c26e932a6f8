"""Training with a method applied: the dense method's loss and gradients are the model's own."""

from __future__ import annotations

import copy

import pytest
from tests.closeness import assert_close, relative_rms
from tests.contract.runs import EXACT, assert_used, tokens
from tests.contract.subjects import CASES, applied, model
from torch import Tensor, nn

from foveate.cache import FoveateCache


def gradients(net: nn.Module, ids: Tensor, **kwargs: bool) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    loss = net(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def compare(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert got[1].keys() == want[1].keys()
    assert_close(got[0], want[0], EXACT)
    for name, grad in want[1].items():
        error = relative_rms(got[1][name], grad)
        assert error < EXACT, f"{name}: {error:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_forward_and_backward(family: str, checkpointing: bool, seed: int) -> None:
    net = copy.deepcopy(model(family)).train()
    ids = tokens(seed, 2, 41)
    if checkpointing:
        net.gradient_checkpointing_enable()
    want = gradients(net, ids, use_cache=False)
    assert any(grad.abs().sum() > 0 for name, grad in want[1].items() if "self_attn" in name)
    with applied(net, CASES["dense"]):
        compare(gradients(net, ids, use_cache=False), want)
        compare(gradients(net, ids), want)
    compare(gradients(net, ids, use_cache=False), want)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_gradients_through_a_cached_prompt(family: str, seed: int) -> None:
    """In eval mode a forward fills a cache: gradients still reach k and v, and the cache keeps no graph alive."""
    net = copy.deepcopy(model(family))
    ids = tokens(seed, 2, 41)
    want = gradients(net, ids, use_cache=False)
    with applied(net, CASES["dense"]) as handle:
        compare(gradients(net, ids, use_cache=True), want)
        cache = handle.cache()
        out = net(ids, past_key_values=cache, labels=ids)
        out.loss.backward()
        assert_used(net, cache, less=False)
        assert isinstance(out.past_key_values, FoveateCache)
        for layer in cache.couriers():
            for band in layer.store.bands:
                assert not band.keys().requires_grad
                assert not band.values().requires_grad


def test_a_sparse_prompt_trains(seed: int) -> None:
    """Gradients of a method's own reads are finite and not the dense ones."""
    net = copy.deepcopy(model()).train()
    ids = tokens(seed, 2, 101)
    dense = gradients(net, ids, use_cache=False)
    for name in ("streaming-llm", "flexprefill"):
        with applied(net, CASES[name]):
            loss, grads = gradients(net, ids, use_cache=False)
        assert loss.isfinite()
        assert grads.keys() == dense[1].keys()
        for part, grad in grads.items():
            assert grad.isfinite().all(), part
            if part.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                size = dense[1][part].norm()
                assert grad.norm() > 0.1 * size and (grad - dense[1][part]).norm() > 0.1 * size, part
