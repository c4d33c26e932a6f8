"""TPLA: stages that keep the function, factors that follow from calibration, and what slicing costs in which order."""

from __future__ import annotations

import pytest
import torch
from tests.families import family_model
from transformers import AutoModelForCausalLM, DynamicCache

from foveate.convert.base import Calibration, conversion
from foveate.convert.run import convert
from foveate.convert.surgery.latent_slices import SCALES, Slices, basis, hadamard
from foveate.convert.tpla import TPLA
from foveate.errors import BadArgument, Refused
from foveate.models import converted
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny


def ids(length, batch=2, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (batch, length), generator=generator)


def structured(decay=0.8, **changes):
    """A tiny DeepSeek-V3 whose latents have most of their energy in few directions, as trained ones have.

    The directions are not the latent's dims: only a basis found by calibration puts them into one slice.
    """
    model = tiny("deepseek-v3", **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            down = layer.self_attn.kv_a_proj_with_mqa.weight
            rank = layer.self_attn.kv_lora_rank
            u, s, v = torch.linalg.svd(down[:rank].float(), full_matrices=False)
            spectrum = s.norm() * torch.nn.functional.normalize(decay ** torch.arange(float(rank)), dim=0)
            down[:rank] = (u * spectrum) @ v
            # Contents must matter beside positions for slices of them to be worth a test.
            layer.self_attn.kv_b_proj.weight.mul_(2)
    return model


def decoded(model, tokens, prompt):
    """Logits of the tokens behind a prompt, each a forward of its own."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :prompt], past_key_values=cache)
    steps = [model(token, past_key_values=cache).logits for token in tokens[:, prompt:].split(1, dim=1)]
    return torch.cat(steps, dim=1)


def error(a, b):
    return float((a - b).norm() / b.norm())


def run(model, tokens=None, **settings):
    return convert(model, TPLA(**settings), Calibration(ids(40, 4) if tokens is None else tokens), ids(17))


@pytest.mark.parametrize("name", ["pca", "hadamard", "identity"])
@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_folding_and_turning_keep_the_function(family, name):
    """`convert` itself holds exact stages to 1e-5; here the ladder, and decoding, and that something was turned."""
    model = family_model(family)
    done = run(model, basis=name, shards=1)
    assert [(rung.stage, rung.exact) for rung in done.ladder[1:]] == [
        ("fold the norm's gain", True),
        ("turn the latent", True),
    ]
    assert max(rung.error for rung in done.ladder) < 1e-5
    tokens = ids(13)
    with torch.no_grad():
        assert error(decoded(done.model, tokens, 6), model(tokens).logits[:, 6:]) < 1e-5
    module = converted.decoder_layers(done.model)[0].self_attn
    old = model.model.layers[0].self_attn
    assert torch.equal(module.kv_a_layernorm.weight, torch.ones(32))
    assert not torch.allclose(old.kv_a_layernorm.weight, torch.ones(32), atol=0.1)
    same = torch.allclose(module.kv_a_proj_with_mqa.weight, old.kv_a_proj_with_mqa.weight)
    assert same == (name == "identity")


def test_without_a_norm_it_is_exact_in_double():
    """Models that a conversion made may have a latent without a norm, and biases; then nothing rounds in float32."""
    model = converted.container(family_model("deepseek-v3", dtype=torch.float64))
    for index, layer in enumerate(converted.decoder_layers(model)):
        old = layer.self_attn
        spec = {"num_heads": 8, "rank": 24, "rope_dim": 8, "nope_dim": 16, "v_dim": 12, "norm": "none"}
        biases = ["q_proj", "kv_a_proj_with_mqa", "o_proj"]
        new = converted.replace(model, index, "latent", **spec, biases=biases, scale=old.scaling)
        for parameter in new.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    for rung in run(model, basis="pca", shards=1).ladder:
        assert rung.error < 1e-10
    cut = run(model, shards=2, separation=False)
    assert cut.ladder[-1].error > 1e-3
    assert set(cut.ladder[-1].facts["norm_scale"]) == {"none"}


@pytest.mark.parametrize("width", [1, 6, 8, 24, 40, 64, 96])
def test_hadamard_is_orthogonal_and_flat(width):
    h = hadamard(width, seed=3)
    assert torch.allclose(h @ h.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    odd = width // (width & -width)
    # +-1 / sqrt(width) up to the cosines of an odd part
    assert float(h.abs().max()) <= (2 / width) ** 0.5 + 1e-9
    if odd == 1:
        assert torch.allclose(h.abs(), torch.full_like(h, width**-0.5))
    assert width == 1 or not torch.equal(h, hadamard(width, seed=4))


def test_pca_puts_the_most_energy_first():
    x = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    second = x.T @ x / 500
    turned = basis("pca", second).T @ second @ basis("pca", second)
    assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-9 * float(second.diagonal().sum()))
    assert (turned.diagonal().diff() <= 1e-9).all()


def test_factors_are_what_they_say():
    """Against definitions written out, on latents of uneven energy."""
    q, k = torch.randn(2, 4, 5, 12), torch.randn(2, 5, 12) * torch.linspace(3, 0.2, 12)
    p = (torch.randn(2, 4, 5, 5) + torch.full((5, 5), -torch.inf).triu(1)).softmax(-1)
    sums = Slices(12, 3)
    sums.add_latents(k)
    sums.add_scores(q, k, p, [slice(0, 4)] * 3)
    energy = k.double().square().unflatten(-1, (3, 4)).sum(-1)
    assert torch.allclose(torch.tensor(sums.shares), (energy.sum((0, 1)) / energy.sum()).float())
    fraction = energy / energy.sum(-1, keepdim=True)
    assert torch.allclose(torch.tensor(sums.norm_scale("variance")), (1 / fraction.mean((0, 1))).float())
    assert sums.norm_scale("none") == [3.0] * 3
    assert torch.allclose(
        torch.tensor(sums.score_scale("variance")), (energy.sum() / energy.sum((0, 1))).float(), rtol=1e-5
    )
    assert sums.score_scale("none") == [1.0] * 3

    whole = torch.einsum("bhnr,bmr->bhnm", q, k)
    for index in range(3):
        part = slice(4 * index, 4 * index + 4)
        cut = k[..., part]
        y = torch.einsum("bhnr,bmr->bhnm", q[..., part], cut)

        def normed(alpha, cut=cut):
            return cut / (alpha * cut.square().sum(-1, keepdim=True)).sqrt() - cut / k.norm(dim=-1, keepdim=True)

        def spread(mu, y=y):
            gap = whole - mu * y
            return (p * (gap - (p * gap).sum(-1, keepdim=True)).square()).sum().sqrt()

        for score, best in ((normed, sums.norm_scale), (spread, sums.score_scale)):
            at = best("least-squares")[index]
            # The least of all: worse to both sides.
            assert score(at).square().sum() < min(score(at * x).square().sum() for x in (0.97, 1.03))


def test_hadamard_slices_need_g_for_the_norm():
    """With energy spread evenly every slice has 1/g of it, so all ways to choose alpha agree on g (section 4.2)."""
    x = torch.randn(4000, 64) * torch.linspace(2, 0.01, 64)
    turned = x @ hadamard(64).float()
    sums = Slices(64, 4)
    sums.add_latents(turned)
    assert torch.tensor(sums.shares).sub(0.25).abs().max() < 0.02
    for how in ("variance", "least-squares"):
        assert torch.tensor(sums.norm_scale(how)).sub(4).abs().max() < 0.4
    uneven = Slices(64, 4)
    uneven.add_latents(x)
    assert uneven.norm_scale("variance")[3] > 20


def test_auto_takes_the_best_of_all():
    model, text = structured(), ids(32, 2)
    errors = {
        (a, b): torch.tensor(
            run(model, text, separation=False, norm_scale=a, score_scale=b).ladder[-1].facts["output_error"]
        )
        for a in SCALES
        for b in SCALES
    }
    facts = run(model, text, separation=False).ladder[-1].facts
    least = torch.stack(list(errors.values())).min(0).values
    assert torch.allclose(torch.tensor(facts["output_error"]), least, rtol=1e-3)
    for layer, choice in enumerate(zip(facts["norm_scale"], facts["score_scale"], strict=True)):
        assert errors[choice][layer] <= least[layer] * 1.001
    # The choice matters, and is not always the paper's.
    assert (errors["variance", "variance"] > 1.05 * least).any()


@torch.no_grad()
def test_what_slicing_costs_and_in_which_order():
    """Separated below sliced everywhere, far below grouped heads; and PCA below the dims as they come."""
    model, text, tokens = structured(), ids(48, 4, seed=1), ids(40, 4, seed=2)
    whole = model(tokens).logits[:, 24:]

    def loss(**settings):
        return error(decoded(run(model, text, **settings).model, tokens, 24), whole)

    separated, plain, grouped = loss(), loss(separation=False), loss(separation=False, grouped=True)
    assert 0.01 < separated < 0.9 * plain
    assert plain < 0.5 * grouped
    assert plain < 0.7 * loss(separation=False, basis="identity")


@pytest.mark.parametrize("grouped", [False, True])
@torch.no_grad()
def test_what_shards_do_not_divide(grouped):
    """9 heads and a latent of 32 dims over 4 and 5 ranks: cut, decoded and opened as any other."""
    model, text, tokens = structured(heads=9), ids(40, 4, seed=1), ids(20, 2, seed=2)
    whole = model(tokens).logits[:, 10:]
    for shards, heads in ((4, [3, 2, 2, 2]), (5, [2, 2, 2, 2, 1])):
        done = run(model, text, shards=shards, grouped=grouped, separation=False)
        module = converted.decoder_layers(done.model)[0].self_attn
        assert [len(range(9)[module.heads_of(rank)]) for rank in range(shards)] == (heads if grouped else [9] * shards)
        assert sum(done.ladder[-1].facts["energy"][0]) == pytest.approx(1)
        assert 1e-3 < error(decoded(done.model, tokens, 10), whole) < 1.5


@torch.no_grad()
def test_more_shards_lose_more():
    model, text = structured(), ids(48, 4)
    rungs = {shards: run(model, text, shards=shards, separation=False).ladder[-1] for shards in (2, 4)}
    assert rungs[2].error < rungs[4].error
    assert rungs[2].facts["rank_elements"] == [16 + 8] * 3
    assert rungs[4].facts["rank_elements"] == [8 + 8] * 3
    assert rungs[4].facts["whole_elements"] == [32 + 8] * 3
    for shares in rungs[4].facts["energy"]:
        assert sum(shares) == pytest.approx(1)
        assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-4), ("muon", 3e-4)])
def test_alignment_lowers_the_error(optimizer, rate):
    """On its own text layer by layer, and the logits on other text."""
    model, text = structured(layers=2), ids(48, 64, seed=3)
    settings = TPLA(separation=False, align=3, rate=rate, optimizer=optimizer)
    done = convert(model, settings, Calibration(text), ids(64, 8, seed=4))
    cut, aligned = done.ladder[-2:]
    assert aligned.error < 0.97 * cut.error
    for first, last in zip(aligned.facts["error"]["first"], aligned.facts["error"]["last"], strict=True):
        assert last < first
    # What taught the layers is gone, and what was learnt is in the model that is saved.
    assert not any(layer.self_attn.separation for layer in converted.decoder_layers(done.model))
    assert all(p.grad is None for p in done.model.parameters())


@torch.no_grad()
def test_it_generates_and_is_opened_again(tmp_path):
    done = run(structured())
    tokens = ids(21)
    new = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = done.model.generate(tokens, **new)
    # Greedy tokens are those that the same steps by hand find.
    assert torch.equal(decoded(done.model, out, 21)[:, :-1].argmax(-1), out[:, 22:])
    done.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(tokens, **new), out)
    factors = [layer.self_attn.score_scale for layer in converted.decoder_layers(done.model)]
    assert [layer.self_attn.score_scale for layer in converted.decoder_layers(again)] == factors


@torch.no_grad()
def test_half_precision():
    done = run(structured(dtype=torch.bfloat16))
    assert done.ladder[-1].error < 0.1
    assert next(done.model.parameters()).dtype == torch.bfloat16


def test_what_is_refused():
    deepseek = tiny("deepseek-v3")
    shape = ModelShape.of(deepseek)
    with pytest.raises(Refused, match="no latent attention"):
        TPLA().check(tiny("llama"), ModelShape.of(tiny("llama")))
    for settings, argument in (
        ({"shards": 33}, "shards"),
        ({"shards": 0}, "shards"),
        ({"shards": 16, "grouped": True}, "shards"),
        ({"basis": "svd"}, "basis"),
        ({"norm_scale": "mean"}, "norm_scale"),
        ({"score_scale": "mean"}, "score_scale"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"align": 1}, "align"),
        ({"align": -1}, "align"),
        ({"rate": 0.0}, "rate"),
    ):
        with pytest.raises(BadArgument, match=f"^{argument}="):
            conversion("tpla", **settings).check(deepseek, shape)
    done = run(deepseek)
    with pytest.raises(Refused, match="already"):
        TPLA().check(done.model, ModelShape.of(done.model))
