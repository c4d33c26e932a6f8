"""Latent attention from weights alone."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from foveate.convert.surgery.latent_init import joint_svd, largest_rank, put_latent, stacked
from foveate.errors import BadArgument, Refused
from foveate.models.converted import container, decoder_layers
from foveate.models.tiny import tiny
from foveate.models.weights import read_heads


def qwen2(kv_heads=2):
    model = Qwen2ForCausalLM(
        Qwen2Config(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            hidden_size=48,
            intermediate_size=64,
            vocab_size=256,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def weights_of(kv_heads=2, dim=16, biased=False):
    module = decoder_layers(qwen2() if biased else tiny("llama", kv_heads=kv_heads, head_dim=dim))[0].self_attn
    return read_heads(module)


def with_bias(weight, bias, x):
    return x @ weight.flatten(0, 1).T + (0 if bias is None else bias.flatten())


def repeated(weights):
    return torch.cat([w.repeat_interleave(weights.groups, 0).flatten(0, 1) for w in (weights.k, weights.v)])


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_full_rank_keeps_keys_without_position_and_all_values(kv_heads, biased):
    weights = weights_of(kv_heads, dim=4, biased=biased)
    heads, dim, width = weights.q.shape
    made = joint_svd(weights, rank=largest_rank(weights), rope_dim=2, rope_rows="fastest").weights
    x = torch.randn(7, width, dtype=torch.float64)
    assert made.dkv_bias is None
    latent = x @ made.w_dkv.T
    values = torch.einsum("nr,hvr->nhv", latent, made.w_uv)
    keys = torch.einsum("nr,hkr->nhk", latent, made.w_uk)
    want_v = with_bias(weights.v, None, x).view(7, -1, dim).repeat_interleave(weights.groups, 1)
    want_k = with_bias(weights.k, None, x).view(7, -1, dim).repeat_interleave(weights.groups, 1)
    plain = [row for row in range(dim) if row not in (0, dim // 2)]
    torch.testing.assert_close(values, want_v, rtol=0, atol=1e-10)
    torch.testing.assert_close(keys, want_k[..., plain], rtol=0, atol=1e-10)
    queries = with_bias(made.q, made.q_bias, x).view(7, heads, dim)
    want_q = with_bias(weights.q, weights.q_bias, x).view(7, heads, dim)
    torch.testing.assert_close(queries, want_q[..., [*plain, 0, dim // 2]], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("rope_rows", "rows"), [("last", [12, 13, 14, 15]), ("even", [0, 4, 8, 12]), ("fastest", [0, 1, 8, 9])]
)
def test_the_shared_key_is_the_mean_of_the_heads(rope_rows, rows):
    weights = weights_of(kv_heads=4)
    made = joint_svd(weights, rank=8, rope_dim=4, rope_rows=rope_rows)
    torch.testing.assert_close(made.weights.w_kr, weights.k[:, rows].mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(made.weights.q[:, -4:], weights.q[:, rows], rtol=0, atol=0)
    # "last" and "even" turn by every fourth of the 8 frequencies, which is what None says; "fastest" by the first two.
    assert made.spec["frequencies"] == ([0, 1] if rope_rows == "fastest" else None)


def test_fewer_dims_without_position():
    weights = weights_of(kv_heads=4)
    all_rows, fewer = (joint_svd(weights, rank=8, rope_dim=4, nope_dim=n, q_rank=30) for n in (None, 7))
    assert (all_rows.spec["nope_dim"], fewer.spec["nope_dim"]) == (12, 7)
    torch.testing.assert_close(fewer.weights.w_uk, all_rows.weights.w_uk[:, :7], rtol=0, atol=0)
    torch.testing.assert_close(fewer.weights.q_b, all_rows.weights.q_b[:, [*range(7), *range(12, 16)]], rtol=0, atol=0)


def test_biases_cost_no_rank():
    """A value's bias is exact at any rank, however large; a key's is where it has a position."""
    weights = weights_of(biased=True)
    groups = weights.groups
    made = joint_svd(weights, rank=3, rope_dim=4)
    louder = replace(weights, k_bias=100 * weights.k_bias, v_bias=100 * weights.v_bias)
    again = joint_svd(louder, rank=3, rope_dim=4)
    assert again.kv_energy == made.kv_energy
    torch.testing.assert_close(again.weights.w_dkv, made.weights.w_dkv, rtol=0, atol=0)
    torch.testing.assert_close(again.weights.kr_bias, louder.k_bias[:, -4:].mean(0), rtol=0, atol=1e-12)
    want = sum(weights.o[h] @ louder.v_bias[h // groups] for h in range(len(weights.q)))
    torch.testing.assert_close(again.weights.o_bias, want, rtol=0, atol=1e-10)


def test_the_rank_of_the_stack_is_that_of_the_heads_before_repeating():
    for kv_heads, dim in ((1, 16), (2, 16), (8, 16)):
        weights = weights_of(kv_heads, dim)
        assert int(torch.linalg.matrix_rank(repeated(weights))) == largest_rank(weights) == min(64, 2 * kv_heads * dim)
        assert int(torch.linalg.matrix_rank(stacked(weights))) == largest_rank(weights)
        with pytest.raises(BadArgument, match="rank"):
            joint_svd(weights, rank=largest_rank(weights) + 1, rope_dim=8)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_the_latent_is_that_of_heads_repeated_first(kv_heads):
    """The published decomposition, written out: singular values, latents up to their signs, what they give back."""
    weights, rank = weights_of(kv_heads), 9
    left, values, right = torch.linalg.svd(repeated(weights), full_matrices=False)
    made = joint_svd(weights, rank=rank, rope_dim=4)
    torch.testing.assert_close(made.weights.w_dkv.norm(dim=1), values[:rank], rtol=1e-9, atol=0)
    torch.testing.assert_close(made.weights.w_dkv.abs(), (values[:rank, None] * right[:rank]).abs(), rtol=0, atol=1e-9)
    back = (left[:, :rank] * values[:rank] @ right[:rank]).view(2, 8, 16, -1)
    torch.testing.assert_close(made.weights.w_uk @ made.weights.w_dkv, back[0, :, :12], rtol=0, atol=1e-9)
    torch.testing.assert_close(made.weights.w_uv @ made.weights.w_dkv, back[1], rtol=0, atol=1e-9)
    assert made.kv_energy == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))


def test_query_ranks():
    weights = weights_of(4)
    full = joint_svd(weights, rank=9, rope_dim=8, q_rank=64)
    torch.testing.assert_close(
        torch.einsum("hqr,rd->hqd", full.weights.q_b, full.weights.q_a), weights.q, rtol=0, atol=1e-10
    )
    assert full.q_energy == pytest.approx(1.0) and 0 < full.kv_energy < 1
    less = joint_svd(weights, rank=9, rope_dim=8, q_rank=20)
    assert less.weights.q_a.shape == (20, 64) and less.q_energy < 1


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("numbers", [{}, {"q_rank": 20}, {"rope_rows": "fastest"}])
def test_a_layer_takes_the_weights(numbers, biased):
    """With one position, where rotation does nothing, and full rank it is the same layer."""
    model = (qwen2() if biased else tiny("llama", kv_heads=2, head_dim=8)).double()
    made = container(model)
    ids = torch.randint(3, 250, (3, 1))
    for index, layer in enumerate(decoder_layers(model)):
        full = largest_rank(read_heads(layer.self_attn))
        put_latent(made, index, rank=full, rope_dim=4, **numbers)
    with torch.no_grad():
        out, want = made(ids).logits, model(ids).logits
        if "q_rank" in numbers:
            assert torch.isfinite(out).all()
        torch.testing.assert_close(out, want, rtol=0, atol=1e-10)  # one key: queries do not matter
        assert torch.isfinite(made(torch.randint(3, 250, (2, 13))).logits).all()


def test_all_pairs_kept_and_heads_alike_is_the_same_function():
    """One key head, every pair rotated as before: the shared key is that head's, and nothing is lost."""
    model = tiny("llama", kv_heads=1).double()
    made = container(model)
    for index in range(3):
        put_latent(made, index, rank=32, rope_dim=16, rope_rows="fastest")
    ids = torch.randint(3, 250, (2, 29))
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rope_rows", ["last", "even", "fastest"])
def test_biases_are_exact_where_positions_are_alike(rope_rows):
    """One key head and no rotation: dropping the bias of keys without a position changes no attention."""
    model = qwen2(kv_heads=1).double()
    made = container(model)
    for index in range(2):
        put_latent(made, index, rank=24, rope_dim=4, rope_rows=rope_rows)
    ids, nowhere = torch.randint(3, 250, (2, 13)), torch.zeros(2, 13, dtype=torch.long)
    with torch.no_grad():
        want = model(ids, position_ids=nowhere).logits
        torch.testing.assert_close(made(ids, position_ids=nowhere).logits, want, rtol=0, atol=1e-7)
        assert not torch.allclose(model(ids).logits, want, atol=1e-2)


def test_refusals():
    with pytest.raises(Refused, match="norms"):
        joint_svd(read_heads(decoder_layers(tiny("qwen3"))[0].self_attn), rank=4, rope_dim=4)
    weights = weights_of()
    for numbers, word in (
        ({"rank": 0}, "rank"),
        ({"rope_dim": 3}, "rope_dim"),
        ({"rope_dim": 18}, "rope_dim"),
        ({"q_rank": 65}, "q_rank"),
        ({"nope_dim": 13}, "nope_dim"),
        ({"rope_rows": "best"}, "rope_rows"),
    ):
        with pytest.raises(BadArgument, match=word):
            joint_svd(weights, **{"rank": 4, "rope_dim": 4, **numbers})
