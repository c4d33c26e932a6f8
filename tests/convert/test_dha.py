"""DHA: which heads become one, layer by layer, and that only what must change changes."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.convert.head_checks import check_model, converted_by, text
from tests.convert.test_diffqkv import repeat_heads
from tests.families import FAMILIES, family_model
from torch import nn

from foveate.convert.base import Calibration, conversion
from foveate.convert.run import convert
from foveate.convert.surgery import head_fusion
from foveate.convert.surgery.head_fusion import Common, Fusion
from foveate.errors import BadArgument
from foveate.models.converted import decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_left_is_the_model_itself(family: str) -> None:
    done = converted_by(conversion("dha", kv=1.0), family_model(family, kv_heads=4), 4)
    assert [rung.exact for rung in done.ladder] == [True] * len(done.ladder)
    assert done.ladder[-1].error <= 1e-5 and done.ladder[-1].share == 1


@pytest.mark.parametrize(("family", "steps"), [*((f, 0) for f in FAMILIES), ("gemma3", 3), ("phi3", 3)])
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


@pytest.mark.parametrize(
    ("family", "turn", "steps"),
    [*((f, t, 0) for f in ("llama", "qwen2", "phi", "mistral") for t in (False, True)), ("qwen2", True, 20)],
)
def test_heads_that_coincide_are_fused_without_loss(family: str, turn: bool, steps: int) -> None:
    """Copies, and copies behind turns that W_q and W_o take back."""
    model = family_model(family, kv_heads=4, dtype=torch.float64)
    repeat_heads(model, 2, turn)
    done = converted_by(conversion("dha", kv=0.5, steps=steps, refit=False), model)
    assert done.ladder[-1].share == 0.5
    assert done.ladder[-1].error <= 1e-8


def test_mean_pooling_is_the_plain_case() -> None:
    model = family_model("llama", kv_heads=4, dtype=torch.float64)
    done = converted_by(conversion("dha", kv=0.5, steps=0, aligned=False, refit=False), model)
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
    plain = converted_by(conversion("dha", kv=0.5, steps=0, aligned=False, refit=False), model).ladder[-1]
    best = converted_by(conversion("dha", kv=0.5, steps=0), model).ladder[-1]
    assert best.error < 0.9 * plain.error


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi"])
def test_learned_fusion_is_exact_where_it_says_so(family: str) -> None:
    """The driver measures each stage: after training the compact model is the fused one."""
    done = converted_by(conversion("dha", kv=0.5, steps=12, refit=False), family_model(family, kv_heads=4), 8)
    assert done.ladder[-1].share == 0.5
    by = {rung.stage: rung for rung in done.ladder}
    fused, compact = by["heads fused"], by["one head for each group"]
    assert compact.exact and abs(compact.error - fused.error) <= 1e-5
    assert all(first > 0 for first, _ in fused.facts["fusion_loss"])
    before, after = (sum(part) for part in zip(*fused.facts["missed"], strict=True))
    assert after < before


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_untrained_fusion_is_merging_at_once(family: str, aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Driven all the way without a step, the combinations are the heads that `steps=0` computes, biases included."""
    model = family_model(family, kv_heads=4, dtype=torch.float64)
    calibration = Calibration(text(8), batch=4)
    at_once = convert(model, conversion("dha", kv=0.5, steps=0, refit=False, aligned=aligned), calibration, text(1))
    monkeypatch.setattr(head_fusion, "_NOTHING", 1.0)
    driven = convert(model, conversion("dha", kv=0.5, steps=1, refit=False, aligned=aligned), calibration, text(1))
    ids = text(2, 21)
    with torch.no_grad():
        want = at_once.model(ids).logits
        assert_close(driven.model(ids).logits, want, 1e-7)
        assert not torch.allclose(want, model(ids).logits, atol=1e-2)


def test_learned_fusion_is_nearer_on_other_text() -> None:
    """Than heads merged at once, with output matrices solved for anew in both."""
    torch.manual_seed(0)
    model = family_model("llama", heads=4, kv_heads=4)
    calibration, probe = Calibration(text(96), batch=32), text(8)
    kl = [convert(model, conversion("dha", kv=0.5, steps=n), calibration, probe).ladder[-1].kl for n in (0, 192)]
    assert kl[1] < 0.98 * kl[0]  # a random model has little structure to learn


def _groups(linear: nn.Linear, groups: list[list[int]], dim: int) -> list[Common]:
    """Means of groups, and what turned the heads before they were taken."""
    made = []
    for group in groups:
        turns = torch.linalg.qr(torch.randn(len(group), dim, dim)).Q
        made.append(Common(group, turns.mT / len(group), turns))
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_a_fusion_starts_as_the_projection_and_ends_as_one_head_a_group(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4 * 3, bias=bias)
    x, before = torch.randn(5, 6), linear.weight.detach().clone().unflatten(0, (4, 3))
    want = linear(x).detach()
    groups = _groups(linear, [[0, 2], [1], [3]], 3)
    fusion = Fusion(linear, groups)
    assert_close(linear(x).detach(), want, 1e-6)
    assert fusion.loss().item() > 0
    shared, shared_bias = fusion.finish()
    heads = linear.weight.detach().unflatten(0, (4, 3))
    common = sum(t @ before[j] for t, j in zip(groups[0].take, (0, 2), strict=True))
    assert_close(shared[0], common, 1e-6)
    assert torch.equal(shared[0], shared[2]) and (shared_bias is None) == (not bias)
    for give, j in zip(groups[0].give, (0, 2), strict=True):
        assert_close(heads[j], give @ common, 1e-6)
        if bias and shared_bias is not None:
            assert_close(linear.bias.detach().unflatten(0, (4, 3))[j], give @ shared_bias[j], 1e-6)
    assert_close(heads[[1, 3]], before[[1, 3]], 1e-6)


def test_heads_that_coincide_have_no_fusion_loss() -> None:
    """Behind the turns that are given: one is what the other's turn makes of it."""
    linear = nn.Linear(6, 4 * 3, bias=False)
    groups = _groups(linear, [[0, 2], [1], [3]], 3)
    with torch.no_grad():
        heads = linear.weight.view(4, 3, 6)
        heads[2] = groups[0].give[1] @ groups[0].give[0].mT @ heads[0]
    assert Fusion(linear, groups).loss().item() < 1e-12
    with torch.no_grad():
        linear = nn.Linear(6, 4 * 3, bias=False)
    assert Fusion(linear, groups).loss().item() > 1e-2


def test_numbers_that_do_not_fit() -> None:
    model = family_model("llama", kv_heads=4)
    shape = ModelShape.of(model)
    for settings, words in (({"kv": 0.1}, "0.25"), ({"kv": 1.5}, "up to 1"), ({"steps": -1}, "steps")):
        with pytest.raises(BadArgument, match=words):
            conversion("dha", **settings).check(model, shape)
