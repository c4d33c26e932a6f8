"""Decoders beyond the five tiny families: attention sinks, softcaps, partial rotation, fused projections, hybrids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.runs import EXACT, Run, assert_used, held, left_padded, plain, prompt, run, tokens
from tests.contract.subjects import CASES
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import foveate

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TOO_MUCH = 1e-2
"""A model whose own rounding moves its logits by this much tells nothing apart."""


def gemma2() -> nn.Module:
    """Softcapped logits, every other layer sliding. Its softcap works with eager attention only."""
    config = Gemma2Config(**COMMON, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def gpt_oss() -> nn.Module:
    """A learned logit per head that takes mass without a value; sliding layers; experts."""
    config = GptOssConfig(
        **COMMON,
        head_dim=16,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"
    return GptOssForCausalLM(config)


def phi() -> nn.Module:
    """Only half of each head's channels are rotated."""
    return PhiForCausalLM(PhiConfig(**COMMON, partial_rotary_factor=0.5))


def phi3() -> nn.Module:
    """One projection for queries, keys and values."""
    return Phi3ForCausalLM(Phi3Config(**COMMON, sliding_window=None))


def qwen3_next() -> nn.Module:
    """Two layers of linear attention and one of softmax attention."""
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    config = Qwen3NextConfig(
        **COMMON,
        head_dim=16,
        layer_types=kinds,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return Qwen3NextForCausalLM(config)


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model with weights that make attention matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**31)
        net = make().eval()
    noise = torch.Generator().manual_seed(seed % 2**31)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            fresh = torch.randn(parameter.shape, generator=noise)
            if name.endswith("sinks"):
                parameter.copy_(fresh)
            elif parameter.ndim > 1 and "embed" not in name:
                parameter.copy_(fresh * 1.5 / parameter.shape[-1] ** 0.5)
    return net


every = pytest.mark.parametrize("make", [gemma2, gpt_oss, phi, phi3, qwen3_next])


@every
def test_dense_equals_transformers(make: Callable[[], nn.Module], seed: int) -> None:
    net = made(make, seed)
    ids, then = tokens(seed, 2, 41), tokens(seed + 1, 2, 8)
    want = plain(net, ids, then)
    with foveate.apply(net, "dense") as handle:
        cache = handle.cache()
        got = run(net, cache, ids, then)
        assert_used(net, cache, less=False)
    limit = max(EXACT, 2 * own_noise(net, ids, then, want))
    assert limit < TOO_MUCH
    assert_close(got.prompt, want.prompt, limit)
    assert_close(got.steps, want.steps, limit)


@torch.no_grad()
def own_noise(net: nn.Module, ids: torch.Tensor, then: torch.Tensor, want: Run) -> float:
    """What lies between one forward over all and single steps on transformers' own cache: linear attention computes a
    prompt and a step in different ways."""
    out = net(ids, use_cache=True)
    steps = []
    for i in range(then.shape[1]):
        out = net(then[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    return relative_rms(torch.cat(steps, dim=1), want.steps)


@torch.no_grad()
def shaken(net: nn.Module, ids: torch.Tensor, then: torch.Tensor) -> float:
    """How far transformers' own answer moves if its input changes by a few roundings: linear attention enlarges that a
    hundred times with some weights, and a batch is rounded otherwise than its rows."""
    weight = net.get_input_embeddings().weight  # type: ignore[operator]
    kept, want = weight.clone(), plain(net, ids, then).steps
    weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    moved = relative_rms(plain(net, ids, then).steps, want)
    weight.copy_(kept)
    return moved


@every
def test_compressed_generate_in_a_padded_batch(make: Callable[[], nn.Module], seed: int) -> None:
    """A batch under snapkv equals its rows alone, and its cache really is smaller."""
    net = made(make, seed)
    if any(hasattr(module, "conv1d") for module in net.modules()):
        rows = [tokens(seed, 61), tokens(seed + 1, 61)]  # transformers' own linear layers do not ignore padding exactly
    else:
        rows = [tokens(seed, 30), tokens(seed + 1, 61)]
    ids, mask = left_padded(rows)
    then = tokens(seed + 2, 2, 5)
    dense = plain(net, rows[1][None], then[1:])
    limit = max(EXACT, 2 * own_noise(net, rows[1][None], then[1:], dense))
    limit = max(limit, *(shaken(net, row[None], then[b : b + 1]) for b, row in enumerate(rows)))
    assert limit < TOO_MUCH
    with foveate.apply(net, CASES["snapkv"].method()) as handle:
        cache = handle.cache()
        got = run(net, cache, ids, then, mask)
        full = [layer for layer in handle.binding.shape.layers if layer.kind == "full"]
        assert all(len(head) <= 24 + 5 for layer in full for head in held_of(cache, layer.index))
        for b, row in enumerate(rows):
            alone = handle.cache()
            handle.binding.plan_cache(alone, 61)
            want = run(net, alone, row[None], then[b : b + 1])
            assert_close(got.steps[b : b + 1], want.steps, limit)
            assert held(cache, b) == held(alone, 0)
        again = prompt(net, handle.cache(), ids, mask)
        assert_close(again[:, -1], got.prompt[:, -1], limit)
    assert relative_rms(got.steps[1:], dense.steps) > 10 * limit


def held_of(cache: Any, index: int) -> list[list[int]]:
    """Positions held in one layer of the second row."""
    order = [layer.index for layer in cache.couriers()]
    return held(cache, 1)[order.index(index)]
