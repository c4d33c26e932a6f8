"""Fused operations stand in only where they are equal, and only for a while."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import EXACT, left_padded, prompt, tokens
from tests.families import family_model
from torch import nn

import foveate
from foveate import compat
from foveate.engine import captured
from foveate.engine import fused as module
from foveate.engine.captured import Forward
from foveate.models import tiny


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *rest: Any) -> torch.Tensor:
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(a) * b


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat([-b, a], dim=-1) * sin.unsqueeze(1)

    return turn(q), turn(k)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plain functions in the place of Liger's kernels, which need a GPU; the names of those that were called."""
    called: list[str] = []
    known: dict[str, Callable[..., Any]] = {"rms_norm": norm, "swiglu": gate, "rope": rope}

    def find(name: str, function: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            called.append(name)
            return known[name](*args)

        return call

    monkeypatch.setattr(module, "_liger", find)
    monkeypatch.setattr(module, "available", lambda device: True)
    for memory in (module._known, module._rotations):
        memory.clear()
    return called


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_what_is_equal_is_fused(family: str, kernels: list[str], seed: int) -> None:
    model = tiny(family)
    ids = tokens(seed, 3, 2)
    want = logits(model, ids)
    source = sys.modules[type(next(compat.attention_modules(model))).__module__]
    before = source.apply_rotary_pos_emb
    with module.fused(model):
        kernels.clear()
        got = logits(model, ids)
        assert set(kernels) == {"rms_norm", "swiglu", "rope"}
        assert kernels.count("rms_norm") >= 2 * 3 + 1
    assert_close(got, want, EXACT)
    assert source.apply_rotary_pos_emb is before
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_prompts_are_fused(family: str, kernels: list[str], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In padded batches, where positions differ from row to row; with a method, by the forward that it puts on."""
    model = tiny(family)
    ids, mask = left_padded([tokens(seed, 14), tokens(seed + 1, 23)])
    with foveate.apply(model, "snapkv", budget=0.5) as handle:
        want = prompt(model, handle.cache(), ids, mask)
        model.__dict__["forward"] = Forward(handle, model.forward)
        kernels.clear()
        assert_close(prompt(model, handle.cache(), ids, mask), want, EXACT)
        assert not kernels  # it is short
        monkeypatch.setattr(captured, "LEAST_FUSED", ids.numel())
        got = prompt(model, handle.cache(), ids, mask)
        assert kernels.count("rms_norm") >= 2 * 3 + 1 and set(kernels) == {"rms_norm", "swiglu", "rope"}
        kernels.clear()
        model(ids, attention_mask=mask).logits.sum().backward()
        assert not kernels
        del model.__dict__["forward"]
    assert_close(got, want, EXACT)


@pytest.mark.parametrize("tokens_each", [1, 9])
def test_where_some_channels_are_not_turned_the_model_turns(tokens_each: int, kernels: list[str], seed: int) -> None:
    model = family_model(
        "phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    )
    assert model.model.rotary_emb.inv_freq.shape == (4,)
    ids = tokens(seed, 2, tokens_each)
    want = logits(model, ids)
    with module.fused(model):
        kernels.clear()
        assert_close(logits(model, ids), want, EXACT)
        assert "rms_norm" in kernels and "rope" not in kernels


def test_threads_do_not_meet(kernels: list[str], seed: int) -> None:
    """One is still within when another that came later has gone; a third never was."""
    model, ids = tiny("llama"), tokens(seed, 1, 5)
    source = sys.modules[type(next(compat.attention_modules(model))).__module__]
    before = source.apply_rotary_pos_emb
    entered, go = threading.Event(), threading.Event()
    seen: list[int] = []

    def stay() -> None:
        with module.fused(model):
            entered.set()
            assert go.wait(60)
            kernels.clear()
            logits(model, ids)
            seen.append(len(kernels))

    thread = threading.Thread(target=stay)
    thread.start()
    assert entered.wait(60)
    kernels.clear()
    logits(model, ids)
    assert not kernels
    with module.fused(model):
        logits(model, ids)
        once = len(kernels)
    assert once > 0
    kernels.clear()
    logits(model, ids)
    assert not kernels
    go.set()
    thread.join()
    assert seen == [once]
    assert source.apply_rotary_pos_emb is before
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_an_error_leaves_nothing_behind(kernels: list[str]) -> None:
    model = tiny("llama")
    with pytest.raises(KeyError), module.fused(model):
        raise KeyError
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not module._changed


def test_watched_keys_are_not_turned_in_place(kernels: list[str], seed: int) -> None:
    model, kept = tiny("llama"), []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, args, out: kept.append(out))
    with module.fused(model):
        logits(model, tokens(seed, 1, 6))
        assert "rms_norm" in kernels and "rope" not in kernels
    hook.remove()


def test_what_differs_is_left_alone(kernels: list[str], seed: int) -> None:
    """Gemma's norm adds one to its weight, and its MLP has another activation."""
    model = tiny("gemma3")
    ids = tokens(seed, 1, 9)
    want = logits(model, ids)
    with module.fused(model):
        kernels.clear()
        assert_close(logits(model, ids), want, EXACT)
        assert set(kernels) == {"rope"}


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooked_modules_are_left_alone(kind: str, kernels: list[str]) -> None:
    model = tiny("llama")
    hook = getattr(model.model.norm, kind)(lambda *args: None)
    with module.fused(model):
        assert "forward" not in model.model.norm.__dict__
        assert "forward" in model.model.layers[0].input_layernorm.__dict__
    hook.remove()


def test_without_the_kernels_nothing_changes() -> None:
    model = tiny("llama")
    with module.fused(model):
        assert not any("forward" in m.__dict__ for m in model.modules())
