"""SQA from a checkpoint: which query heads stay, and what their output matrix makes up for."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import relative_rms
from tests.convert.head_checks import check_model, converted_by, text
from tests.families import FAMILIES, family_model

from foveate.convert.base import conversion
from foveate.convert.sqa import drop_heads
from foveate.errors import BadArgument, Refused
from foveate.models.converted import decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads, write_heads


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_are_gqa(family: str, kv_heads: int) -> None:
    model = family_model(family, kv_heads=kv_heads)
    done = converted_by(conversion("sqa", heads=8), model)
    assert done.ladder[-1].exact
    assert done.ladder[-1].error <= 1e-5
    assert all(layer.self_attn.grouped for layer in decoder_layers(done.model))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi", "phi3"])
def test_heads_that_say_the_same_cost_nothing(family: str) -> None:
    """Each second head is a copy with another output matrix: dropped, its part is taken over whole."""
    model = family_model(family, kv_heads=2).double()
    for layer in decoder_layers(model):
        weights = read_heads(layer.self_attn)
        weights.q[1::2] = weights.q[::2]
        if weights.q_bias is not None:
            weights.q_bias[1::2] = weights.q_bias[::2]
        write_heads(layer.self_attn, weights)
    done = converted_by(conversion("sqa", heads=4), model)
    assert not done.ladder[-1].exact
    assert done.ladder[-1].error <= 1e-6
    assert max(done.ladder[-1].facts["lost"]) < 1e-6


def reduced(second: torch.Tensor, o: torch.Tensor, stay: list[int]) -> tuple[torch.Tensor, float]:
    """By hand: best output matrix on some heads, and the energy that it misses."""
    heads, width, dim = o.shape
    wide = o.transpose(0, 1).reshape(width, heads * dim)
    c = [h * dim + i for h in stay for i in range(dim)]
    best = wide @ second[:, c] @ torch.linalg.inv(second[c][:, c])
    rest = second - second[:, c] @ torch.linalg.inv(second[c][:, c]) @ second[c]
    return best.reshape(width, len(stay), dim).transpose(0, 1), float(torch.einsum("ij,jk,ik->", wide, rest, wide))


def test_what_is_dropped_is_the_least_that_cannot_be_made_up_for() -> None:
    x = torch.randn(500, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    second, o = x.T @ x / 500, torch.randn(6, 10, 4, dtype=torch.float64)
    whole = float(torch.einsum("hij,hjgl,gil->", o, second.reshape(6, 4, 6, 4), o))
    stay, _, _ = drop_heads(second, o, kv_heads=6, chosen=5, left=5)
    prices = {h: reduced(second, o, [g for g in range(6) if g != h])[1] for h in range(6)}
    assert stay == [g for g in range(6) if g != min(prices, key=lambda h: prices[h])]
    stay, out, lost = drop_heads(second, o, kv_heads=3, chosen=2, left=2)
    assert len({h // 2 for h in stay}) == 2
    best, missed = reduced(second, o, stay)
    assert relative_rms(out, best) < 1e-6
    assert lost == pytest.approx(missed / whole, rel=1e-5)


def test_making_up_for_the_rest_helps() -> None:
    """On its own text, a layer that took over is nearer to the original than one that only lost heads."""
    model = family_model("llama", kv_heads=2, layers=1)
    tokens = text(24)
    done = converted_by(conversion("sqa", heads=4), model, sequences=48)
    stay = done.ladder[-1].facts["kept"][0]
    plain = family_model("llama", kv_heads=2, layers=1)
    weights = read_heads(decoder_layers(plain)[0].self_attn)
    weights.o[[h for h in range(8) if h not in stay]] = 0
    write_heads(decoder_layers(plain)[0].self_attn, weights)
    with torch.no_grad():
        want = model(tokens).logits
        assert relative_rms(done.model(tokens).logits, want) < 0.95 * relative_rms(plain(tokens).logits, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_heads_is_a_plain_gqa_model(family: str, tmp_path) -> None:
    model = family_model(family, kv_heads=2)
    done = converted_by(conversion("sqa"), model)
    shape = ModelShape.of(done.model)
    assert [(layer.num_heads, layer.num_kv_heads) for layer in shape.layers] == [(4, 2)] * 2
    assert {layer.kind for layer in shape.layers} <= {"full", "sliding"}
    made = decoder_layers(done.model)[0].self_attn
    assert made.flops(9, 9) * 8 == 4 * 8 * 81 * 16 * 4
    check_model(done.model, tmp_path)


def test_key_value_heads_that_nobody_reads_leave_the_cache() -> None:
    model = family_model("qwen2", kv_heads=8)
    done = converted_by(conversion("sqa", heads=2), model)
    assert done.ladder[-1].share == pytest.approx(2 / 8)
    assert done.ladder[-1].kv_bytes == 2 * 2 * 2 * 16 * 4
    done = converted_by(conversion("sqa", kv=0.5), family_model("llama", kv_heads=4))
    assert done.ladder[-1].share == 0.5
    assert ModelShape.of(done.model).layers[0].num_heads == 4


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"heads": 3, "kv_heads": 2}, "heads"),
        ({"heads": 8, "kv_heads": 1}, "heads"),
        ({"kv_heads": 5}, "kv_heads"),
        ({"kv": 0.2}, "kv"),
        ({"kv": 0.5, "kv_heads": 1}, "kv"),
        ({"kv": 1.5}, "kv"),
    ],
)
def test_numbers_that_cannot_be_had_are_named_with_those_that_can(settings: dict[str, float], name: str) -> None:
    model = family_model("llama", kv_heads=4)
    with pytest.raises(BadArgument, match=name):
        conversion("sqa", **settings).check(model, ModelShape.of(model))


def test_too_little_text_and_latent_models_are_refused() -> None:
    with pytest.raises(BadArgument, match="tokens"):
        converted_by(conversion("sqa"), family_model("llama"), sequences=4)
    model = family_model("deepseek-v3")
    with pytest.raises(Refused, match="latent"):
        conversion("sqa").check(model, ModelShape.of(model))


def test_bfloat16() -> None:
    done = converted_by(conversion("sqa"), family_model("llama").bfloat16())
    assert done.model.dtype == torch.bfloat16
    assert done.ladder[-1].error < 1.5
