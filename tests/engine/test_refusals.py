"""What cannot be had is refused in one line, before anything is computed wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.runs import decode, forward, prompt, run, tokens
from tests.contract.subjects import CASES, applied, assert_refusal, model
from tests.contract.test_undo import anatomy
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import foveate
from foveate.errors import BadArgument, FoveateError, Refused
from foveate.models.tiny import tiny


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized", "offloaded_static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_other_cache_implementations(kind: str, family: str, seed: int) -> None:
    """transformers 5.23 would generate other tokens with a static cache, and say nothing."""
    net = model(family)
    with applied(net, CASES["snapkv"]), pytest.raises(FoveateError) as refusal:
        net.generate(tokens(seed, 1, 21), max_new_tokens=3, cache_implementation=kind)
    assert_refusal(refusal.value)
    assert "cache_implementation" in str(refusal.value)
    assert kind in str(refusal.value)


@pytest.mark.parametrize("name", ["dense", "snapkv"])
def test_a_stock_cache(name: str, seed: int) -> None:
    """A user's DynamicCache would be filled densely, with no savings and no word."""
    net = model()
    with applied(net, CASES[name]):
        for stock in (DynamicCache(config=net.config), StaticCache(config=net.config, max_cache_len=64)):
            for use in (
                lambda stock=stock: net.generate(tokens(seed, 1, 21), max_new_tokens=3, past_key_values=stock),
                lambda stock=stock: net(tokens(seed, 1, 21), past_key_values=stock),
            ):
                with pytest.raises(Refused) as refusal:
                    use()
                assert_refusal(refusal.value)
                assert type(stock).__name__ in str(refusal.value)


def encoder_decoder() -> nn.Module:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def encoder() -> nn.Module:
    return BertLMHeadModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


def sharing() -> nn.Module:
    """A decoder whose last layers read an earlier layer's keys (as Gemma-3n and Gemma-4)."""
    net = tiny("llama", heads=4, kv_heads=2)
    net.config.num_kv_shared_layers = 1
    return net


def gemma4() -> nn.Module:
    config = Gemma4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return Gemma4ForCausalLM(config)


@pytest.mark.parametrize("make", [encoder_decoder, encoder, sharing, gemma4, lambda: nn.Linear(2, 2)])
def test_models(make: Any) -> None:
    net = make()
    with pytest.raises(Refused) as refusal:
        foveate.apply(net, "snapkv", budget=0.5)
    assert_refusal(refusal.value)
    assert type(net).__name__ in str(refusal.value)
    assert "_foveate_stack" not in vars(net)


@pytest.mark.parametrize(
    ("method", "arguments", "names"),
    [
        ("snapkw", {}, ["method", "snapkw", "snapkv"]),
        ("", {}, ["method"]),
        (3, {}, ["method", "3"]),
        ("snapkv", {"window": 0}, ["window", "0"]),
        ("snapkv", {"windows": 3}, ["windows", "window"]),
        ("snapkv|quest", {"window": 3}, ["settings", "window"]),
        ("snapkv", {"budget": 1.5}, ["budget", "1.5"]),
        ("snapkv", {"budget": 0}, ["budget", "0"]),
        ("snapkv", {"budget": -0.1}, ["budget", "-0.1"]),
        ("snapkv", {"budget": float("nan")}, ["budget", "nan"]),
        ("snapkv", {"budget": "lots"}, ["budget", "lots"]),
        ("snapkv", {"budget": True}, ["budget", "True"]),
        ("snapkv|quest", {"budget": 0.5}, ["budget", "0.5"]),
        ("flexprefill", {"budget": 0.5}, ["budget", "0.5"]),
        ("snapkv|h2o", {}, ["keep", "snapkv", "h2o"]),
        ("snapkv", {"profile": "/no/such/file.json"}, ["profile", "/no/such/file.json"]),
        ("duo-attention", {}, ["profile", "duo-attention"]),
    ],
)
def test_arguments(method: Any, arguments: dict[str, Any], names: list[str]) -> None:
    net = model()
    before = anatomy(net)
    with pytest.raises(BadArgument) as refusal:
        foveate.apply(net, method, **arguments)
    assert_refusal(refusal.value)
    for name in names:
        assert name in str(refusal.value), str(refusal.value)
    assert anatomy(net) == before


def test_a_batch_of_another_size(seed: int) -> None:
    net = model()
    with applied(net, CASES["snapkv"]) as handle:
        cache = handle.cache()
        prompt(net, cache, tokens(seed, 2, 21))
        with pytest.raises(Refused) as refusal:
            forward(net, cache, tokens(seed, 3, 1))
        assert_refusal(refusal.value)


def test_an_unfinished_forward_is_noticed(seed: int) -> None:
    """A forward that died half-way leaves a cache whose layers differ in length: it must not go on silently."""
    net = model()
    ids = tokens(seed, 1, 21)
    with applied(net, CASES["dense"]) as handle:
        cache = handle.cache()

        def fail(*args: Any) -> None:
            raise KeyboardInterrupt

        hook = net.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
        try:
            with pytest.raises(KeyboardInterrupt):
                prompt(net, cache, ids)
        finally:
            hook.remove()
        with pytest.raises(Refused) as refusal:
            decode(net, cache, tokens(seed, 1, 1))
        assert_refusal(refusal.value)
        assert run(net, handle.cache(), ids, tokens(seed, 1, 2)).steps.isfinite().all()


def test_bad_crops_and_announcements(seed: int) -> None:
    net = model()
    with applied(net, CASES["dense"]) as handle:
        cache = handle.cache()
        prompt(net, cache, tokens(seed, 1, 21))
        for use in (lambda: cache.crop(3), lambda: cache.crop(-50), lambda: cache.expect(-1)):
            with pytest.raises(FoveateError) as refusal:
                use()
            assert_refusal(refusal.value)
        assert cache.get_seq_length() == 21
        cache.crop(torch.tensor(-2))  # type: ignore[arg-type]  # as transformers 5.15 and 5.17 call it
        assert cache.get_seq_length() == 19


def test_padding_cannot_be_cropped_into(seed: int) -> None:
    net = model()
    ids = tokens(seed, 2, 21)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with applied(net, CASES["dense"]) as handle:
        cache = handle.cache()
        prompt(net, cache, ids, mask)
        with pytest.raises(Refused) as refusal:
            cache.crop(-3)
        assert_refusal(refusal.value)


def test_a_cache_of_another_model(seed: int) -> None:
    one, other = model("llama"), model("llama", seed=3)
    with applied(one, CASES["snapkv"]) as first, applied(other, CASES["snapkv"]):
        cache = first.cache()
        prompt(one, cache, tokens(seed, 1, 61))
        with pytest.raises(Refused) as refusal:
            decode(other, cache, tokens(seed, 1, 1))
        assert_refusal(refusal.value)
