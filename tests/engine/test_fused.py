"""Fused operations stand in only where they are equal, and only for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import EXACT, tokens
from torch import nn

from foveate import compat
from foveate.engine import fused as module
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
    ids = tokens(seed, 3, 1)
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
