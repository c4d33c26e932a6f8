"""MergeLock: the same function, weights far away, merging that fails, and a seed that undoes it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.convert.skills import Recall, trained, untrained
from tests.families import FAMILIES, LATENT, family_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import foveate
from foveate.compat import output_projection
from foveate.convert.base import Calibration, conversion
from foveate.convert.merge_lock import MergeLock, merge_lock, unlock
from foveate.convert.run import convert
from foveate.convert.surgery.keyed_matrices import KeyedMatrices
from foveate.errors import BadArgument, Refused
from foveate.models.converted import container, decoder_layers
from foveate.models.converted import replace as replace_layer
from foveate.models.weights import read_heads, write_heads

EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


def tokens(seed: int, rows: int = 2, length: int = 23) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def locked(model: Any, seed: int = 5, **numbers: Any) -> Any:
    out = copy.deepcopy(model)
    merge_lock(out, seed, **numbers)
    return out


def averaged(*models: Any) -> Any:
    out = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, value in out.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.stack([m.state_dict()[name] for m in models]).mean(0))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "kv_heads"), [*((f, 2) for f in FAMILIES), ("llama", 1), ("llama", 8), ("phi3", 4)])
def test_logits_stay_and_all_weights_of_the_branches_move(family, kv_heads, dtype, seed):
    model = family_model(family, kv_heads=kv_heads, seed=seed, dtype=dtype)
    there = locked(model, seed)
    # Norms, and rotations in transformers, are float32 whatever the model is; the lock moves only what is around them.
    limit = 1e-6 if dtype is torch.float64 and family in ("qwen3", "gemma3") else EXACT[dtype]
    assert_close(logits(there, tokens(seed)), logits(model, tokens(seed)), limit)
    normed = family in ("qwen3", "gemma3")
    for old, new in zip(decoder_layers(model), decoder_layers(there), strict=True):
        before, after = read_heads(old.self_attn), read_heads(new.self_attn)
        for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias"):
            x, y = getattr(before, name), getattr(after, name)
            if x is not None:
                assert (relative_rms(y, x) > 0.3) == (name in ("v", "o", "v_bias") or not normed), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek-v2", {}),
        ("deepseek-v2", {"q_lora_rank": 24}),
        ("deepseek-v3", {}),
        ("deepseek-v3", {"rope_interleave": False}),
    ],
)
def test_latent_attention_is_locked_around_its_latent(family, changes, dtype, seed):
    model = family_model(family, seed=seed, dtype=dtype, **changes)
    there = locked(model, seed)
    limit = 1e-6 if family == "deepseek-v2" and dtype is torch.float64 else EXACT[dtype]  # which rotates in float32
    assert_close(logits(there, tokens(seed)), logits(model, tokens(seed)), limit)
    old, new = decoder_layers(model)[0].self_attn, decoder_layers(there)[0].self_attn
    for name in ("kv_b_proj", "o_proj", "q_proj" if model.config.q_lora_rank is None else "q_b_proj"):
        assert relative_rms(getattr(new, name).weight, getattr(old, name).weight) > 0.3
    rank = model.config.kv_lora_rank
    x, y = old.kv_a_proj_with_mqa.weight, new.kv_a_proj_with_mqa.weight
    assert torch.equal(x[:rank], y[:rank]) and relative_rms(y[rank:], x[rank:]) > 0.3


def test_latent_layers_of_converted_models_are_locked_and_others_refused(seed):
    model: Any = container(family_model("llama", seed=seed))
    for layer in range(2):
        spec = {"num_heads": 4, "rank": 12, "rope_dim": 4, "nope_dim": 5, "v_dim": 7, "biases": ["q_proj"]}
        replace_layer(model, layer, "latent", **spec, norm="none")
    for parameter in model.double().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    there = locked(model, seed)
    assert_close(logits(there, tokens(seed)), logits(model, tokens(seed)), 1e-10)
    assert relative_rms(there.lm_head.weight, model.lm_head.weight) == 0
    first = decoder_layers(model)[0].self_attn
    first.__class__ = type("Other", (type(first),), {"expand_kv": property()})
    with pytest.raises(Refused, match="layer 0 was converted to latent"):
        merge_lock(model, 1)


@pytest.mark.parametrize("family", [*FAMILIES, *LATENT])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_unlock_undoes_lock(family, dtype, limit, seed):
    model = family_model(family, seed=seed, dtype=dtype)
    there = locked(model, seed)
    unlock(there, seed)
    for name, value in model.state_dict().items():
        assert_close(there.state_dict()[name], value, limit)
    other = locked(model, seed)
    unlock(other, seed + 1)
    outputs = [output_projection(decoder_layers(m)[1].self_attn) for m in (other, model)]
    assert relative_rms(outputs[0].weight, outputs[1].weight) > 0.3


def test_bf16_stays_close(seed):
    model = family_model("llama", seed=seed)
    ids = tokens(seed)
    want = logits(model, ids)
    plain = relative_rms(logits(copy.deepcopy(model).bfloat16(), ids), want)
    assert relative_rms(logits(locked(model, seed).bfloat16(), ids), want) < 3 * plain


def test_a_generic_matrix_breaks_rotated_heads_and_not_what_is_behind_the_rotation(seed):
    """Why pairs are only turned and scaled: in the model, positions stand between the two factors."""
    model = family_model("phi", seed=seed, dtype=torch.float64)
    ids = tokens(seed)
    for first, last, holds in ((0, 8, False), (8, 16, True)):
        there = copy.deepcopy(model)
        for layer in decoder_layers(there):
            w = read_heads(layer.self_attn)
            a = torch.eye(16, dtype=torch.float64)
            a[first:last, first:last] = KeyedMatrices("generic", 4.0, False).invertible("a", last - first)
            inverse = torch.linalg.inv(a).T
            w = replace(w, k=a @ w.k, q=inverse @ w.q, k_bias=w.k_bias @ a.T, q_bias=w.q_bias @ inverse.T)
            write_heads(layer.self_attn, w)
        error = relative_rms(logits(there, ids), logits(model, ids))
        assert error < 1e-10 if holds else error > 0.1


def test_models_locked_alike_still_merge_and_others_do_not(seed):
    base = family_model("qwen2", seed=seed, dtype=torch.float64)
    ids = tokens(seed)
    a, b = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        for model in (a, b):
            for parameter in model.parameters():
                parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    want = logits(averaged(a, b), ids)
    assert_close(logits(averaged(locked(a, 7), locked(b, 7)), ids), want, 1e-10)
    assert relative_rms(logits(averaged(locked(a, 7), locked(b, 8)), ids), want) > 0.5


def test_two_trained_siblings_merge_and_a_locked_one_does_not():
    skills = [Recall(3), Recall(5)]
    base, _ = trained(untrained(), skills, 130, 3e-3, 0)
    siblings = [trained(base, [skill], 20, 1e-3, 1)[0] for skill in skills]

    def loss(model: Any) -> float:
        return sum(skill.loss(model) for skill in skills) / 2

    plain = loss(averaged(*siblings))
    assert plain < 0.1
    assert skills[0].loss(locked(siblings[0])) == pytest.approx(skills[0].loss(siblings[0]), rel=1e-3)
    for key in range(3):
        there = locked(siblings[0], key)
        assert loss(averaged(there, siblings[1])) > max(10 * plain, 1.0)
        unlock(there, key)
        assert loss(averaged(there, siblings[1])) == pytest.approx(plain, rel=1e-3)


def test_the_condition_bounds_every_matrix(seed):
    for condition in (1.5, 4.0, 50.0):
        draw = KeyedMatrices(str(seed), condition, False)
        for label in "abcdef":
            for matrix in (draw.invertible(label, 9), draw.turns(label, 12)):
                assert torch.linalg.cond(matrix) <= condition * (1 + 1e-9)
        # and uses the room it has
        assert max(torch.linalg.cond(draw.invertible(label, 9)) for label in "abcdef") >= condition**0.5
    assert torch.linalg.cond(KeyedMatrices("", 1.0, False).invertible("", 7)) == pytest.approx(1)


def test_matrices_follow_from_key_and_label_alone():
    first = KeyedMatrices("7/0", 4.0, False)
    assert torch.equal(first.invertible("0", 5), KeyedMatrices("7/0", 4.0, False).invertible("0", 5))
    assert relative_rms(first.invertible("1", 5), first.invertible("0", 5)) > 0.3
    assert relative_rms(KeyedMatrices("7/1", 4.0, False).invertible("0", 5), first.invertible("0", 5)) > 0.3
    product = first.invertible("0", 5) @ KeyedMatrices("7/0", 4.0, True).invertible("0", 5)
    torch.testing.assert_close(product, torch.eye(5, dtype=torch.float64))
    # A seed means the same on every machine and for all time.
    assert first.uniform("x", 3).tolist() == [0.7272924637654796, 0.5321798621444032, 0.22199287277180701]


def test_turns_commute_with_every_rotation(seed):
    turn = KeyedMatrices(str(seed), 4.0, False).turns("a", 10)
    angle = torch.randn(5, dtype=torch.float64)
    c, s = torch.diag(angle.cos()), torch.diag(angle.sin())
    rotation = torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)], 0)
    torch.testing.assert_close(turn @ rotation, rotation @ turn)


@pytest.mark.parametrize(("family", "stages"), [("llama", 2), ("qwen3", 1), ("deepseek-v3", 2)])
def test_as_a_conversion_it_is_exact_and_keeps_its_seed_to_itself(family, stages, seed, tmp_path):
    model = family_model(family, seed=seed)
    ids = tokens(seed)
    step = conversion("mergelock", seed=12345, condition=2.0)
    done = convert(model, step, Calibration(ids), ids)
    assert len(done.ladder) == 1 + stages
    assert all(rung.exact and rung.error < 1e-5 and rung.share == 1 for rung in done.ladder)
    assert all(min(rung.facts["moved"]) > 0.3 and len(rung.facts["moved"]) == 2 for rung in done.ladder[1:])
    assert step.settings() == {"condition": 2.0, "unlock": False}
    assert "12345" not in str([rung.json() for rung in done.ladder])
    done.model.save_pretrained(tmp_path)
    assert not any(b"12345" in path.read_bytes() for path in tmp_path.glob("*.json"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(done.model, ids))
    back = convert(again, conversion("mergelock", seed=12345, condition=2.0, unlock=True), Calibration(ids), ids)
    for name, value in model.state_dict().items():
        assert_close(back.model.state_dict()[name], value, 1e-6)


def test_a_locked_model_generates_and_takes_methods(seed):
    model = family_model("llama", seed=seed)
    there = locked(model, seed)
    ids = tokens(seed, rows=1)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(there.generate(ids, max_new_tokens=6, do_sample=False), want)
    with foveate.apply(there, "dense"):
        assert torch.equal(there.generate(ids, max_new_tokens=6, do_sample=False), want)


def test_what_cannot_be_locked_is_refused_and_left_alone():
    ids = tokens(0)
    model = family_model("llama")
    for settings, name in (({}, "seed"), ({"seed": 1, "condition": 0.5}, "condition")):
        with pytest.raises(BadArgument, match=name):
            convert(model, MergeLock(**settings), Calibration(ids), ids)
    phi = family_model("phi", qk_layernorm=True)
    before = {name: value.clone() for name, value in phi.state_dict().items()}
    with pytest.raises(Refused, match="mean"):
        merge_lock(phi, 1)
    assert all(torch.equal(value, before[name]) for name, value in phi.state_dict().items())
