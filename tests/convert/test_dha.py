"""DHA: which heads become one, layer by layer, and that only what must change changes."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.convert.head_checks import check_model, converted_by
from tests.convert.test_diffqkv import repeat_heads
from tests.families import FAMILIES, family_model
from torch import nn

from foveate.convert.base import conversion
from foveate.convert.surgery.head_fusion import Fusion
from foveate.errors import BadArgument
from foveate.models.converted import decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_left_is_the_model_itself(family: str) -> None:
    done = converted_by(conversion("dha", kv=1.0), family_model(family, kv_heads=4), 4)
    assert [rung.exact for rung in done.ladder] == [True] * len(done.ladder)
    assert done.ladder[-1].error <= 1e-5 and done.ladder[-1].share == 1


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_and_the_model_works(family: str, steps: int, tmp_path) -> None:
    model = family_model(family, kv_heads=4)
    done = converted_by(conversion("dha", kv=0.5, steps=steps), model)
    facts = done.ladder[1].facts
    layers = len(decoder_layers(model))
    assert sum(facts["k_heads"]) + sum(facts["v_heads"]) == layers * 4
    assert min(facts["k_heads"] + facts["v_heads"]) >= 1
    held = [layer.self_attn for layer in decoder_layers(done.model)]
    assert [module.num_k_heads for module in held] == facts["k_heads"]
    assert [module.num_v_heads for module in held] == facts["v_heads"]
    assert done.ladder[-1].share == 0.5
    check_model(done.model, tmp_path)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "mistral"])
def test_heads_that_coincide_are_fused_without_loss(family: str, turn: bool) -> None:
    """Copies, and copies behind turns that W_q and W_o take back."""
    model = family_model(family, kv_heads=4, dtype=torch.float64)
    repeat_heads(model, 2, turn)
    done = converted_by(conversion("dha", kv=0.5, refit=False), model)
    assert done.ladder[-1].share == 0.5
    assert done.ladder[-1].error <= 1e-8


def test_mean_pooling_is_the_plain_case() -> None:
    model = family_model("llama", kv_heads=4, dtype=torch.float64)
    done = converted_by(conversion("dha", kv=0.5, aligned=False, refit=False), model)
    for before, after in zip(decoder_layers(model), decoder_layers(done.model), strict=True):
        old, module = read_heads(before.self_attn), after.self_attn
        width = old.k.shape[1]
        for name, rows, own, mapped in (
            ("k", module.k_proj.weight, old.k, module.key_map),
            ("v", module.v_proj.weight, old.v, module.value_map),
        ):
            new = rows.detach().unflatten(0, (-1, width))
            # Query heads may have been put into another order: each group of old heads is one that some new head is.
            means = {tuple(group): own[list(group)].mean(0) for group in _subsets(len(own))}
            for head in new:
                assert any(torch.allclose(head, mean, atol=1e-12) for mean in means.values()), name
            assert len(new) == max(mapped) + 1


def _subsets(count: int) -> list[list[int]]:
    return [[j for j in range(count) if bits >> j & 1] for bits in range(1, 1 << count)]


def test_aligning_and_solving_lose_less_than_mean_pooling() -> None:
    model = family_model("llama", kv_heads=8)
    plain = converted_by(conversion("dha", kv=0.5, aligned=False, refit=False), model).ladder[-1]
    best = converted_by(conversion("dha", kv=0.5), model).ladder[-1]
    assert best.error < 0.9 * plain.error


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_learned_fusion_is_exact_where_it_says_so(family: str) -> None:
    """The driver measures each stage: heads turned alike change nothing, and after training the compact model is the
    fused one."""
    done = converted_by(conversion("dha", kv=0.5, steps=6, refit=False), family_model(family, kv_heads=4))
    by = {rung.stage: rung for rung in done.ladder}
    assert by["heads turned towards each other"].error <= 1e-5
    fused, compact = by["heads fused"], by["one head for each group"]
    assert compact.exact and abs(compact.error - fused.error) <= 1e-5
    first, last = fused.facts["fusion_loss"]
    assert first > 0 and last < first


@pytest.mark.parametrize("bias", [False, True])
def test_a_fusion_starts_as_the_projection_and_ends_as_one_head_a_group(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4 * 3, bias=bias)
    x, before = torch.randn(5, 6), linear.weight.detach().clone()
    want = linear(x).detach()
    fusion = Fusion(linear, [[0, 2], [1], [3]], torch.rand(4, 3) + 0.1)
    assert_close(linear(x).detach(), want, 1e-6)
    assert fusion.loss().item() > 0
    fusion.finish()
    heads = linear.weight.detach().unflatten(0, (4, 3))
    assert torch.equal(heads[0], heads[2])
    assert_close(heads[[1, 3]], before.unflatten(0, (4, 3))[[1, 3]], 1e-6)


def test_heads_that_coincide_have_no_fusion_loss() -> None:
    linear = nn.Linear(6, 4 * 3, bias=False)
    with torch.no_grad():
        linear.weight.view(4, 3, 6)[2] = linear.weight.view(4, 3, 6)[0]
    costs = torch.rand(4, 3) + 0.1
    assert Fusion(linear, [[0, 2], [1], [3]], costs).loss().item() < 1e-12


def test_numbers_that_do_not_fit() -> None:
    model = family_model("llama", kv_heads=4)
    shape = ModelShape.of(model)
    for settings, words in (({"kv": 0.1}, "0.25"), ({"kv": 1.5}, "up to 1"), ({"steps": -1}, "steps")):
        with pytest.raises(BadArgument, match=words):
            conversion("dha", **settings).check(model, shape)
