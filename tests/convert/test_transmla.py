"""TransMLA: exact stages are exact on every family, approximate ones lose what they say and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import eager_mask

import foveate
from foveate.compat import ALL_ATTENTION_FUNCTIONS
from foveate.convert.base import Calibration, conversion
from foveate.convert.run import Converted, convert
from foveate.convert.surgery.joint_rank import balanced, cut, cut_queries
from foveate.convert.surgery.latent_layer import put_latent
from foveate.convert.surgery.rorope import concentrated, divided, leading, lifted, whole
from foveate.convert.transmla import TransMLA
from foveate.errors import BadArgument, Infeasible, Refused
from foveate.layers.eager import eager
from foveate.models.converted import container, decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.tiny import _draw, tiny
from foveate.models.weights import read_heads

LENGTH = 29


def made(family: str, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model; qwen2 has biases, gemma2 a softcap, a scale and windows, yarn a factor on its cosines."""
    if family in ("llama", "mistral"):
        return tiny(family, layers=2, kv_heads=kv_heads, window=9 if family == "mistral" else None, dtype=dtype)
    common: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": kv_heads, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    if family == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**common))
    elif family == "yarn":
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(**common, rope_parameters=rope))
        assert model.model.rotary_emb.attention_scaling > 1.1
    else:
        config = Gemma2Config(**common, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, sliding_window=9)
        # Softmax in the model's own float64, where transformers' eager function rounds it to float32.
        ALL_ATTENTION_FUNCTIONS.register("capped", eager)
        AttentionMaskInterface.register("capped", eager_mask)
        config._attn_implementation = "eager" if dtype == torch.float32 else "capped"
        model = Gemma2ForCausalLM(config)
    _draw(model, 0)
    return model.to(dtype).eval()


def texts(seed: int = 0) -> tuple[Calibration, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    calibration = torch.randint(3, 250, (6, 37), generator=generator)
    return Calibration(calibration), torch.randint(3, 250, (2, LENGTH), generator=generator)


def run(model: Any, **settings: Any) -> Converted:
    return convert(model, TransMLA(**settings), *texts())


def errors(done: Converted) -> dict[str, float]:
    return {rung.stage: rung.error for rung in done.ladder}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("family", "kv_heads"),
    [("llama", 1), ("llama", 2), ("llama", 8), ("mistral", 2), ("qwen2", 4), ("gemma2", 2), ("yarn", 2)],
)
def test_exact_stages_are_exact(family: str, kv_heads: int) -> None:
    model = made(family, kv_heads)
    done = run(model, kv=0.6, freqfold=4, rope_dim=4)
    found = errors(done)
    assert [rung.stage for rung in done.ladder] == ["original", "lift", "rorope", "partial rope", "balance", "low rank"]
    assert found["lift"] < 1e-10 and found["rorope"] < 1e-10
    assert found["partial rope"] > 1e-3
    assert abs(found["balance"] - found["partial rope"]) < 1e-10
    held = {rung.stage: rung.share for rung in done.ladder}
    assert held["lift"] == held["rorope"] == 1.0
    elements = int(0.6 * kv_heads * 32)
    assert held["low rank"] == elements / (kv_heads * 32)
    assert ModelShape.of(done.model).kv_bytes_per_token == 2 * elements * 8
    facts = {rung.stage: rung.facts for rung in done.ladder}
    assert all(share > 1 / kv_heads - 1e-9 for share in facts["rorope"]["energy"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "yarn"])
def test_all_that_full_rank_loses_is_rotation(family: str) -> None:
    """Where all tokens stand at position 0 nothing is turned, and nothing is lost; elsewhere it is."""
    model = made(family)
    _, probe = texts()
    done = run(model, kv=1.0, rope_dim=8, freqfold=4)
    assert ModelShape.of(done.model).layers[0].latent_dim == 2 * 32 - 8
    zero = torch.zeros_like(probe)
    with torch.no_grad():
        want, got = (m(probe, position_ids=zero, use_cache=False).logits for m in (model, done.model))
    assert relative(got, want) < 1e-10
    assert errors(done)["low rank"] > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_key_head_that_stays_rotated_converts_exactly(family: str) -> None:
    done = run(made(family, 1), kv=1.0, rope_dim=16, freqfold=1)
    assert all(rung.error < 1e-10 for rung in done.ladder)
    (layer, *_) = ModelShape.of(done.model).layers
    assert (layer.latent_dim, layer.store_k_dim, layer.head_dim) == (16, 32, 16)


def _layer(family: str) -> Any:
    """Weights and input moments of the second layer."""
    model = made(family)
    calibration, _ = texts()
    return read_heads(decoder_layers(model)[1].self_attn), calibration.inputs(model)[1]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("fold", [1, 2, 8])
def test_turning_gathers_energy_and_loses_none(family: str, fold: int) -> None:
    heads, inputs = _layer(family)
    keys = lifted(heads)
    turned = concentrated(keys, inputs, fold)
    energy = turned.energy(inputs)
    assert torch.allclose(energy.sum(), keys.energy(inputs).sum())
    blocks = energy.view(8 // fold, -1)
    assert (blocks.diff(dim=1) <= 1e-9).all()
    sorted_alone = concentrated(keys, inputs, fold, mix=False).energy(inputs).view(8 // fold, -1)
    assert (sorted_alone.diff(dim=1) <= 1e-9).all()
    # Leading components hold at least what the leading pairs do (Schur-Horn), and here more.
    assert (blocks.cumsum(1) >= sorted_alone.cumsum(1) - 1e-9).all() and blocks[0, 0] > 1.001 * sorted_alone[0, 0]
    # Read through the up-projections, keys at position 0 are as before.
    for h in range(8):
        back = torch.einsum("lp,pcd->cld", turned.up[h], turned.rows).flatten(0, 1)
        assert torch.allclose(back, heads.k[h // 4], atol=1e-12)


def test_the_frequencies_that_stay() -> None:
    heads, inputs = _layer("llama")
    keys = lifted(heads)
    for fold, want in ((4, [0, 1, 8, 9]), (2, [0, 4, 8, 12]), (1, [0, 4, 8, 12]), (8, [0, 1, 2, 3])):
        kept, chosen = leading(concentrated(keys, inputs, fold), 8, fold)
        assert chosen.tolist() == [0, 2, 4, 6] and kept.tolist() == want
    kept, chosen = leading(concentrated(keys, inputs, 4, mix=False), 8, 4, mix=False)
    by_energy = keys.energy(inputs).view(2, 8)
    for block in (0, 1):
        best = by_energy[:, 4 * block : 4 * block + 4].flatten().topk(2).indices % 4 + 4 * block
        assert chosen[2 * block : 2 * block + 2].tolist() == best.tolist()


@torch.no_grad()
def test_a_layer_loses_less_with_rank() -> None:
    """One layer's output on the text that the statistics are of, against that of the layer with partial RoPE alone."""
    model = made("qwen2")
    calibration, _ = texts()
    new: Any = container(model)
    inputs = calibration.inputs(new)[1]
    turned = concentrated(lifted(read_heads(decoder_layers(new)[1].self_attn)), inputs, 2)
    kept, frequencies = leading(turned, 8, 2)
    weights, factor = balanced(divided(turned, kept), inputs, 24)
    size = inputs.of(weights.w_dkv, weights.dkv_bias).diagonal().sqrt()
    assert float(size[:24].mean() / size[24:].mean()) == pytest.approx(1.0) and abs(factor - 1) > 0.01

    outputs: list[Tensor] = []
    parts = [cut(weights, inputs, 24, rank) for rank in (56, 0, 8, 16, 24, 32, 40, 48)]
    for part in [p for p in parts if p.weights.w_dkv.shape[0]]:
        put_latent(new, 1, part.weights, frequencies.tolist())
        module = decoder_layers(new)[1].self_attn
        hook = module.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
        new(calibration.tokens)
        hook.remove()
    errors = [relative(out, outputs[0]) for out in outputs[1:]]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 1e-3
    energies = [part.energy for part in parts[1:]]
    assert energies == sorted(energies) and energies[0] == 0
    assert parts[0].energy == pytest.approx(1) and parts[0].keys == pytest.approx(1) == parts[0].values


def test_error_falls_with_rank() -> None:
    model = made("qwen2")
    calibration, _ = texts()
    found = []
    for rank in (4, 16, 32, 48, 56):
        done = convert(
            model, TransMLA(rank=rank, rope_dim=8, freqfold=2), Calibration(calibration.tokens), calibration.tokens
        )
        partial, low = done.ladder[-3].kl, done.ladder[-1]
        found.append(low.kl)
    assert found == sorted(found, reverse=True)
    assert low.kl == pytest.approx(partial, rel=1e-9) and found[0] > 1.5 * partial


def test_turning_helps_what_partial_rope_loses() -> None:
    model = made("llama", 8)
    with_it, without = (run(model, kv=0.5, rope_dim=8, freqfold=2, rorope=on) for on in (True, False))
    assert "rorope" not in errors(without)
    energy = [next(r for r in d.ladder if r.stage == "partial rope").facts["energy"] for d in (with_it, without)]
    assert all(a > b for a, b in zip(*energy, strict=True))


def test_freqfold_is_chosen_by_perplexity() -> None:
    model = made("llama", 2)
    done = run(model, kv=0.5, rope_dim=8)
    facts = next(r for r in done.ladder if r.stage == "partial rope").facts
    tried = {int(fold): value for fold, value in facts["tried"].items()}
    assert list(tried) == [2, 4, 8][: len(tried)] and facts["freqfold"] in tried
    best = facts["freqfold"]
    assert all(tried[best] <= value for fold, value in tried.items() if fold <= best)
    assert 2 * best not in tried or tried[2 * best] > tried[best]
    again = run(model, kv=0.5, rope_dim=8, freqfold=best)
    assert again.ladder[-1].error == done.ladder[-1].error


def test_queries_of_full_rank_are_the_same() -> None:
    model = made("qwen2")
    full = run(model, kv=0.5, rope_dim=8, freqfold=2, q_rank=65)
    assert full.ladder[-1].error == pytest.approx(full.ladder[-2].error, rel=1e-9)
    less = run(model, kv=0.5, rope_dim=8, freqfold=2, q_rank=16)
    assert less.ladder[-1].kl > less.ladder[-2].kl
    assert decoder_layers(less.model)[0].self_attn.q_a_proj.weight.shape == (16, 64)


def test_norms_are_fitted_last() -> None:
    done = run(made("qwen2"), kv=0.5, rope_dim=8, freqfold=2, q_rank=48, norm=True)
    assert done.ladder[-1].stage == "norms on latents" and not done.ladder[-1].exact
    assert decoder_layers(done.model)[0].self_attn.norm == "rms"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2"])
def test_the_result_is_saved_generates_and_takes_methods(family: str, tmp_path: Any) -> None:
    model = made(family, dtype=torch.float32)
    done: Any = run(model, kv=0.5, rope_dim=8, freqfold=2)
    _, probe = texts()
    done.model.save_pretrained(tmp_path)
    kept = done.model.config._attn_implementation
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=kept)
    ask: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ask |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        full = done.model(probe).logits
        assert relative(again(probe).logits, full) < 1e-6
        out = again.generate(probe, **ask)
        steps = torch.stack(out.logits, dim=1)
        whole = again(out.sequences[:, :-1]).logits[:, LENGTH - 1 :]
        assert relative(steps, whole) < 1e-5
        with foveate.apply(again, "dense"):
            ours = again.generate(probe, **ask)
    assert relative(torch.stack(ours.logits, dim=1), steps) < 1e-5


def test_bfloat16() -> None:
    done = run(made("qwen2", dtype=torch.bfloat16), kv=0.5, rope_dim=8, freqfold=2)
    assert done.model.dtype == torch.bfloat16
    assert errors(done)["rorope"] < 5e-2 and all(torch.isfinite(torch.tensor(r.kl)) for r in done.ladder)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_dim": 6}, "rope_dim"),
        ({"rank": 57, "rope_dim": 8}, "rank"),
        ({"kv": 1.5}, "kv"),
        ({"freqfold": 3}, "freqfold"),
        ({"freqfold": "best"}, "freqfold"),
        ({"balance": 0.0}, "balance"),
        ({"q_rank": 65}, "q_rank"),
    ],
)
def test_numbers_that_do_not_fit_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(BadArgument, match=named):
        run(made("llama"), **settings)


def test_a_budget_below_the_floor_says_it() -> None:
    with pytest.raises(Infeasible, match="take") as caught:
        run(made("llama"), kv=0.1, rope_dim=8)
    assert caught.value.floor == 9 / 64


@pytest.mark.parametrize(("family", "why"), [("qwen3", "norms"), ("gemma3", "norms"), ("deepseek-v3", "already")])
def test_models_that_cannot_be_lifted(family: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        run(tiny(family))


def test_linear_algebra_stays_on_the_device_of_the_weights() -> None:
    """Whatever is made beside the weights would be made on the other device here, and not fit them."""
    heads, inputs = _layer("qwen2")
    with torch.device("meta"):
        for mix in (True, False):
            turned = concentrated(lifted(heads), inputs, 2, mix)
            kept, _ = leading(turned, 8, 2, mix)
            whole(turned)
            weights, _ = balanced(divided(turned, kept), inputs, 24)
            weights, _ = cut_queries(cut(weights, inputs, 24, 16).weights, inputs, 16)
    assert weights.w_dkv.device.type == "cpu"


def test_it_has_a_name() -> None:
    assert isinstance(conversion("transmla", kv=0.5), TransMLA)
