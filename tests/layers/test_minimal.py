"""Minimal attention: counts, collapsed scores, symmetry, outputs inside the hull of the inputs, caches."""

import pytest
import torch
from tests.closeness import assert_close
from tests.families import family_model

import foveate
from foveate.errors import BadArgument
from foveate.layers.mixer import build
from foveate.models.converted import container, decoder_layers, replace
from foveate.models.shape import ModelShape

IDS = torch.randint(3, 250, (2, 19), generator=torch.Generator().manual_seed(3))
FORMS = ("separate", "collapsed", "symmetric", "cholesky")


def layer_of(width=24, **spec):
    config = family_model("llama").config
    config.hidden_size = width
    torch.manual_seed(0)
    return build("minimal", config, 0, spec)


def model_of(family="llama", **spec):
    made = container(family_model(family))
    for index in range(len(decoder_layers(made))):
        layer = replace(made, index, "minimal", **spec)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if "cholesky" not in str(spec) else 0.1)
    return made.eval()


def count(layer):
    return sum(p.numel() for p in layer.parameters())


def test_parameter_counts_of_one_head():
    d = 24
    for vo, more in (("full", 2 * d * d), ("none", 0)):
        assert count(layer_of(qk="separate", vo=vo)) == 2 * d * d + more
        assert count(layer_of(qk="collapsed", vo=vo)) == d * d + more
        assert count(layer_of(qk="symmetric", vo=vo)) == d * d + more
        assert count(layer_of(qk="cholesky", vo=vo)) == d * (d + 1) // 2 + more


def test_collapsed_scores_are_those_of_two_matrices():
    two, one = layer_of(qk="separate", heads=3, vo="full"), layer_of(qk="collapsed", heads=3, vo="full")
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        q, k = (linear.weight.unflatten(0, (3, 8)) for linear in (two.q_proj, two.k_proj))
        one.q_proj.weight.copy_(torch.einsum("hcd,hce->hed", q, k).flatten(0, 1))
        a, b = two.queries_and_keys(x)
        c, e = one.queries_and_keys(x)
    assert e.shape == (2, 1, 7, 24) and torch.equal(e[:, 0], x)
    assert_close(c @ e.transpose(-1, -2), a @ b.transpose(-1, -2), 2e-6)


@pytest.mark.parametrize("qk", ["symmetric", "cholesky"])
def test_symmetric_scores_are_symmetric_and_positive(qk):
    layer = layer_of(qk=qk, heads=2, vo="full").double()
    with torch.no_grad():
        q, k = layer.queries_and_keys(torch.randn(1, 40, 24).double())
        scores = q @ k.transpose(-1, -2)
    assert_close(scores, scores.transpose(-1, -2), 1e-14)  # some processors add up in another order
    assert torch.linalg.eigvalsh(scores).min() > -1e-9 * scores.abs().max()
    other = layer_of(qk="separate", heads=2, vo="full").double()
    with torch.no_grad():
        q, k = other.queries_and_keys(torch.randn(1, 40, 24).double())
    assert (q @ k.transpose(-1, -2) - (q @ k.transpose(-1, -2)).transpose(-1, -2)).abs().max() > 0.01


def test_cholesky_scores_are_those_of_the_triangle():
    layer = layer_of(qk="cholesky")
    t = layer.triangle()[0]
    assert torch.equal(t, t.tril()) and (t.tril() != 0).sum() == 24 * 25 // 2
    x = torch.randn(1, 5, 24)
    with torch.no_grad():
        q, k = layer.queries_and_keys(x)
        assert_close(q[:, 0] @ k[:, 0].transpose(-1, -2), x @ t @ t.T @ x.transpose(-1, -2), 2e-6)
    new = torch.randn(1, 24, 24).tril()
    layer.set_triangle(new)
    assert torch.equal(layer.triangle(), new)


@pytest.mark.parametrize("qk", FORMS)
def test_without_values_outputs_are_means_of_what_is_read(qk):
    layer = layer_of(qk=qk, width=8)
    x = torch.randn(1, 9, 8)
    with torch.no_grad():
        out = layer(x)[0]
        q, k = layer.queries_and_keys(x)
        scores = (q[0, 0] @ k[0, 0].T * layer.scaling).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -1e9)
        assert_close(out[0], scores.softmax(-1) @ x[0], 2e-6)
    # Convex weights: in every direction no output lies beyond the inputs that its token can see.
    directions = torch.randn(200, 8)
    for t in range(9):
        reach = directions @ x[0, : t + 1].T
        spots = directions @ out[0, t]
        assert (spots <= reach.amax(1) + 1e-5).all() and (spots >= reach.amin(1) - 1e-5).all()
    assert torch.equal(out[0, 0], x[0, 0]), "the first token reads itself"


@pytest.mark.parametrize("qk", FORMS)
@pytest.mark.parametrize("vo", ["full", "none"])
def test_cached_steps_padding_and_bytes(qk, vo):
    heads = 4 if vo == "full" else 1
    spec = {"rotary_dim": 16, "head_dim": 16} if qk in ("separate", "symmetric") else {"head_dim": 16}
    made = model_of(qk=qk, vo=vo, heads=heads, **spec)
    width = made.config.hidden_size
    with torch.no_grad():
        whole = made(IDS).logits
        step = made(IDS[:, :7], use_cache=True)
        parts = [step.logits]
        for start, stop in ((7, 12), (12, 13), (13, 19)):
            step = made(IDS[:, start:stop], past_key_values=step.past_key_values)
            parts.append(step.logits)
        assert_close(torch.cat(parts, 1), whole, 1e-5)
        shape = ModelShape.of(made)
        held = [layer.keys.numel() + layer.values.numel() for layer in step.past_key_values.layers]
        assert [4 * number for number in held] == [2 * 19 * shape.kv_bytes_per_slot(index) for index in range(2)]
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
        mask = (torch.arange(22) >= 3).long().expand(2, -1)
        places = (torch.arange(22) - 3).clamp(min=0).expand(2, -1)
        got = made(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
        assert_close(got, whole, 1e-5)
    if qk == "collapsed" and vo == "none":
        assert held == [2 * 19 * width] * 2, "one vector a token"


@pytest.mark.parametrize("qk", ["separate", "symmetric"])
def test_foveate_manages_layers_with_heads_of_their_own(qk):
    made = model_of(qk=qk, vo="full", heads=4, head_dim=16, rotary_dim=16)
    ask = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = made.generate(IDS, **ask)
    for method, settings in (("dense", {}), ("snapkv", {"budget": 400})):
        with foveate.apply(made, method, **settings):
            assert torch.equal(made.generate(IDS, **ask), plain)


@pytest.mark.parametrize("qk", FORMS)
def test_gradients_reach_every_matrix(qk):
    made = model_of(qk=qk, vo="full", heads=2, head_dim=16)
    made(IDS).logits.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in decoder_layers(made)[0].self_attn.parameters())


@pytest.mark.parametrize("qk", FORMS)
def test_bf16(qk):
    layer = layer_of(qk=qk, vo="full", heads=3)
    x = torch.randn(2, 11, 24)
    with torch.no_grad():
        want = layer(x)[0]
        got = layer.to(torch.bfloat16)(x.to(torch.bfloat16))[0]
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, 0.02)


def test_what_does_not_fit_is_refused():
    for wrong, words in (
        ({"qk": "single"}, "collapsed"),
        ({"vo": "half"}, "none"),
        ({"heads": 2, "vo": "none"}, "exactly 1"),
        ({"heads": 5, "vo": "full"}, "divisor"),
        ({"qk": "collapsed", "rotary_dim": 4}, "where keys are tokens"),
        ({"qk": "symmetric", "rotary_dim": 3}, "even"),
    ):
        with pytest.raises(BadArgument, match=words):
            layer_of(**wrong)
