"""Key-driven GQA: how query heads are dealt out, and what the converted layer then computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_close
from tests.convert.head_checks import check_model, converted_by, text
from tests.families import FAMILIES, family_model

from foveate.convert.base import Calibration, conversion
from foveate.convert.key_driven_gqa import RULES, dynamics, key_sizes, pooled, shares
from foveate.convert.surgery.head_maps import install, layers_of
from foveate.errors import BadArgument, Refused
from foveate.layers.head_mapped import HeadMappedAttention
from foveate.models.converted import container, decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads, write_heads


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=9), st.integers(1, 64))
def test_all_query_heads_are_dealt_out(strength: list[float], heads: int) -> None:
    dealt = shares(torch.tensor(strength, dtype=torch.float64), heads)
    assert sum(dealt) == heads
    assert all(count >= 0 for count in dealt)


def test_equal_strengths_make_equal_groups_and_others_follow_them() -> None:
    assert shares(torch.full((4,), 0.37), 8) == [2, 2, 2, 2]
    assert shares(torch.zeros(4), 8) == [2, 2, 2, 2]
    assert shares(torch.tensor([0.0, 1.0, 3.0]), 8) == [0, 2, 6]
    assert shares(torch.tensor([1.0, 1.0, 1.1]), 8) == [3, 2, 3]


def test_dynamics_are_those_of_the_paper() -> None:
    sizes = torch.rand(5, 3, dtype=torch.float64)
    remembered = sizes[0]
    for start in (0, 2, 4):
        seen = sizes[start : start + 2].sum(0)
        diff, ema = (remembered - seen).abs(), 0.9 * seen + 0.1 * remembered
        remembered = (remembered + seen) / 2
    assert_close(dynamics(sizes, "dgqa-diff", 2), diff, 1e-12)
    assert_close(dynamics(sizes, "dgqa-ema", 2), ema, 1e-12)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi"])
def test_sizes_are_norms_of_the_keys(family: str) -> None:
    model = family_model(family, kv_heads=4)
    tokens = text(4, 9)
    weights = {index: pooled(layer, 2) for index, layer in layers_of(model)}
    sizes = key_sizes(model, weights, Calibration(tokens, batch=2))
    made = container(model)
    for index, layer in weights.items():
        install(made, index, layer)
    # The first layer reads the same in both, and a rotation keeps norms.
    cache = made(tokens[:2], use_cache=True).past_key_values
    want = cache.layers[0].keys.detach().double().square().sum((0, 2, 3)).sqrt()
    assert sizes[0].shape == (2, 2)
    assert_close(sizes[0][0], want, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_groups_and_all_heads_are_mha(family: str) -> None:
    done = converted_by(conversion("key-driven-gqa", rule="pgqa", kv_heads=8), family_model(family, kv_heads=8), 4)
    assert done.ladder[-1].exact
    assert done.ladder[-1].error <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_heads_that_are_equal_loses_nothing(family: str) -> None:
    model = family_model(family, kv_heads=8)
    for layer in decoder_layers(model):
        weights = read_heads(layer.self_attn)
        for name in ("k", "v", "k_bias", "v_bias"):
            rows = getattr(weights, name)
            if rows is not None:
                rows[1::2] = rows[::2]
        write_heads(layer.self_attn, weights)
    done = converted_by(conversion("key-driven-gqa", rule="pgqa"), model, 4)
    assert done.ladder[-1].share == 0.5
    assert done.ladder[-1].error <= 1e-5
    assert decoder_layers(done.model)[0].self_attn.noise == 1.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_converted_models_hold_together(family: str, rule: str, tmp_path) -> None:
    done = converted_by(conversion("key-driven-gqa", rule=rule), family_model(family, kv_heads=8), 8)
    groups = done.ladder[-1].facts["groups"]
    assert [sum(counts) for counts in groups] == [8, 8]
    for layer, counts in zip(decoder_layers(done.model), groups, strict=True):
        made = layer.self_attn
        assert isinstance(made, HeadMappedAttention)
        used = [count for count in counts if count]
        assert [made.key_map.count(j) for j in range(made.num_k_heads)] == used
        assert made.key_map == made.value_map == tuple(sorted(made.key_map))
    if rule == "kdgqa":
        assert all(min(counts) == 0 for counts in groups)  # the weakest head is always starved
        assert done.ladder[-1].share < 0.5
    check_model(done.model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"rule": "gqa"}, "rule"), ({"kv_heads": 3}, "kv_heads"), ({"kv": 0.1}, "kv"), ({"window": 0}, "window")],
)
def test_settings_that_do_not_fit_are_named(settings: dict, name: str) -> None:
    model = family_model("llama", kv_heads=8)
    with pytest.raises(BadArgument, match=name):
        conversion("key-driven-gqa", **settings).check(model, ModelShape.of(model))


def test_latent_models_are_refused() -> None:
    model = family_model("deepseek-v3")
    with pytest.raises(Refused, match="latent"):
        conversion("key-driven-gqa").check(model, ModelShape.of(model))
