"""TPLA's layer: when it is MLA, when slices are exact, what a rank is given, and what is cached."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import foveate
from foveate.compat import LatentProjection
from foveate.errors import BadArgument
from foveate.layers import tensor_latent
from foveate.layers.eager import visible
from foveate.layers.latent import latent_spec
from foveate.layers.tensor_latent import even_parts
from foveate.models import converted
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny


def sliced(model=None, **numbers):
    """A model all of whose layers are cut, with the weights of a tiny DeepSeek-V3 (latent of 32 dims, 8 rotated)."""
    made = converted.container(model or tiny("deepseek-v3"))
    for index, layer in enumerate(converted.decoder_layers(made)):
        state = layer.self_attn.state_dict()
        module = converted.replace(made, index, "tensor-latent", **latent_spec(layer.self_attn), **numbers)
        module.load_state_dict(state)
    return made


def one(**numbers):
    """One cut layer in float64 beside random inputs: module, hidden states [2, 7, d], (cos, sin)."""
    made = sliced(tiny("deepseek-v3", layers=1), **numbers).double()
    x = torch.randn(2, 7, made.config.hidden_size, dtype=torch.float64)
    position = made.model.rotary_emb(x, torch.arange(7)[None].expand(2, -1))
    return converted.decoder_layers(made)[0].self_attn, x, position


def ids(length, batch=2):
    return torch.randint(3, 250, (batch, length))


def stepped(model, tokens, prompt):
    """Logits of a prompt in one forward and of the tokens behind it one by one."""
    cache = DynamicCache(config=model.config)
    logits = [model(tokens[:, :prompt], past_key_values=cache).logits]
    logits += [model(token, past_key_values=cache).logits for token in tokens[:, prompt:].split(1, dim=1)]
    return torch.cat(logits, dim=1)


def close(a, b, bound=1e-5):
    return float((a - b).norm() / b.norm()) < bound


@torch.no_grad()
def test_one_shard_is_latent_attention():
    model, tokens = tiny("deepseek-v3"), ids(19)
    made = sliced(model, shards=1, separation=False)
    assert close(made(tokens).logits, model(tokens).logits)
    assert close(stepped(made, tokens, 11), model(tokens).logits)
    # The sliced path too, which one shard does not take by itself.
    module, x, position = one(shards=1)
    q_nope, q_rot, latent, k_rot = module.project(x, position)
    mask = visible(None, 7, 7, x.device)
    assert close(module.sliced(q_nope, q_rot, module.normed(latent), k_rot, mask), module(x, position)[0], 1e-12)


@torch.no_grad()
def test_separation_reads_prompts_whole_and_steps_in_slices():
    model, tokens = tiny("deepseek-v3"), ids(15)
    whole, made = model(tokens).logits, sliced(model, shards=2)
    assert close(made(tokens).logits, whole)
    out = stepped(made, tokens, 9)
    assert close(out[:, :9], whole[:, :9])
    assert not close(out[:, 9:], whole[:, 9:], 1e-2)
    # A chunk of a prompt is prompt; so is a prompt of one token.
    cache = DynamicCache(config=made.config)
    parts = [made(part, past_key_values=cache).logits for part in tokens.split([1, 5, 9], dim=1)]
    assert close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
@pytest.mark.parametrize("shards", [2, 4])
def test_identical_slices_are_exact(shards):
    """c = [a, a, ..]: each slice knows all there is, and the factors that are right for it are the defaults and g."""
    module, x, position = one(shards=shards, separation=False, score_scale=[float(shards)] * shards)
    part = module.slice_of(0)
    down, up = module.kv_a_proj_with_mqa.weight, module.kv_b_proj.weight
    down[: module.kv_lora_rank] = down[part].repeat(shards, 1)
    up.copy_(up[:, part].repeat(1, shards))
    module.kv_a_layernorm.weight.copy_(module.kv_a_layernorm.weight[part].repeat(shards))
    out = module(x, position)[0]
    module.separation = True
    assert close(out, module(x, position)[0], 1e-12)


@torch.no_grad()
def test_slices_of_a_random_latent_are_not_exact():
    module, x, position = one(shards=2, separation=False)
    out = module(x, position)[0]
    module.separation = True
    assert not close(out, module(x, position)[0], 0.05)


@torch.no_grad()
def test_the_sum_of_all_scores_would_be_exact():
    """Where ranks summed their scores before the softmax, nothing would be lost: what is lost is lost there."""
    module, x, position = one(shards=4)
    q_nope, q_rot, latent, k_rot = module.project(x, position)
    latent = module.kv_a_layernorm(latent)
    w_uk, w_uv = LatentProjection(module).weights(x)
    parts = [module.slice_of(rank) for rank in range(4)]
    scores = q_rot @ k_rot.mT
    for part in parts:
        scores = scores + torch.einsum("bhnd,hdr,bxmr->bhnm", q_nope, w_uk[..., part], latent[..., part])
    p = (scores * module.scaling + torch.full((7, 7), -torch.inf).triu(1)).softmax(-1)
    heads = sum(torch.einsum("bhnm,bxmr,hvr->bnhv", p, latent[..., part], w_uv[..., part]) for part in parts)
    assert close(module.o_proj(heads.flatten(2)), module(x, position)[0], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("shards", [2, 3, 4])
def test_grouped_is_the_whole_with_other_groups_weights_at_zero(shards):
    module, x, position = one(shards=shards, separation=False, grouped=True, norm_scale=[1.5] * shards)
    grouped = module(x, position)[0]
    served = [range(8)[module.heads_of(rank)] for rank in range(shards)]
    assert [len(heads) for heads in served] == {2: [4, 4], 3: [3, 3, 2], 4: [2, 2, 2, 2]}[shards]
    module.grouped = False
    assert not close(module(x, position)[0], grouped, 0.05)
    up = module.kv_b_proj.weight.view(8, -1, module.kv_lora_rank)
    for rank in range(shards):
        for head in set(range(8)) - set(served[rank]):
            up[head, :, module.slice_of(rank)] = 0
    assert close(module(x, position)[0], grouped, 1e-12)


@torch.no_grad()
def test_one_sum_over_ranks_in_each_layer(monkeypatch):
    sums, given = [], []
    plain_sum, plain_shard = tensor_latent.all_reduce, tensor_latent.shard_output
    monkeypatch.setattr(tensor_latent, "all_reduce", lambda parts: sums.append(len(parts)) or plain_sum(parts))

    def shard(q_nope, q_rot, latent, k_rot, *weights, **numbers):
        given.append(latent.shape[-1] + k_rot.shape[-1])
        return plain_shard(q_nope, q_rot, latent, k_rot, *weights, **numbers)

    monkeypatch.setattr(tensor_latent, "shard_output", shard)
    made = sliced(shards=2, separation=False)
    made(ids(5))
    assert sums == [2, 2, 2]
    module = converted.decoder_layers(made)[0].self_attn
    # 16 of 32 dims and 8 rotated ones: what a rank is given of each token is what it would hold.
    assert set(given) == {module.rank_elements} == {16 + 8}


@pytest.mark.parametrize(("total", "shards"), [(9, 4), (9, 2), (8, 8), (32, 3), (5, 1)])
def test_parts_are_even_and_whole(total, shards):
    parts = [list(range(total)[part]) for part in even_parts(total, shards)]
    assert [each for part in parts for each in part] == list(range(total))
    sizes = [len(part) for part in parts]
    assert len(sizes) == shards and sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@torch.no_grad()
def test_slices_of_uneven_width_see_all_there_is():
    """Without the softmax between, ranks add up to the whole layer: every dim and every head is somewhere, once."""
    module, x, position = one(shards=5)
    q_nope, q_rot, latent, k_rot = module.project(x, position)
    latent = module.kv_a_layernorm(latent)
    # Only the first token is seen: the softmax has nothing to choose, and outputs are linear in the slices.
    mask = torch.zeros(7, 7, dtype=torch.bool).index_fill_(1, torch.tensor(0), True)[None, None]
    _, w_uv = LatentProjection(module).weights(x)
    values = torch.einsum("br,hvr->bhv", latent[:, 0, 0], w_uv).flatten(1)
    expected = module.o_proj(values)[:, None].expand(-1, 7, -1)
    assert close(module.sliced(q_nope, q_rot, latent, k_rot, mask), expected, 1e-12)
    assert module.rank_elements == 7 + 8
    assert module.norm_scale == [32 / 7] * 2 + [32 / 6] * 3


@pytest.mark.parametrize(
    ("rank", "rope", "shards", "elements"),
    [(512, 64, 2, 320), (512, 64, 4, 192), (512, 64, 1, 576), (512, 64, 3, 171 + 64)],
)
def test_elements_of_a_rank(rank, rope, shards, elements):
    config = tiny("deepseek-v3").config
    numbers = {"num_heads": 2, "rank": rank, "rope_dim": rope, "nope_dim": 8, "v_dim": 8}
    made = tensor_latent.TensorLatentAttention(config, 0, shards=shards, **numbers)
    assert made.rank_elements == elements


@torch.no_grad()
def test_the_cache_holds_all_slices_once():
    made = sliced(shards=2, separation=False)
    cache = DynamicCache(config=made.config)
    made(ids(9), past_key_values=cache)
    shape = ModelShape.of(made)
    for layer, held in zip(cache.layers, shape.layers, strict=True):
        assert layer.keys.shape == (2, 1, 9, 32)
        assert layer.values.shape == (2, 1, 9, 8)
        assert (held.kind, held.store_heads, held.store_k_dim, held.store_v_dim) == ("other", 1, 40, 0)
    assert shape.kv_bytes_per_token == 3 * 40 * 4


@torch.no_grad()
def test_rotated_keys_are_not_sliced():
    """A latent that says nothing leaves attention by position, which every rank knows whole."""
    module, x, position = one(shards=2, separation=False)
    module.kv_b_proj.weight.view(8, -1, module.kv_lora_rank)[:, : module.qk_nope_head_dim] = 0
    module.norm_scale = [1.0, 1.0]
    normed = module.normed(module.project(x, position)[2])
    q_nope, q_rot, _, k_rot = module.project(x, position)
    mask = visible(None, 7, 7, x.device)
    # No content in the scores: both ranks have the same softmax, and it is that of the whole layer.
    expected = module._absorbed(torch.cat([q_nope, q_rot], -1), normed, k_rot, mask).transpose(1, 2).flatten(2)
    assert close(module.sliced(q_nope, q_rot, normed, k_rot, mask), module.o_proj(expected), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("separation", [True, False])
def test_left_padding_changes_nothing(implementation, separation):
    made = sliced(shards=2, separation=separation)
    made.set_attn_implementation(implementation)
    tokens = ids(12, batch=1)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(16) >= 4).long()[None]
    both, there = torch.cat([padded, ids(16, 1)]), torch.cat([mask, torch.ones_like(mask)])
    new = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = made.generate(both, attention_mask=there, **new)
    assert torch.equal(out[0, 16:], made.generate(tokens, **new)[0, 12:])


@torch.no_grad()
def test_steps_equal_one_forward_where_all_is_sliced():
    made, tokens = sliced(shards=4, separation=False), ids(13)
    assert close(stepped(made, tokens, 1), made(tokens).logits)
    assert close(stepped(made, tokens, 8), made(tokens).logits)
    cache = DynamicCache(config=made.config)
    parts = [made(part, past_key_values=cache).logits for part in tokens.split([6, 7], dim=1)]
    assert close(torch.cat(parts, dim=1), made(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("separation", [True, False])
def test_saved_and_opened_it_is_the_same(tmp_path, separation):
    made = sliced(shards=2, separation=separation, norm_scale=[1.25, 7.0], score_scale=[1.5, -0.25])
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = ids(11)
    assert torch.equal(stepped(again, tokens, 6), stepped(made, tokens, 6))


@torch.no_grad()
def test_half_precision_and_gradients():
    made = sliced(copy.deepcopy(tiny("deepseek-v3")), shards=2, separation=False)
    tokens = ids(9)
    single = made(tokens).logits
    half = copy.deepcopy(made).to(torch.bfloat16)(tokens).logits
    assert half.dtype == torch.bfloat16
    assert close(half.float(), single, 0.1)
    with torch.enable_grad():
        made(tokens).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@torch.no_grad()
def test_foveates_engine_leaves_cut_layers_alone():
    """Methods manage the layers that are not cut; the cut one computes what it computes without them."""
    model = tiny("deepseek-v3")
    made = converted.container(model)
    state = converted.decoder_layers(made)[1].self_attn
    spec, weights = latent_spec(state), state.state_dict()
    converted.replace(made, 1, "tensor-latent", **spec, shards=2).load_state_dict(weights)
    tokens = ids(20, batch=1)
    new = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = made.generate(tokens, **new)
    with foveate.apply(made, "dense"):
        assert torch.equal(made.generate(tokens, **new), plain)
        assert torch.equal(made.generate(tokens, prefill_chunk_size=7, **new), plain)


@pytest.mark.parametrize(
    ("numbers", "argument"),
    [
        ({"shards": 33}, "shards"),
        ({"shards": 0}, "shards"),
        ({"shards": 16, "grouped": True}, "shards"),
        ({"shards": 2, "norm_scale": [1.0]}, "norm_scale"),
        ({"shards": 2, "score_scale": [1.0, 1.0, 1.0]}, "score_scale"),
    ],
)
def test_numbers_that_do_not_fit(numbers, argument):
    with pytest.raises(BadArgument, match=f"^{argument}="):
        sliced(**numbers)
