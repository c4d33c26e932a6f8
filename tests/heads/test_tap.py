"""Taps: the model's own attention to the last bit of what it does, restored without a trace, gradients through it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.closeness import assert_close
from torch import Tensor

import foveate
from foveate.attention import Span
from foveate.errors import BadArgument, Refused
from foveate.heads.tap import Tap, Tapped, frozen, recomputed
from foveate.models import FAMILIES, tiny

TOLERANCE = 1e-5


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(seed))


def by_definition(layer: Tapped, span: Span) -> Tensor:
    """Attention under a mask, written out."""
    n = layer.q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = j <= i
    if layer.shape.window is not None:
        seen = seen & (i - j < layer.shape.window)
    if span.window is not None:
        seen = seen & ((j < span.sink) | (i - j < span.window))
    group = layer.q.shape[1] // layer.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (layer.k, layer.v))
    logits = (layer.q @ k.transpose(-1, -2)) * layer.scale
    logits = logits.masked_fill(~seen, -torch.inf)
    if layer.sinks is not None:
        logits = torch.cat([logits, layer.sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    weights = logits.softmax(-1)
    return weights[..., :n] @ v


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_layers_own_attention_is_the_model(family: str, seed: int) -> None:
    model, ids = tiny(family, heads=6, kv_heads=2), tokens(seed, 2, 41)
    want = model(ids, use_cache=False).logits
    seen = []

    def serve(layer: Tapped) -> Tensor:
        seen.append(layer.shape.index)
        return layer.attend()

    with Tap(model, serve):
        got = model(ids).logits
    assert_close(got, want, TOLERANCE)
    assert seen == [0, 1, 2]
    assert torch.equal(model(ids, use_cache=False).logits, want)


def gpt_oss() -> torch.nn.Module:
    """Learned sinks in the softmax, and a sliding layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_learned_sinks_take_their_mass(seed: int) -> None:
    model, ids = gpt_oss(), tokens(seed, 1, 41)
    want = model(ids, use_cache=False).logits
    with Tap(model, lambda layer: layer.attend()):
        assert_close(model(ids).logits, want, TOLERANCE)
    with Tap(model, lambda layer: by_definition(layer, Span())):
        assert_close(model(ids).logits, want, TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_span_is_a_mask(family: str, seed: int) -> None:
    model, ids, span = tiny(family, heads=6, kv_heads=2), tokens(seed, 2, 61), Span(sink=3, window=9)
    with Tap(model, lambda layer: by_definition(layer, span)):
        want = model(ids).logits
    with Tap(model, lambda layer: layer.attend(span)):
        got = model(ids).logits
    assert_close(got, want, TOLERANCE)
    assert (got - model(ids, use_cache=False).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_are_those_of_the_definition(family: str, seed: int) -> None:
    model, ids, span = tiny(family, layers=2, heads=6, kv_heads=2), tokens(seed, 1, 33), Span(sink=2, window=7)
    grads = []
    for serve in (lambda layer: by_definition(layer, span), lambda layer: layer.attend(span)):
        with Tap(model, serve):
            grads.append(torch.autograd.grad(model(ids).logits.square().mean(), tuple(model.parameters())))
    for want, got in zip(*grads, strict=True):
        assert_close(got, want, 1e-4)


def test_leaves_no_trace(seed: int) -> None:
    model, ids = tiny("llama"), tokens(seed, 1, 9)
    before = {m: (dict(m.__dict__), dict(m._forward_pre_hooks)) for m in model.modules()}

    def broken(layer: Tapped) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), Tap(model, broken):
        model(ids)
    with Tap(model, lambda layer: layer.attend()), Tap(model, lambda layer: layer.attend(Span(1, 2))):
        model(ids)
    for module, (attributes, hooks) in before.items():
        assert module.__dict__.keys() == attributes.keys()
        assert module.__dict__.get("config") is attributes.get("config")
        assert dict(module._forward_pre_hooks) == hooks


@torch.no_grad()
def test_the_inner_tap_and_the_tap_of_an_applied_model_win(seed: int) -> None:
    model, ids = tiny("llama"), tokens(seed, 1, 41)
    plain = model(ids, use_cache=False).logits
    with Tap(model, lambda layer: layer.attend(Span(1, 2))):
        narrow = model(ids).logits
        with Tap(model, lambda layer: layer.attend()):
            assert_close(model(ids).logits, plain, TOLERANCE)
        assert torch.equal(model(ids).logits, narrow)
    with foveate.apply(model, "streaming-llm", budget=0.25):
        streaming = model(ids).logits
        with Tap(model, lambda layer: layer.attend()):
            assert_close(model(ids, use_cache=False).logits, plain, TOLERANCE)
        assert torch.equal(model(ids).logits, streaming)
    assert (streaming - plain).abs().max() > 1e-2


def test_caches_and_padding_are_refused(seed: int) -> None:
    from transformers import DynamicCache

    model, ids = tiny("llama"), tokens(seed, 2, 9)
    mask = torch.ones_like(ids)
    with Tap(model, lambda layer: layer.attend()):
        model(ids, attention_mask=mask)
        mask[0, 0] = 0
        with pytest.raises(BadArgument, match=r"attention_mask=.*without padding"):
            model(ids, attention_mask=mask)
        with pytest.raises(Refused, match="takes no cache"):
            model(ids, past_key_values=DynamicCache())


def test_frozen_asks_no_parameter_and_puts_all_back() -> None:
    model = tiny("llama").train()
    still = model.lm_head.weight.requires_grad_(False)
    model.model.norm.eval()
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    assert all(p.requires_grad == (p is not still) for p in model.parameters())
    assert all(m.training == (m is not model.model.norm) for m in model.modules())


def test_recomputed_layers_give_the_same_gradients(seed: int) -> None:
    model, ids = tiny("llama", heads=6, kv_heads=2), tokens(seed, 1, 33)
    want = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), tuple(model.parameters()))
    calls = []

    def serve(layer: Tapped) -> Tensor:
        calls.append(layer.shape.index)
        return layer.attend()

    with Tap(model, serve), recomputed(model):
        got = torch.autograd.grad(model(ids).logits.square().mean(), tuple(model.parameters()))
    assert calls == [0, 1, 2, 2, 1, 0]
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, 1e-4)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_needs_nothing_but_itself() -> None:
    """A tap works in a process in which no method was ever applied."""
    code = (
        "import sys, torch; from foveate.heads.tap import Tap; from foveate.models import tiny\n"
        "model, seen = tiny('llama', layers=1), []\n"
        "with torch.no_grad(), Tap(model, lambda layer: seen.append(1) or layer.attend()):\n"
        "    model(torch.ones(1, 5).long())\n"
        "assert seen == [1] and 'foveate.engine' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
