"""Head-mapped attention: any maps give what explicit softmax gives, and caches hold exactly what is said."""

from __future__ import annotations

from dataclasses import replace as with_changes
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.families import FAMILIES, family_model
from transformers import AutoModelForCausalLM

import foveate
from foveate.convert.diffqkv import narrowed
from foveate.convert.surgery.head_maps import install, layers_of, ordered, read, take
from foveate.errors import BadArgument, Refused
from foveate.heads.moments import collect
from foveate.layers import sparse_query as presets
from foveate.layers.head_mapped import HeadMappedAttention
from foveate.layers.mixer import build
from foveate.models import converted
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny

CONFIG = tiny("llama", heads=8, head_dim=16).config
D = 16


def embeddings(n: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(n, dtype=dtype)[:, None] * 100.0 ** (-torch.arange(0, dim, 2, dtype=dtype) / dim)
    angle = torch.cat([angle, angle], dim=-1)[None]
    return angle.cos(), angle.sin()


def layer(**spec: Any) -> HeadMappedAttention:
    numbers = {"num_heads": 6, "num_k_heads": 6, "num_v_heads": 6, "head_dim": D} | spec
    made = build("head-mapped", CONFIG, 0, numbers).double()
    assert isinstance(made, HeadMappedAttention)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) / (4 if parameter.ndim > 1 else 1))
    return made.eval()


def by_hand(made: HeadMappedAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The layer head by head, from its weights and maps alone."""
    n, r = x.shape[1], made.rotary_dim

    def turned(t: torch.Tensor) -> torch.Tensor:
        a, b = t[..., : r // 2], t[..., r // 2 : r]
        return torch.cat([t[..., :r] * cos[..., :r] + torch.cat([-b, a], -1) * sin[..., :r], t[..., r:]], -1)

    q, k, v = (f(x).unflatten(-1, (-1, D)) for f in (made.q_proj, made.k_proj, made.v_proj))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = j <= i if made.sliding_window is None else (j <= i) & (i - j < made.sliding_window)
    outs = []
    for h in range(made.num_heads):
        query = turned(q[:, :, made.query_map[h]])
        key = turned(k[:, :, made.key_map[h]])
        scores = query @ key.transpose(1, 2) * made.scaling
        if made.softcap is not None:
            scores = made.softcap * torch.tanh(scores / made.softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(weights @ v[:, :, made.value_map[h]])
    return made.o_proj(torch.cat(outs, -1))


SHARED: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_k_heads": 2, "num_v_heads": 2},
    "keys less than values": {"num_k_heads": 2, "num_v_heads": 3},
    "values less than keys": {"num_k_heads": 6, "num_v_heads": 1},
    "no divisor": {"num_k_heads": 4, "num_v_heads": 5},
    "any maps": {
        "num_k_heads": 3,
        "num_v_heads": 3,
        "key_map": [2, 0, 1, 0, 2, 2],
        "value_map": [0, 0, 1, 2, 1, 0],
    },
    "unequal groups": {"num_k_heads": 2, "num_v_heads": 2, "key_map": [0, 1, 1, 1, 1, 1], "value_map": [0] + [1] * 5},
    "reverse": {"num_k_heads": 6, "num_v_heads": 6, "num_q_heads": 2, "query_map": [0, 0, 0, 1, 1, 1]},
    "partial rotation": {"num_k_heads": 3, "num_v_heads": 2, "rotary_dim": 8, "scale": 0.3},
    "biases": {"num_k_heads": 3, "num_v_heads": 2, "biases": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "window": {"num_k_heads": 2, "num_v_heads": 3, "window": 4},
    "window in groups": {"num_k_heads": 2, "num_v_heads": 2, "window": 4},
    "softcap": {"num_k_heads": 2, "num_v_heads": 3, "softcap": 2.0},
    "softcap and window": {"num_k_heads": 2, "num_v_heads": 3, "softcap": 2.0, "window": 3},
}


@pytest.mark.parametrize("name", SHARED)
def test_any_maps_are_attention_head_by_head_with_gradients(name: str) -> None:
    made = layer(**SHARED[name])
    x = torch.randn(2, 13, CONFIG.hidden_size, dtype=torch.float64, requires_grad=True)
    cos, sin = embeddings(13, made.rotary_dim)
    out, want = made(x, (cos, sin))[0], by_hand(made, x, cos, sin)
    assert_close(out.detach(), want.detach(), 1e-12)
    probe = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * probe).sum(), [x, *made.parameters()]),
        torch.autograd.grad((want * probe).sum(), [x, *made.parameters()]),
        strict=True,
    ):
        assert_close(ours, theirs, 1e-11)


def test_equal_numbers_are_mha_and_equal_kv_numbers_gqa() -> None:
    assert layer().key_map == tuple(range(6)) == layer().value_map
    made = layer(num_k_heads=3, num_v_heads=3)
    assert made.key_map == made.value_map == (0, 0, 1, 1, 2, 2)
    assert made.grouped
    assert made.num_key_value_groups == 2


@pytest.mark.parametrize("count", range(1, 7))
def test_default_maps_follow_the_formula_also_without_a_divisor(count: int) -> None:
    made = layer(num_k_heads=count, num_v_heads=1)
    assert made.key_map == tuple(h * count // 6 for h in range(6))


def test_keys_repeated_for_each_value_head_change_nothing() -> None:
    made = layer(num_k_heads=2, num_v_heads=6)
    twin = layer(num_k_heads=6, num_v_heads=6)
    weights = read(made)
    with torch.no_grad():
        for name in ("q_proj", "v_proj", "o_proj"):
            getattr(twin, name).load_state_dict(getattr(made, name).state_dict())
        twin.k_proj.weight.copy_(weights.k[[0, 0, 0, 1, 1, 1]].flatten(0, 1))
    x, rope = torch.randn(1, 9, CONFIG.hidden_size, dtype=torch.float64), embeddings(9, D)
    assert_close(made(x, rope)[0].detach(), twin(x, rope)[0].detach(), 1e-12)
    assert made.k_proj.weight.numel() * 3 == twin.k_proj.weight.numel()


def test_augmented_queries_are_two_matrices() -> None:
    made, plain = layer(num_k_heads=2, num_v_heads=3, query_width=24), layer(num_k_heads=2, num_v_heads=3)
    assert made.q_up_proj.weight.shape == (24, CONFIG.hidden_size)
    with torch.no_grad():
        plain.q_proj.weight.copy_(made.q_proj.weight @ made.q_up_proj.weight)
        for name in ("k_proj", "v_proj", "o_proj"):
            getattr(plain, name).load_state_dict(getattr(made, name).state_dict())
    x, rope = torch.randn(1, 9, CONFIG.hidden_size, dtype=torch.float64), embeddings(9, D)
    assert_close(made(x, rope)[0].detach(), plain(x, rope)[0].detach(), 1e-12)


def test_values_may_be_wider_or_narrower_than_keys() -> None:
    for width in (4, 32):
        made = layer(num_k_heads=2, num_v_heads=3, v_head_dim=width)
        x = torch.randn(1, 5, CONFIG.hidden_size, dtype=torch.float64)
        cos, sin = embeddings(5, D)
        weights = read(made)
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        out = torch.zeros_like(x)
        for h in range(6):
            q = torch.einsum("bnd,ed->bne", x, weights.q[h])
            k = torch.einsum("bnd,ed->bne", x, weights.k[made.key_map[h]])
            q, k = (t * cos + torch.cat([-t[..., D // 2 :], t[..., : D // 2]], -1) * sin for t in (q, k))
            p = (q @ k.transpose(1, 2) * made.scaling).masked_fill(~seen, -torch.inf).softmax(-1)
            out = out + p @ (x @ weights.v[made.value_map[h]].T) @ weights.o[h].T
        assert_close(made(x, (cos, sin))[0].detach(), out.detach(), 1e-12)


def test_noise_is_of_the_group_and_only_in_training() -> None:
    noisy = layer(num_k_heads=2, num_v_heads=2, noise=0.5)
    still = layer(num_k_heads=2, num_v_heads=2)
    still.load_state_dict(noisy.state_dict())
    x, rope = torch.randn(2, 40, CONFIG.hidden_size, dtype=torch.float64), embeddings(40, D)
    assert torch.equal(noisy(x, rope)[0], still(x, rope)[0])
    with torch.no_grad():
        for made in (noisy, still):
            made.train()
            made.o_proj.weight.copy_(torch.eye(CONFIG.hidden_size, 6 * D))
        clean = still(x, rope)[0][..., : 4 * D].unflatten(-1, (4, D)).transpose(1, 2).flatten(2)
        taken = clean - noisy(x, rope)[0][..., : 4 * D].unflatten(-1, (4, D)).transpose(1, 2).flatten(2)
    assert float(taken.std()) > 0
    assert_close(taken.mean(-1), 0.5 * clean.mean(-1), 1e-12)
    assert_close(taken.std(-1), 0.5 * clean.std(-1), 1e-12)
    noisy.noise = 0.0
    assert torch.equal(noisy(x, rope)[0], still(x, rope)[0])


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"key_map": [0, 1, 2, 3, 4, 6]}, "key_map"),
        ({"value_map": [0, 1]}, "value_map"),
        ({"num_q_heads": 2, "query_map": [0, 1, 2, 0, 0, 0]}, "query_map"),
        ({"rotary_dim": 7}, "rotary_dim"),
        ({"rotary_dim": 18}, "rotary_dim"),
        ({"biases": ["gate"]}, "biases"),
        ({"window": 0}, "window"),
        ({"num_v_heads": 0}, "num_v_heads"),
    ],
)
def test_numbers_that_do_not_fit_are_named(spec: dict[str, Any], name: str) -> None:
    with pytest.raises(BadArgument, match=name):
        layer(**spec)


def test_dropout_and_foreign_masks_are_refused_under_maps() -> None:
    made = layer(num_k_heads=2, num_v_heads=3)
    x, rope = torch.randn(1, 4, CONFIG.hidden_size, dtype=torch.float64), embeddings(4, D)
    with pytest.raises(Refused, match="sdpa"):
        made(x, rope, object())
    made.attention_dropout = 0.1
    made(x, rope)
    with pytest.raises(Refused, match="dropout"):
        made.train()(x, rope)


# -- presets of sparse query attention -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "query", "kv"),
    [("sqa", 8, 4), ("ssqa", 8, 8), ("xsqa", 4, 4), ("xsmqa", 4, 1), ("lsqa", 12, 4), ("swsqa", 8, 4)],
)
def test_presets_have_the_numbers_and_the_flops_of_the_paper(preset: str, query: int, kv: int) -> None:
    made = layer(**getattr(presets, preset)(16, D))
    dense = layer(num_heads=16, num_k_heads=16, num_v_heads=16)
    assert (made.num_heads, made.num_k_heads, made.num_v_heads, made.head_dim) == (query, kv, kv, D)
    assert dense.flops(100, 300) == 4 * 16 * 100 * 300 * D
    assert dense.flops(100, 300) * query == made.flops(100, 300) * 16
    assert made.holds["store_heads"] * (made.holds["store_k_dim"] + made.holds["store_v_dim"]) == 2 * kv * D
    assert made.grouped
    assert made.sliding_window == (128 if preset == "swsqa" else None)


def test_reverse_shares_queries_and_costs_what_its_keys_cost() -> None:
    made = layer(**presets.rsqa(16, D))
    assert made.q_proj.out_features == 4 * D
    assert made.k_proj.out_features == 8 * D
    assert made.flops(10, 10) == layer(num_heads=8, num_k_heads=8, num_v_heads=8).flops(10, 10)
    # The same as attention of 8 heads whose queries are copies.
    twin = layer(num_heads=8, num_k_heads=8, num_v_heads=8)
    with torch.no_grad():
        twin.q_proj.weight.copy_(made.q_proj.weight.unflatten(0, (4, D)).repeat_interleave(2, 0).flatten(0, 1))
        for name in ("k_proj", "v_proj", "o_proj"):
            getattr(twin, name).load_state_dict(getattr(made, name).state_dict())
    x, rope = torch.randn(1, 9, CONFIG.hidden_size, dtype=torch.float64), embeddings(9, D)
    assert_close(made(x, rope)[0].detach(), twin(x, rope)[0].detach(), 1e-12)


def test_presets_refuse_what_does_not_divide() -> None:
    with pytest.raises(BadArgument, match="heads"):
        presets.sqa(6, D)
    with pytest.raises(BadArgument, match="kv_heads"):
        presets.sparse_query(16, D, 8, 3)
    with pytest.raises(BadArgument, match="query_heads"):
        presets.sparse_query(16, D, 17, 1)


# -- in a model ------------------------------------------------------------------------------------------------------


def mixed(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model and its twin: one layer with heads in another order, one that stores every value head twice."""
    model = family_model(family, kv_heads=2, layers=2, dtype=dtype)
    made = converted.container(model)
    for index, weights in layers_of(model):
        if index == 0:
            order = torch.randperm(8).tolist()
            shuffled = tuple(h // 4 for h in order)
            install(made, index, take(weights, q=order), shuffled, shuffled)
            assert made.model.layers[index].self_attn.grouped
        else:
            weights, value_map = take(weights, v=[0, 0, 1, 1]), [0, 1, 0, 1, 2, 3, 3, 2]
            assert not install(made, index, weights, None, value_map).grouped
    return model, made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_other_maps_is_the_same_model(family: str, tmp_path) -> None:
    model, made = mixed(family)
    ids = torch.randint(3, 250, (2, 17))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=padding).logits[:, 5:]
        assert_close(made(ids, attention_mask=padding).logits[:, 5:], want, 2e-6)
        made.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, made(ids).logits)
    how = {"attention_mask": padding, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = model.generate(ids, **how)
    assert torch.equal(made.generate(ids, **how), text)
    with foveate.apply(made, "dense"):
        assert torch.equal(made.generate(ids, **how), text)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_and_steps_on_one_cache_are_the_whole(family: str) -> None:
    _, made = mixed(family)
    ids = torch.randint(3, 250, (2, 21))
    with torch.no_grad():
        whole = made(ids).logits
        cache, parts = None, []
        for chunk in ids.split([7, 5, 1, 1, 7], dim=1):
            out = made(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert_close(torch.cat(parts, 1), whole, 2e-6)


def test_a_window_of_its_own_is_kept_with_every_cache() -> None:
    model = family_model("llama", kv_heads=2, layers=2)
    made = converted.container(model)
    for index, weights in layers_of(model):
        weights = with_changes(weights, window=4)
        install(made, index, weights, None, None if index else [0, 1] * 4)
    ids = torch.randint(3, 250, (1, 15))
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 250
    with torch.no_grad():
        a, b = made(ids).logits, made(changed).logits
        assert torch.equal(a[:, :3], b[:, :3])
        assert not torch.equal(a[:, 9], b[:, 9])  # two layers see 1 + 3 + 3 tokens
        assert torch.equal(a[:, 10:], b[:, 10:])
        out = made(ids[:, :9], use_cache=True)
        steps = [made(ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(9, 15)]
        assert_close(torch.cat(steps, 1), a[:, 9:], 2e-6)
        with foveate.apply(made, "dense"):
            assert_close(made(ids).logits, a, 2e-6)
            text = made.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(text, made.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None))


def test_caches_hold_what_the_shape_says() -> None:
    _, made = mixed("llama")
    shape = ModelShape.of(made)
    assert [layer.kind for layer in shape.layers] == ["full", "other"]
    ids = torch.randint(3, 250, (2, 17))
    out = made(ids, use_cache=True)
    stock = sum(t.numel() * 4 for x in out.past_key_values.layers for t in (x.keys, x.values))
    assert stock == shape.dense_kv_bytes(17, 2) == 2 * 17 * 4 * 16 * (2 + 2 + 2 + 4)
    assert out.past_key_values.layers[1].keys.shape[1] == 2
    assert out.past_key_values.layers[1].values.shape[1] == 4
    with foveate.apply(made, "dense") as handle:
        cache = handle.cache()
        made(ids, past_key_values=cache, use_cache=True)
        assert cache.nbytes - cache.layers[0].nbytes == 2 * 17 * 4 * 16 * (2 + 4)


def test_methods_manage_layers_with_equal_groups() -> None:
    _, made = mixed("llama")
    ids = torch.randint(3, 250, (1, 200))
    with foveate.apply(made, "snapkv", budget=0.8) as handle:
        cache = handle.cache()
        made.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        lengths = [int(cache.layers[0].store.lengths.max()), cache.layers[1].keys.shape[2]]
    assert lengths[0] < 110 < 200 < lengths[1]


def test_bfloat16_stays_as_near_as_the_model_itself() -> None:
    model, made = mixed("qwen3")
    ids = torch.randint(3, 250, (2, 33))
    with torch.no_grad():
        want = model(ids).logits
        own = float((model.bfloat16()(ids).logits.float() - want).norm() / want.norm())
        ours = float((made.bfloat16()(ids).logits.float() - want).norm() / want.norm())
    assert ours < 1.5 * own + 1e-3


def test_heads_that_nobody_reads_are_left_out() -> None:
    _, weights = next(layers_of(family_model("qwen2", kv_heads=4, layers=1)))
    left, keys, values = ordered(weights, [3, 3, 1, 1, 1, 1, 3, 3], [2, 2, 0, 0, 0, 0, 2, 2])
    assert left.k.shape[0] == left.v.shape[0] == 2
    assert keys == values == (0, 0, 0, 0, 1, 1, 1, 1)
    assert torch.equal(left.k, weights.k[[1, 3]])
    assert torch.equal(left.v, weights.v[[0, 2]])
    assert torch.equal(left.v_bias, weights.v_bias[[0, 2]])
    assert torch.equal(left.o, weights.o[[2, 3, 4, 5, 0, 1, 6, 7]])


# -- keys in fewer dims, and few values ------------------------------------------------------------------------------


def narrow(model: Any, dims: int, **more: Any) -> Any:
    """The model with keys cached as `dims` numbers, in one layer of two with unequal heads."""
    made = converted.container(model)
    modules = {index: layer.self_attn for index, layer in enumerate(made.model.layers)}
    moments = collect(made, modules, [torch.randint(3, 250, (4, 33))])
    for index, weights in layers_of(model):
        value_map = [0, 0, 0, 0, 1, 1, 1, 1] if index else [0, 0, 1, 1, 2, 2, 3, 3]
        values = weights if index else take(weights, v=[0, 0, 1, 1])
        narrowed(made, install(made, index, values, None, value_map, **more), moments[index], dims)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_expanded_when_they_are_read_are_the_keys(family: str, tmp_path) -> None:
    """With as many dims as the keys have: rotated late, behind norms, under padding, in pieces and steps."""
    model = family_model(family, kv_heads=2, layers=2)
    made = narrow(model, D)
    ids = torch.randint(3, 250, (2, 21))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=padding).logits[:, 5:]
        assert_close(made(ids, attention_mask=padding).logits[:, 5:], want, 1e-5)
        cache, parts, end = None, [], 0
        for chunk in ids.split([9, 5, 1, 6], dim=1):
            end += chunk.shape[1]
            positions = (padding.cumsum(-1) - 1).clamp_min(0)[:, end - chunk.shape[1] : end]
            out = made(chunk, attention_mask=padding[:, :end], position_ids=positions, past_key_values=cache,
                       use_cache=True)  # fmt: skip
            cache = out.past_key_values
            parts.append(out.logits)
        assert_close(torch.cat(parts, 1)[:, 5:], want, 1e-5)
        made.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, made(ids).logits)


@pytest.mark.parametrize("rope", ["yarn", "llama3"])
def test_late_rotation_knows_scaled_frequencies(rope: str) -> None:
    """Their factor included, which YaRN puts on queries and keys."""
    numbers = {"yarn": {}, "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}[rope]
    scaled = {"rope_type": rope, "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    model = family_model("llama", kv_heads=2, rope_parameters=scaled | numbers)
    ids = torch.randint(3, 250, (1, 21))
    with torch.no_grad():
        assert_close(narrow(model, D)(ids).logits, model(ids).logits, 1e-5)


def test_lengths_that_angles_depend_on_are_refused() -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    model = family_model("llama", kv_heads=2, rope_parameters=scaled)
    with pytest.raises(Refused, match="dynamic"):
        narrow(model, 8)(torch.arange(3, 9)[None])


def test_narrow_keys_are_what_their_matrix_makes_of_them() -> None:
    """The layer with fewer dims is the plain one whose keys are the product; the cache holds the dims alone."""
    model = family_model("llama", kv_heads=2, layers=2)
    made = narrow(model, 6)
    twin = converted.container(model)
    for index, weights in layers_of(model):
        slim = made.model.layers[index].self_attn
        product = slim.k_up.double() @ slim.k_proj.weight.double().unflatten(0, (2, 6))
        values = weights if index else take(weights, v=[0, 0, 1, 1])
        install(twin, index, with_changes(values, k=product), slim.key_map, slim.value_map)
    ids = torch.randint(3, 250, (2, 17))
    with torch.no_grad():
        out = made(ids, use_cache=True)
        assert_close(out.logits, twin(ids).logits, 1e-5)
        assert not torch.allclose(out.logits, model(ids).logits, atol=0.1)
    assert [x.keys.shape for x in out.past_key_values.layers] == [(2, 2, 17, 6)] * 2
    held = sum(t.numel() * 4 for x in out.past_key_values.layers for t in (x.keys, x.values))
    assert held == ModelShape.of(made).dense_kv_bytes(17, 2) == 2 * 17 * 4 * (2 * (6 + 6) + D * (4 + 2))


def test_the_values_of_all_keys_are_all_values() -> None:
    model = family_model("llama", kv_heads=2, layers=2)
    ids = torch.randint(3, 250, (2, 17))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    how = {"attention_mask": padding, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    want, outs = torch.stack(model.generate(ids, **how).logits), {}
    for count in (4, 25, 26):
        made = narrow(model, D, top_values=count)
        outs[count] = torch.stack(made.generate(ids, **how).logits)
    # The last step reads 25 keys: 25 of them go the plain way, 26 as well, and 4 are too few.
    assert_close(outs[25], want, 1e-5)
    assert_close(outs[26], want, 1e-5)
    assert not torch.allclose(outs[4][1], want[1], atol=1e-2)


@pytest.mark.parametrize("spec", [{}, {"softcap": 2.0}, {"sliding_window": 9}], ids=["plain", "capped", "window"])
def test_a_step_reads_the_values_of_the_highest_scores_alone(spec: dict[str, Any]) -> None:
    """Softmax over the best keys of each head; all other values may be anything."""
    made = layer(num_k_heads=2, num_v_heads=3, top_values=4, softcap=spec.get("softcap"),
                 window=spec.get("sliding_window"))  # fmt: skip
    q, k, v = (torch.randn(2, heads, n, D, dtype=torch.float64) for heads, n in ((6, 1), (2, 15), (3, 15)))
    want = torch.zeros(2, 1, 6, D, dtype=torch.float64)
    poisoned = torch.full_like(v, torch.nan)
    for row in range(2):
        for head in range(6):
            scores = k[row, made.key_map[head]] @ q[row, head, 0] * made.scaling
            if made.softcap is not None:
                scores = made.softcap * torch.tanh(scores / made.softcap)
            scores[: 15 - (made.sliding_window or 15)] = -torch.inf
            best, slots = scores.topk(4)
            want[row, 0, head] = best.softmax(0) @ v[row, made.value_map[head], slots]
            poisoned[row, made.value_map[head], slots] = v[row, made.value_map[head], slots]
    assert_close(made._mapped(q, k, poisoned, None, {}), want, 1e-12)


def test_costs_of_narrow_keys_and_few_values() -> None:
    plain = layer(num_k_heads=2, num_v_heads=3)
    narrow_keys = layer(num_k_heads=2, num_v_heads=3, k_dim=4, top_values=10)
    assert plain.flops(1, 100) == 2 * 6 * 100 * 2 * D
    assert narrow_keys.flops(1, 100) == 2 * (6 * (100 + 10) * D + 2 * 100 * D * 4)
    assert narrow_keys.flops(7, 100) - plain.flops(7, 100) == 2 * 2 * 100 * D * 4
    assert narrow_keys.holds["kind"] == "other" and layer(num_k_heads=2, num_v_heads=2, top_values=3).grouped is False
