"""Adapters: LoRA before or after, on the wrapper or under it; prompt-learning adapters are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tests.closeness import assert_close, relative_rms
from tests.contract.runs import EXACT, assert_used, run, tokens
from tests.contract.subjects import CASES, assert_refusal, model
from torch import nn

import foveate
from foveate.cache import FoveateCache
from foveate.errors import Refused


def wrapped(net: nn.Module, family: str, seed: int) -> nn.Module:
    """The model with a LoRA adapter that changes its output."""
    latent = ["q_a_proj", "kv_b_proj"] if family == "deepseek-v3" else ["q_proj", "v_proj"]
    adapted = get_peft_model(net, LoraConfig(r=4, target_modules=latent, task_type="CAUSAL_LM")).eval()
    noise = torch.Generator().manual_seed(seed % 2**31)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=noise))
    return adapted


@pytest.mark.parametrize("order", ["on the wrapper", "under the wrapper", "wrapped later"])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_lora(family: str, order: str, seed: int) -> None:
    """Dense equals the adapted model without us, and snapkv really compresses, in generate too."""
    plain = copy.deepcopy(model(family))
    ids, then = tokens(seed, 1, 73), tokens(seed + 1, 1, 5)
    adapted = wrapped(copy.deepcopy(plain), family, seed)
    with torch.no_grad():
        want = adapted(torch.cat([ids, then], dim=1), use_cache=False).logits
        assert relative_rms(want, plain(torch.cat([ids, then], dim=1), use_cache=False).logits) > 1e-2
    for name in ("dense", "snapkv"):
        if order == "wrapped later":
            inner = copy.deepcopy(plain)
            handle = foveate.apply(inner, CASES[name].method())
            outer = wrapped(inner, family, seed)
        else:
            outer = adapted
            handle = foveate.apply(outer if order == "on the wrapper" else outer.get_base_model(), CASES[name].method())
        with handle:
            cache = handle.cache()
            got = run(handle.model, cache, ids, then)
            assert_used(handle.model, cache, less=name == "snapkv")
            if name == "dense":
                assert_close(torch.cat([got.prompt, got.steps], dim=1), want, EXACT)
            out = outer.generate(input_ids=ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
            assert_used(handle.model, out.past_key_values, less=name == "snapkv")
        out = outer.generate(input_ids=ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        assert not isinstance(out.past_key_values, FoveateCache)


def test_merging_keeps_the_method(seed: int) -> None:
    net = wrapped(copy.deepcopy(model()), "llama", seed)
    ids = tokens(seed, 1, 73)
    with foveate.apply(net, CASES["snapkv"].method()) as handle:
        before = net.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        merged = net.merge_and_unload()
        assert merged is handle.model
        out = merged.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        assert_used(merged, out.past_key_values, less=True)
    assert torch.equal(out.sequences, before)


def test_prefix_tuning_is_refused() -> None:
    """Such adapters put keys of their own into the cache."""
    net = get_peft_model(copy.deepcopy(model()), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(Refused) as refusal:
        foveate.apply(net, "snapkv", budget=0.5)
    assert_refusal(refusal.value)
    assert "PREFIX" in str(refusal.value).upper()
