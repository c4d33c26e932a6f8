"""Streaming moments equal those of all activations held at once."""

import pytest
import torch

from foveate.errors import BadArgument
from foveate.heads.moments import collect
from foveate.models.tiny import tiny


def test_moments_are_those_of_the_activations():
    model = tiny("llama", kv_heads=2)
    tokens = torch.randint(3, 250, (5, 13))
    modules = [layer.self_attn for layer in model.model.layers]
    seen = {i: [] for i in range(len(modules))}
    handles = [
        m.register_forward_pre_hook(lambda m, a, k, i=i: seen[i].append(k["hidden_states"]), with_kwargs=True)
        for i, m in enumerate(modules)
    ]
    found = collect(model, modules, tokens.split(2))
    for handle in handles:
        handle.remove()
    for index, moments in found.items():
        x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen[index]]).double()
        assert moments.count == 65 == len(x)
        torch.testing.assert_close(moments.second, x.T @ x / 65)
        torch.testing.assert_close(moments.mean, x.mean(0))
        weight, bias = torch.randn(7, x.shape[1]).double(), torch.randn(7).double()
        y = x @ weight.T + bias
        torch.testing.assert_close(moments.of(weight, bias), y.T @ y / 65)


def test_outputs_can_be_collected_and_hooks_are_gone():
    model = tiny("llama")
    norm = {"last": model.model.norm}
    tokens = torch.randint(3, 250, (2, 9))
    found = collect(model, norm, [tokens], side="output")
    out = model.model(tokens).last_hidden_state.reshape(18, -1).double()
    torch.testing.assert_close(found["last"].second, (out.T @ out / 18).detach())
    assert not model.model.norm._forward_hooks


def test_no_text_is_an_error():
    model = tiny("llama")
    with pytest.raises(BadArgument, match="batch"):
        collect(model, [model.model.norm], [])
