"""Mamba-2 layers that begin from attention's projections."""

import pytest
import torch
from tests.families import family_model
from torch.nn.functional import silu

from foveate.attention.recurrence import chunked
from foveate.convert.surgery.state_init import VALUE_TAP, check_states, put_states, state_bytes
from foveate.errors import BadArgument, Refused
from foveate.models.converted import container, decoder_layers
from foveate.models.tiny import tiny
from foveate.models.weights import read_heads


def first_inputs(model, ids):
    """What the first layer's attention reads, and what its output projection does."""
    seen = {}
    module = decoder_layers(model)[0].self_attn
    hooks = [
        module.register_forward_pre_hook(lambda m, a, k: seen.update(hidden=k["hidden_states"]), with_kwargs=True),
        module.o_proj.register_forward_pre_hook(lambda m, a: seen.update(heads=a[0])),
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen["hidden"], seen["heads"]


@pytest.mark.parametrize("repeat_first", [False, True])
@pytest.mark.parametrize("which", ["llama", "qwen2"])
def test_projections_are_the_attention_s(which, repeat_first):
    model = tiny("llama", kv_heads=2) if which == "llama" else family_model("qwen2", layers=3)
    made, ids = container(model), torch.randint(3, 250, (2, 15))
    put_states(made, [0], [ids], repeat_first=repeat_first)
    weights, module = read_heads(decoder_layers(model)[0].self_attn, torch.float32), decoder_layers(made)[0].self_attn
    hidden = torch.randn(5, model.config.hidden_size)
    with torch.no_grad():
        z, x, b, c, dt = module.in_proj(hidden).split(module.widths, -1)
        for ours, rows, bias in (
            (x, weights.v, weights.v_bias),
            (b, weights.k, weights.k_bias),
            (c, weights.q, weights.q_bias),
        ):
            want = hidden @ rows.flatten(0, 1).T + (0 if bias is None else bias.flatten())
            torch.testing.assert_close(ours, want, rtol=0, atol=1e-4)
        torch.testing.assert_close(silu(z), torch.ones_like(z), rtol=0, atol=1e-5)
        assert not dt.any() and not module.D.any() and not module.conv1d.weight[..., :-1].any()
        assert torch.equal(module.out_proj.weight, weights.o.transpose(0, 1).flatten(1))
        horizons = 1 / (module.A_log.exp() * torch.nn.functional.softplus(module.dt_bias))
        torch.testing.assert_close(horizons[[0, -1]], torch.tensor([1.0, 256.0]), rtol=1e-4, atol=0)


def test_it_begins_as_linear_attention_with_forgetting_heads():
    """The formula written with q, k and v, values so small that SiLU is nearly a line."""
    model = tiny("llama", kv_heads=2).double()
    made, ids = container(model), torch.randint(3, 250, (1, 21))
    put_states(made, [0], [ids])
    hidden, heads = first_inputs(model, ids)
    w, module = read_heads(decoder_layers(model)[0].self_attn), decoder_layers(made)[0].self_attn
    q, k, v = (torch.einsum("bnd,hed->bnhe", hidden, rows) for rows in (w.q, w.k, w.v))
    decay = (-1 / torch.logspace(0, torch.tensor(256.0).log10(), 8, dtype=torch.float64)).expand(1, 21, 8)
    y, _ = chunked(silu(VALUE_TAP * v).repeat_interleave(4, 2), torch.ones_like(decay), decay, silu(k), silu(q))
    y = y / (y.square().mean(-1, keepdim=True) + module.norm.eps).sqrt()
    gain = (y.flatten(2) * heads).sum((0, 1)) / y.flatten(2).square().sum((0, 1))
    with torch.no_grad():
        ours, want = module.heads_of(hidden), y.flatten(2) * gain
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["llama", "qwen2", "qwen3", "mistral"])
def test_gains_are_those_of_least_squares(which):
    """No other gain of any channel is nearer to the heads, and what is left is what was reported."""
    model = family_model("qwen2", layers=3) if which == "qwen2" else tiny(which, kv_heads=2)
    made, ids = container(model), torch.randint(3, 250, (2, 33))
    facts = put_states(made, [0], ids.split(1))
    hidden, heads = first_inputs(model, ids)
    with torch.no_grad():
        ours = decoder_layers(made)[0].self_attn.heads_of(hidden)
    left = (heads - ours).double()
    assert (left * ours).sum((0, 1)).abs().max() < 1e-3 * heads.square().sum((0, 1)).max()
    assert facts["error"]["0"] == pytest.approx(float(left.norm() / heads.double().norm()), rel=1e-3)
    assert 0 < facts["error"]["0"] < 1


def test_norms_become_their_mean_factor():
    model = tiny("qwen3", kv_heads=2)
    made, ids = container(model), torch.randint(3, 250, (4, 33))
    put_states(made, [0], [ids])
    hidden, _ = first_inputs(model, ids)
    old, module = decoder_layers(model)[0].self_attn, decoder_layers(made)[0].self_attn
    with torch.no_grad():
        _, _, b, c, _ = module.in_proj(hidden).split(module.widths, -1)
        for ours, proj, norm in ((b, old.k_proj, old.k_norm), (c, old.q_proj, old.q_norm)):
            rows = proj(hidden).unflatten(-1, (-1, 16))
            want = norm(rows)
            ours = ours.view_as(want)
            ratio = ours.flatten(0, 1).square().mean(0) / want.flatten(0, 1).square().mean(0)
            assert ratio.min() > 0.3 and ratio.max() < 3
            # Along its own direction each token's is the same.
            assert torch.nn.functional.cosine_similarity(ours, want, dim=-1).min() > 1 - 1e-5


def test_other_layers_stay_as_they_were():
    made = container(tiny("llama", layers=4, kv_heads=2))
    before = {name: value.clone() for name, value in made.state_dict().items() if ".1.self_attn" not in name}
    put_states(made, [1], [torch.randint(3, 250, (1, 9))])
    now = made.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert state_bytes(made) == decoder_layers(made)[1].self_attn.state_bytes() > 0


def test_bf16():
    made = container(tiny("llama", kv_heads=2, dtype=torch.bfloat16))
    ids = torch.randint(3, 250, (2, 17))
    facts = put_states(made, [0, 2], [ids])
    assert all(0 < error < 1 for error in facts["error"].values())
    with torch.no_grad():
        assert torch.isfinite(made(ids).logits).all()
    module = decoder_layers(made)[0].self_attn
    assert module.in_proj.weight.dtype == torch.bfloat16 and module.A_log.dtype == torch.float32


def test_refusals():
    for family in ("gemma3", "deepseek-v3"):
        with pytest.raises(Refused):
            check_states(tiny(family))
    for family in ("llama", "qwen3", "mistral"):
        check_states(tiny(family))
    with pytest.raises(BadArgument, match="tokens"):
        put_states(container(tiny("llama")), [0], [])
