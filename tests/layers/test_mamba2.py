"""The Mamba-2 layer: prefill, pieces and steps agree, and padding touches nothing."""

import copy

import pytest
import torch
from torch.nn.functional import silu, softplus
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import foveate
from foveate.attention.recurrence import reference
from foveate.errors import BadArgument, Refused
from foveate.layers.mamba2 import Mamba2
from foveate.models.converted import container, decoder_layers, replace
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny

SPEC = {"heads": 4, "kv_heads": 2, "head_dim": 8, "state_dim": 6}


class Config:
    hidden_size = 20
    rms_norm_eps = 1e-6


def layer(**numbers):
    """A layer with weights that matter, in float64."""
    made = Mamba2(Config(), 0, **{**SPEC, **numbers}).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.7 if parameter.ndim == 1 else 1.0))
            if name == "in_proj.weight":
                parameter.mul_(Config.hidden_size**-0.5)
    return made


def hybrid(family="llama", states=(0, 2), dtype=torch.float32, kv_heads=2, **numbers):
    """A tiny model some of whose layers hold a state."""
    made = container(tiny(family, layers=4, kv_heads=kv_heads, dtype=dtype))
    for index in states:
        spec = {"heads": 8, "kv_heads": kv_heads, "head_dim": 16, "state_dim": 16, **numbers}
        module = replace(made, index, "mamba2", **spec)
        torch.nn.init.normal_(module.in_proj.weight, std=0.2)
        torch.nn.init.normal_(module.out_proj.weight, std=0.1)
    return made.eval()


def by_hand(module, hidden):
    """The layer's equations, token by token."""
    z, x, b, c, dt = module.in_proj(hidden).split(module.widths, dim=-1)
    heads, groups, batch, length = module.heads, module.heads // module.kv_heads, *hidden.shape[:2]
    if module.repeat_first:
        x, b = (t.view(batch, length, module.kv_heads, -1).repeat_interleave(groups, 2).flatten(2) for t in (x, b))
    mixed = torch.cat([x, b, c], -1)
    rows = []
    for t in range(length):
        taps = [
            module.conv1d.weight[:, 0, module.conv - 1 - back] * mixed[:, t - back]
            for back in range(module.conv)
            if t - back >= 0
        ]
        rows.append(silu(sum(taps) + module.conv1d.bias))
    x, b, c = torch.stack(rows, 1).split(module.mixed, -1)
    x = x.view(batch, length, -1, module.head_dim)
    x = x.repeat_interleave(heads // x.shape[2], 2)
    dt = softplus(dt + module.dt_bias)
    y, _ = reference(
        x,
        dt,
        -module.A_log.exp() * dt,
        b.view(batch, length, -1, module.state_dim),
        c.view(batch, length, heads, -1),
        module.D,
    )
    gated = y * silu(z.view_as(y))
    normed = gated / (gated.square().mean(-1, keepdim=True) + Config.rms_norm_eps).sqrt()
    return module.out_proj(normed.flatten(2) * module.norm.weight)


def cache_of():
    return DynamicCache(config=copy.deepcopy(hybrid().config))


@pytest.mark.parametrize(
    "numbers",
    [{}, {"repeat_first": True}, {"kv_heads": 4}, {"kv_heads": 1}, {"conv": 1}, {"bias": True, "out_bias": True}],
)
def test_it_is_what_its_equations_say(numbers):
    module, hidden = layer(**numbers, chunk=4), torch.randn(2, 11, 20, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(hidden)[0], by_hand(module, hidden), rtol=0, atol=1e-10)


@pytest.mark.parametrize("repeat_first", [False, True])
@pytest.mark.parametrize("pieces", [(13,), (1,) * 13, (5, 1, 7), (1, 2, 3, 7), (11, 1, 1)])
def test_pieces_on_a_cache_are_one_pass(pieces, repeat_first):
    module, hidden = layer(repeat_first=repeat_first, chunk=4), torch.randn(2, 13, 20, dtype=torch.float64)
    cache = cache_of()
    with torch.no_grad():
        want = module(hidden)[0]
        out = torch.cat([module(part, past_key_values=cache)[0] for part in hidden.split(pieces, 1)], 1)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)


def test_whether_it_goes_on_is_no_question_of_the_state_s_values():
    """A prompt that leaves a state of zeros is a prompt all the same, and a reset cache begins anew."""
    module = layer()
    hidden = torch.randn(1, 6, 20, dtype=torch.float64)
    with torch.no_grad():
        module.conv1d.bias.zero_()
        module.dt_bias.fill_(-1e4)  # nothing is ever written
        cache = cache_of()
        parts = [module(part, past_key_values=cache)[0] for part in hidden.split((4, 2), 1)]
        assert not cache.layers[0].recurrent_states[0].any() and cache.has_previous_state(0)
        torch.testing.assert_close(torch.cat(parts, 1), module(hidden)[0], rtol=0, atol=1e-10)
        cache.layers[0].reset()
        torch.testing.assert_close(module(hidden, past_key_values=cache)[0], module(hidden)[0], rtol=0, atol=1e-10)


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0] * 8 + [1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [1] + [0] * 8],
    "inside": [[1, 1, 0, 1, 0, 0, 1, 1, 1], [0, 1] * 4 + [1], [1] * 9],
}


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("form", ["2-D", "bool", "added"])
@pytest.mark.parametrize("first", [9, 4, 1])
def test_padding_leaves_the_state_untouched(side, form, first):
    """Outputs of tokens, the state and the convolution's window are those of each row alone without its padding."""
    module, hidden = layer(bias=True, chunk=4), torch.randn(3, 9, 20, dtype=torch.float64)
    mask = torch.tensor(MASKS[side])
    causal = torch.ones(9, 9, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    cache = cache_of()
    parts = []
    with torch.no_grad():
        for start, end in ((0, first), (first, 9)):
            if start == end:
                break
            now = mask[:, :end] if form == "2-D" else causal[:, :, start:end, :end]
            if form == "added":
                now = torch.zeros(now.shape, dtype=torch.float64).masked_fill(~now, torch.finfo(torch.float64).min)
            parts.append(module(hidden[:, start:end], attention_mask=now, past_key_values=cache)[0])
        out = torch.cat(parts, 1)
        assert torch.isfinite(out).all()
        for row in range(3):
            alone, real = cache_of(), mask[row].bool()
            want = module(hidden[row : row + 1, real], past_key_values=alone)[0]
            torch.testing.assert_close(out[row, real], want[0], rtol=0, atol=1e-10)
            for name in ("recurrent_states", "conv_states"):
                ours, theirs = (getattr(c.layers[0], name)[0] for c in (cache, alone))
                torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-10)


def test_the_state_is_wide_and_its_size_does_not_grow():
    made = hybrid(dtype=torch.bfloat16)
    sizes = []
    for length in (3, 50):
        cache = DynamicCache(config=made.config)
        with torch.no_grad():
            made(torch.randint(3, 250, (2, length)), past_key_values=cache)
        held = cache.layers[0]
        assert held.recurrent_states[0].dtype == torch.float32 and held.recurrent_states[0].shape == (2, 8, 16, 16)
        assert held.conv_states[0].dtype == torch.bfloat16 and held.conv_states[0].shape == (2, 32 + 32 + 128, 4)
        sizes.append(sum(t.numel() * t.element_size() for t in (held.recurrent_states[0], held.conv_states[0])))
    assert sizes == [decoder_layers(made)[0].self_attn.state_bytes(2)] * 2


def test_its_own_parameters_stay_in_float32(tmp_path):
    made = hybrid(dtype=torch.bfloat16)
    module = decoder_layers(made)[0].self_attn
    with torch.no_grad():
        for parameter in (module.A_log, module.D, module.dt_bias):
            parameter.copy_(torch.randn_like(parameter))
    made.save_pretrained(tmp_path)
    ids = torch.randint(3, 250, (1, 9))
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        container(made),
        copy.deepcopy(made),
        made,
    ):
        loaded = decoder_layers(again)[0].self_attn
        assert loaded.in_proj.weight.dtype == torch.bfloat16
        for name in ("A_log", "D", "dt_bias"):
            assert getattr(loaded, name).dtype == torch.float32
            assert torch.equal(getattr(loaded, name), getattr(module, name))
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, made(ids).logits)
    assert module.double().A_log.dtype == torch.float64


def test_bf16_is_near_float64():
    made = hybrid()
    ids = torch.randint(3, 250, (2, 33))
    with torch.no_grad():
        want = copy.deepcopy(made).double()(ids).logits
        assert (made(ids).logits - want).norm() / want.norm() < 1e-5
        assert (container(made).to(torch.bfloat16)(ids).logits - want).norm() / want.norm() < 0.1


@pytest.mark.parametrize("states", [(0,), (0, 1, 2), (3,), (1, 2)])
def test_a_model_generates_what_full_forwards_give(states):
    made = hybrid(states=states)
    ids = torch.randint(3, 250, (2, 9))
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(ids, **asked), made.generate(ids, **asked, use_cache=False))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_left_padding_in_a_model(family, implementation):
    made = hybrid(family)
    made.set_attn_implementation(implementation)
    ids = torch.randint(3, 250, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :1] = 0, 0
    ids[mask == 0] = 0
    out = made.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    for row in range(3):
        alone = made.generate(
            ids[row : row + 1, mask[row].bool()], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )
        assert torch.equal(out[row, -5:], alone[0, -5:])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_beams_follow_their_states(family):
    made = hybrid(family)
    ids = torch.randint(3, 250, (2, 7))
    asked = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(ids, **asked), made.generate(ids, **asked, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_methods_apply_to_the_other_layers(family):
    made = hybrid(family)
    ids = torch.randint(3, 250, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = made.generate(ids, **asked)
    stock = DynamicCache(config=made.config)
    with torch.no_grad():
        made(ids, attention_mask=mask, past_key_values=stock)
    with foveate.apply(made, "dense") as handle:
        assert torch.equal(made.generate(ids, **asked), plain)
        cache = handle.cache()
        with torch.no_grad():
            made(ids, attention_mask=mask, past_key_values=cache)
            forked = cache.fork()
            one = made(ids[:, :1], past_key_values=cache).logits
            assert torch.equal(made(ids[:, :1], past_key_values=forked).logits, one)
        states = 2 * decoder_layers(made)[0].self_attn.state_bytes(2)
        assert forked.state_nbytes == cache.state_nbytes == states
        keys = cache.nbytes - states
        assert ModelShape.of(made).dense_kv_bytes(21, 2) <= keys < ModelShape.of(made).dense_kv_bytes(21, 2) * 2
    with foveate.apply(made, "snapkv", budget=12, window=4):
        made.generate(ids, **asked)


def test_a_shape_counts_no_keys_where_there_are_none():
    made, plain = hybrid(), ModelShape.of(tiny("llama", layers=4, kv_heads=2))
    shape = ModelShape.of(made)
    assert [layer.kind for layer in shape.layers] == ["other", "full", "other", "full"]
    assert shape.kv_bytes_per_token * 2 == plain.kv_bytes_per_token


def test_layers_can_be_trained():
    made = hybrid().train()
    made(torch.randint(3, 250, (1, 9)), use_cache=False).logits.square().mean().backward()
    module = decoder_layers(made)[0].self_attn
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in module.parameters())


def test_refusals():
    module, hidden = layer(), torch.randn(1, 3, 20, dtype=torch.float64)
    with pytest.raises(Refused, match="no room"):
        module(hidden, past_key_values=DynamicCache())
    with pytest.raises(Refused, match="static"):
        module(hidden, past_key_values=StaticCache(config=hybrid().config, max_cache_len=20))
    for numbers, word in (({"kv_heads": 3}, "kv_heads"), ({"conv": 0}, "conv")):
        with pytest.raises(BadArgument, match=word):
            layer(**numbers)
