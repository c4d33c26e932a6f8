"""DiffQKV from a checkpoint: fewer key than value heads, queries through two matrices."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.convert.head_checks import check_model, converted_by, text
from tests.families import FAMILIES, family_model

from foveate.convert.base import conversion
from foveate.convert.diffqkv import DiffQKV
from foveate.errors import BadArgument, Refused
from foveate.models.converted import decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import HeadWeights, read_heads, write_heads


def repeat_heads(model, heads: int, turn: bool = False) -> None:
    """Make the key and value heads of each layer copies of the first `heads`; if wanted, differently turned ones."""
    for layer in decoder_layers(model):
        weights: HeadWeights = read_heads(layer.self_attn)
        count, group = len(weights.k), weights.groups
        half = weights.rotary_dim // 2
        for j in range(count):
            source = j * heads // count
            for name in ("k", "v", "k_bias", "v_bias"):
                rows = getattr(weights, name)
                if rows is not None:
                    rows[j] = rows[source * (count // heads)]
            if turn and j != source * (count // heads):
                angle, size = torch.rand(half, dtype=torch.float64) * 6, torch.rand(half, dtype=torch.float64) + 0.5
                real, imag = size * angle.cos(), size * angle.sin()
                for rows in [weights.k[j]] + ([] if weights.k_bias is None else [weights.k_bias[j][:, None]]):
                    a, b = rows[:half].clone(), rows[half : 2 * half].clone()
                    rows[:half] = real[:, None] * a - imag[:, None] * b
                    rows[half : 2 * half] = imag[:, None] * a + real[:, None] * b
                mix = torch.randn(weights.v.shape[1], weights.v.shape[1], dtype=torch.float64)
                weights.v[j] = mix @ weights.v[j]
                if weights.v_bias is not None:
                    weights.v_bias[j] = mix @ weights.v_bias[j]
                rest = weights.k[j][2 * half :]
                if len(rest):
                    mix = torch.randn(len(rest), len(rest), dtype=torch.float64)
                    rest.copy_(mix @ rest)
                    if weights.k_bias is not None:
                        weights.k_bias[j][2 * half :] = mix @ weights.k_bias[j][2 * half :]
        assert group >= 1
        write_heads(layer.self_attn, weights)


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_numbers_are_the_model_itself(family: str, kv_heads: int) -> None:
    done = converted_by(conversion("diffqkv", kv=1.0), family_model(family, kv_heads=kv_heads), 4)
    assert done.ladder[-1].exact
    assert done.ladder[-1].error <= 1e-5
    assert len(done.ladder) == 2


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("qwen3", "gemma3")])
def test_heads_that_differ_by_what_queries_and_outputs_can_undo_cost_nothing(family: str) -> None:
    """Keys turned and scaled pair by pair, values under any matrix: merging undoes it."""
    model = family_model(family, kv_heads=8).double()
    repeat_heads(model, 2, turn=True)
    done = converted_by(conversion("diffqkv", k_heads=2, v_heads=4, refit=False), model, 8)
    assert done.ladder[-1].error <= 1e-6
    assert done.ladder[-1].share == 6 / 16
    plain = converted_by(conversion("diffqkv", k_heads=2, v_heads=4, refit=False, aligned=False), model, 8)
    assert plain.ladder[-1].error > 0.1


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_behind_norms_equal_heads_cost_nothing_be_they_of_any_size(family: str) -> None:
    model = family_model(family, kv_heads=8)
    repeat_heads(model, 2)
    for layer in decoder_layers(model):
        weights = read_heads(layer.self_attn)
        weights.k *= torch.rand(8, 1, 1) * 30 + 20
        write_heads(layer.self_attn, weights)
    done = converted_by(conversion("diffqkv", k_heads=2, v_heads=2, refit=False), model, 8)
    assert done.ladder[-1].error <= 2e-5  # the norm's epsilon sees sizes


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_maps_follow_the_formula_whether_it_divides_or_not(count: int) -> None:
    done = converted_by(conversion("diffqkv", k_heads=count, v_heads=8, refit=False), family_model("llama", kv_heads=8))
    made = decoder_layers(done.model)[0].self_attn
    assert made.key_map == tuple(h * count // 8 for h in range(8))
    assert made.value_map == tuple(range(8))
    assert done.ladder[-1].kv_bytes == 2 * (count + 8) * 16 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_fewer_keys_hold_together(family: str, tmp_path) -> None:
    done = converted_by(conversion("diffqkv", k_heads=1, v_heads=3, query_width=160), family_model(family, kv_heads=4))
    names = [(rung.stage, rung.exact) for rung in done.ladder[1:]]
    assert names == [
        ("fewer key and value heads", False),
        ("output matrices", False),
        ("queries through two matrices", True),
    ]
    assert done.ladder[-1].share == 4 / 8
    assert {layer.kind for layer in ModelShape.of(done.model).layers} == {"other"}
    check_model(done.model, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_matrices_make_the_same_queries_and_can_be_trained(family: str) -> None:
    done = converted_by(conversion("diffqkv", kv=1.0, query_width=150), family_model(family, kv_heads=2), 4)
    assert done.ladder[-1].error <= 1e-5
    made = decoder_layers(done.model)[1].self_attn
    assert made.q_up_proj.weight.shape[0] == 150
    done.model(text(1), labels=text(1)).loss.backward()
    assert bool((made.q_proj.weight.grad[:, -1] != 0).any())  # what is beyond the rank takes part


def test_a_layer_solved_for_anew_is_nearer() -> None:
    torch.manual_seed(0)
    model = family_model("llama", kv_heads=8, layers=1)
    done = converted_by(conversion("diffqkv", k_heads=2, v_heads=2), model, sequences=64)
    before, after = done.ladder[-1].facts["missed"][0]
    assert 0 <= after < before < 1
    assert done.ladder[2].error < done.ladder[1].error


def test_shares_are_split_as_in_the_papers_models() -> None:
    assert DiffQKV(kv=20 / 64).numbers(32) == (4, 16)
    assert DiffQKV(kv=0.5).numbers(3) == (1, 2)
    assert DiffQKV(kv=0.9).numbers(10) == (8, 10)
    assert DiffQKV(k_heads=2, kv=0.5).numbers(8) == (2, 6)
    assert DiffQKV(v_heads=5, kv=0.5).numbers(8) == (3, 5)
    # A key head of half the dims counts half.
    assert DiffQKV(k_dim=32, kv=18 / 64).numbers(32, 64) == (4, 16)
    assert DiffQKV(k_dim=32, kv=0.5).numbers(3, 64) == (2, 2)
    assert DiffQKV(k_dim=32, kv=0.75).numbers(4, 64) == (4, 4)
    for kv in (0.25, 0.3, 0.45, 0.6, 0.65):
        keys, values = DiffQKV(k_dim=24, kv=kv).numbers(8, 64)
        assert keys * 24 / 64 + values <= 16 * kv < keys * 24 / 64 + values + 1


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"k_heads": 5}, "k_heads"),
        ({"v_heads": 0}, "v_heads"),
        ({"kv": 0.2}, "kv"),
        ({"kv": 1.2}, "kv"),
        ({"k_heads": 4, "kv": 0.5}, "kv"),
        ({"query_width": 20}, "query_width"),
        ({"k_dim": 17}, "k_dim"),
        ({"k_dim": 0}, "k_dim"),
        ({"top_values": 0}, "top_values"),
    ],
)
def test_numbers_that_cannot_be_had_are_named(settings: dict, name: str) -> None:
    model = family_model("llama", kv_heads=4)
    with pytest.raises(BadArgument, match=name):
        conversion("diffqkv", **settings).check(model, ModelShape.of(model))


def test_latent_models_are_refused_and_bfloat16_runs() -> None:
    model = family_model("deepseek-v3")
    with pytest.raises(Refused, match="latent"):
        conversion("diffqkv").check(model, ModelShape.of(model))
    done = converted_by(conversion("diffqkv", query_width=128), family_model("llama", kv_heads=4).bfloat16(), 4)
    assert done.model.dtype == torch.bfloat16
    assert done.ladder[-1].error < 1.5
    assert_close(torch.tensor(done.ladder[-1].share), torch.tensor(0.5), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_in_all_their_dims_are_the_model_itself(family: str) -> None:
    done = converted_by(conversion("diffqkv", kv=1.0, k_dim=16), family_model(family, kv_heads=4), 4)
    assert [rung.exact for rung in done.ladder] == [True] * 3
    assert done.ladder[-1].error <= 1e-5 and done.ladder[-1].facts["energy"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "qwen3"])
def test_keys_that_fill_few_dims_lose_nothing(family: str) -> None:
    """Keys of rank 5 (with a bias, which is one more), cached as 6 numbers."""
    model = family_model(family, kv_heads=4, dtype=torch.float64)
    for layer in decoder_layers(model):
        weights = read_heads(layer.self_attn)
        left = torch.randn(4, 16, 5, dtype=torch.float64)
        weights.k.copy_(left @ torch.randn(4, 5, weights.k.shape[2], dtype=torch.float64) / 10)
        write_heads(layer.self_attn, weights)
    done = converted_by(conversion("diffqkv", k_heads=4, v_heads=4, k_dim=6, refit=False), model)
    assert done.ladder[-1].error <= 1e-6  # what a key of no energy is divided by leaves some rounding
    assert done.ladder[-1].share == (6 + 16) / 32
    worse = converted_by(conversion("diffqkv", k_heads=4, v_heads=4, k_dim=3, refit=False), model)
    assert worse.ladder[-1].error > 1e-2
    assert max(worse.ladder[-1].facts["energy"]) < 0.999 < 1 - 1e-9 < min(done.ladder[-1].facts["energy"])


def test_principal_components_are_better_than_the_first_dims() -> None:
    from foveate.convert.diffqkv import narrowed
    from foveate.convert.surgery.head_merge import key_weights, second, with_bias
    from foveate.heads.moments import collect
    from foveate.models.converted import container

    made = container(family_model("qwen2", kv_heads=4, dtype=torch.float64))
    module = decoder_layers(made)[0].self_attn
    weights = read_heads(module)
    moments = collect(made, {0: module}, [text(8)])[0]
    from foveate.convert.surgery.head_maps import install

    kept = narrowed(made, install(made, 0, weights), moments, 6)
    slim = decoder_layers(made)[0].self_attn
    rows, s = with_bias(weights.k, weights.k_bias), second(moments)
    cost = key_weights(weights, moments).unflatten(0, (4, 2)).sum(1)
    down = torch.cat([slim.k_proj.weight, slim.k_proj.bias[:, None]], dim=1).unflatten(0, (4, 6))

    def lost(product: torch.Tensor) -> float:
        rest = rows - product.detach()
        return float(((rest @ s * rest).sum(-1) * cost).sum() / ((rows @ s * rows).sum(-1) * cost).sum())

    assert lost(slim.k_up @ down) == pytest.approx(1 - kept, rel=1e-6)
    largest = ((rows @ s * rows).sum(-1) * cost).argsort(dim=-1, descending=True)[:, :6]
    chosen = torch.zeros_like(cost).scatter(1, largest, 1.0)[..., None] * rows
    assert lost(slim.k_up @ down) < lost(chosen)


def test_fewer_keys_in_fewer_dims_and_few_values_hold_together(tmp_path) -> None:
    """All that the paper names at once; with more values than there are keys, generation is that of all values."""
    model = family_model("llama", kv_heads=4)
    done = converted_by(conversion("diffqkv", kv=0.5, k_dim=8, top_values=64, query_width=160), model)
    assert [rung.stage for rung in done.ladder[1:]] == [
        "fewer key and value heads", "keys in fewer dims", "output matrices", "queries through two matrices"
    ]  # fmt: skip
    modules = [layer.self_attn for layer in decoder_layers(done.model)]
    assert all((m.num_k_heads, m.num_v_heads, m.k_dim, m.top_values) == (2, 3, 8, 64) for m in modules)
    assert done.ladder[-1].share == (2 * 8 + 3 * 16) / 128 <= 0.5
    check_model(done.model, tmp_path)
