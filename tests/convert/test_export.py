"""A model of latent attention becomes a stock DeepSeek-V3 checkpoint that computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from foveate.convert.exporting.deepseek_layout import Latent, common_dim, constants
from foveate.convert.exporting.export import as_deepseek, export_deepseek
from foveate.convert.surgery.latent_norms import EPSILON, fit_norms, fitted
from foveate.errors import BadArgument, Refused
from foveate.models import tiny
from foveate.models.converted import container, decoder_layers, replace
from foveate.models.shape import ModelShape

IDS = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(5))
NUMBERS: dict[str, Any] = {"num_heads": 4, "rank": 29, "rope_dim": 8, "nope_dim": 12, "v_dim": 16, "norm": "none"}
COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCALED: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 128,
}


def latent(base: Any, *changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model of latent attention in all layers, each of `NUMBERS` with its changes, and weights that matter."""
    model = container(base)
    generator = torch.Generator().manual_seed(7)
    for index, layer in enumerate(decoder_layers(model)):
        spec = {**NUMBERS, **(changes[index % len(changes)] if changes else {})}
        module = replace(model, index, "latent", **spec)
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "layernorm" in name:
                parameter.data = 1 + 0.3 * drawn
            elif name.endswith("bias"):
                parameter.data = 20 * drawn if "q_" in name else 2 * drawn
            else:
                parameter.data = 1.5 * drawn / parameter.shape[1] ** 0.5
        gain = layer.input_layernorm.weight
        gain.data = 1 + 0.5 * torch.randn(gain.shape, generator=generator)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # the frequencies stay in float32, as in a model that was loaded
    return model.eval()


def llama(**changes: Any) -> Any:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**COMMON, **changes})).eval()


def qwen2() -> Any:
    torch.manual_seed(4)
    return Qwen2ForCausalLM(Qwen2Config(**COMMON)).eval()


def phi3() -> Any:
    torch.manual_seed(4)
    return Phi3ForCausalLM(Phi3Config(**{**COMMON, "head_dim": 12})).eval()


class Case(NamedTuple):
    make: Callable[[], Any]
    pad: bool = False
    bound: float = 1e-5


BIASES = ["q_proj", "kv_a_proj_with_mqa", "o_proj"]
CASES = {
    "llama": Case(lambda: latent(llama())),
    "tied": Case(lambda: latent(llama(tie_word_embeddings=True))),
    "scaled-rope": Case(lambda: latent(llama(rope_parameters=SCALED))),
    "yarn": Case(lambda: latent(llama(rope_parameters=YARN), {"rope_dim": 16})),
    "mistral": Case(lambda: latent(tiny("mistral", layers=2, heads=4, kv_heads=1))),
    "qwen2": Case(lambda: latent(qwen2(), {"biases": BIASES})),
    "phi3": Case(lambda: latent(phi3(), {"rope_dim": 4})),
    "query-latent": Case(lambda: latent(llama(), {"q_rank": 21})),
    "query-latent-biased": Case(lambda: latent(llama(), {"q_rank": 21, "biases": ["q_a_proj", "q_b_proj"]})),
    "own-norms": Case(lambda: latent(llama(), {"norm": "rms", "q_rank": 21})),
    "scale": Case(lambda: latent(llama(), {"scale": 0.31})),
    "neighbours": Case(lambda: latent(llama(), {"interleaved": True})),
    "order": Case(lambda: latent(llama(), {"frequencies": [4, 0, 6, 2]})),
    "no-nope": Case(lambda: latent(llama(), {"rope_dim": 16, "nope_dim": 0})),
    "padded": Case(lambda: latent(llama(), {"rank": 29}, {"rank": 12, "norm": "rms"}), True),
    "padded-queries": Case(lambda: latent(qwen2(), {"biases": BIASES}, {"q_rank": 5}), True),
    "bf16": Case(lambda: latent(llama(), {"q_rank": 21}, dtype=torch.bfloat16), False, 1e-3),
    "bf16-biased": Case(lambda: latent(qwen2(), {"biases": BIASES}, dtype=torch.bfloat16), False, 1e-3),
}

STOCK = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
out = {}
ids = torch.tensor(eval(sys.argv[2]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    out[folder.name] = (type(model).__name__, logits, tokens)
assert not [name for name in sys.modules if name.startswith("foveate")]
torch.save(out, sys.argv[3])
"""


class Exported(NamedTuple):
    model: Any
    folder: Path
    facts: dict[str, Any]
    type: str
    logits: Tensor
    tokens: Tensor


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every case, exported, and what plain transformers makes of it in a process that never sees Foveate."""
    root = tmp_path_factory.mktemp("exported")
    folders, result = root / "folders", root / "result.pt"
    models = {name: case.make() for name, case in CASES.items()}
    facts = {name: export_deepseek(models[name], folders / name, pad=CASES[name].pad) for name in CASES}
    command = [sys.executable, "-c", STOCK, str(folders), str(IDS.tolist()), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    found = torch.load(result)
    return {name: Exported(models[name], folders / name, facts[name], *found[name]) for name in CASES}


def away(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_the_same(exported: dict[str, Exported], name: str) -> None:
    one = exported[name]
    assert one.type == "DeepseekV3ForCausalLM"
    assert away(one.logits, logits(one.model)) < CASES[name].bound
    own = one.model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(one.tokens, own)


def test_what_needs_no_rounding_is_the_same_to_the_bit() -> None:
    """Constants make the norm a multiplication by a power of two, in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        for model in (latent(llama(), {"q_rank": 21}, dtype=dtype), latent(qwen2(), {"biases": BIASES}, dtype=dtype)):
            made, _ = as_deepseek(model)
            for ours, theirs in zip(decoder_layers(model), decoder_layers(made), strict=True):
                x = torch.randn(3, 48, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 10
                one, other = ours.self_attn, theirs.self_attn
                held = other.kv_a_layernorm(other.kv_a_proj_with_mqa(x)[:, : other.kv_lora_rank])
                assert torch.equal(held[:, :29], one.kv_a_proj_with_mqa(x)[:, :29])
                assert not held[:, 29:].any()  # nothing but zeros is cached in the dims of constants


def test_files_are_what_loaders_of_deepseek_look_for(exported: dict[str, Exported]) -> None:
    from safetensors import safe_open

    with safe_open(exported["llama"].folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    first = {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")}
    assert first == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_proj_with_mqa.bias",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
    }
    assert {n for n in names if not n.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == [32 + 8, 48]
    assert shapes["model.layers.0.self_attn.kv_b_proj.weight"] == [4 * (12 + 16), 32]
    config = json.loads((exported["llama"].folder / "config.json").read_text())
    wanted = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "attention_bias": True,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    assert {name: config.get(name) for name in wanted} == wanted
    # Serving engines never tie the head of a DeepSeek model: a tied one is written out.
    tied = exported["tied"]
    assert "lm_head.weight" in safe_names(tied.folder)
    assert json.loads((tied.folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert tied.model.config.tie_word_embeddings
    scaled = json.loads((exported["scaled-rope"].folder / "config.json").read_text())
    assert scaled["rope_parameters"] == SCALED
    own = json.loads((exported["own-norms"].folder / "config.json").read_text())
    assert own["attention_bias"] is False
    assert not [name for name in safe_names(exported["own-norms"].folder) if name.endswith("bias")]


def safe_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_facts_say_what_the_cache_costs(exported: dict[str, Exported]) -> None:
    facts = exported["padded"].facts
    assert facts["ranks_before"] == [29, 12]
    assert facts["kv_bytes_before"] == (29 + 8 + 12 + 8) * 4
    assert facts["kv_bytes"] == 2 * (facts["rank"] + 8) * 4
    assert (facts["rank"], facts["norm"]) == (32, "exact")
    assert exported["own-norms"].facts["norm"] == "own"
    assert exported["own-norms"].facts["rank"] == 29
    assert json.loads(json.dumps(facts)) == facts


def test_tokenizer_ladder_and_generation_config_travel(tmp_path: Path) -> None:
    from tests.evaluate.small import small

    base, tokenizer = small(layers=1)
    model = latent(base)
    model.generation_config.repetition_penalty = 1.25
    facts = export_deepseek(model, tmp_path / "out", tokenizer=tokenizer, ladder={"rungs": []})
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "model.safetensors", "ladder.json"} <= files
    assert json.loads((tmp_path / "out" / "ladder.json").read_text()) == {"rungs": [], "export": facts}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["repetition_penalty"] == 1.25
    with pytest.raises(BadArgument, match="not empty"):
        export_deepseek(model, tmp_path / "out")


# -- constants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [False, True])
def test_constants_make_the_mean_square_a_power_of_four(unit: bool) -> None:
    for rank in (*range(1, 200), 448, 508, 511, 512, 1023, 4096):
        found = constants(rank, unit=unit)
        assert sum(value * value for value in found.values) == found.dim
        assert rank + len(found.values) <= found.dim <= rank + (5 if unit else 4)
        assert not unit or (found.unit is not None and bin(found.values[found.unit]).count("1") == 1)
    with pytest.raises(Refused, match="need"):
        constants(12, dim=14)  # 14 = 9 + 4 + 1 wants a third dim


def test_no_fewer_constants_would_do() -> None:
    """Against a search over all tuples."""
    from itertools import product

    for rank in range(1, 40):
        least = next(
            total
            for total in range(rank + 1, rank + 6)
            if any(
                sum(v * v for v in values) == total
                for values in product(range(7), repeat=min(total - rank, 4))
                if any(values)
            )
        )
        assert constants(rank).dim == least, rank


def test_one_width_for_all() -> None:
    def bare(rank: int, gain: bool = False) -> Latent:
        return Latent(torch.ones(rank, 4), None, torch.ones(rank) if gain else None, torch.ones(3, rank), None, 1.0)

    assert common_dim([bare(29), bare(12)]) == constants(29).dim
    assert common_dim([bare(29, gain=True), bare(12, gain=True)]) == 29
    width = common_dim([bare(13), bare(14, gain=True), bare(12)])
    assert width == min(d for d in range(14, 30) if d >= 17 or (constants_fit(13, d) and constants_fit(12, d)))


def constants_fit(rank: int, dim: int) -> bool:
    try:
        return constants(rank, dim=dim).dim == dim
    except Refused:
        return False


# -- fitted norms ------------------------------------------------------------------------------------------------------


def test_fitted_gains_change_latents_least() -> None:
    model = latent(llama(), {"q_rank": 21})
    fits = fitted(model, [IDS])
    assert sorted(fits) == [(i, name) for i in (0, 1) for name in ("kv_a_layernorm", "q_a_layernorm")]
    seen: dict[str, Tensor] = {}
    module = decoder_layers(model)[1].self_attn
    hook = module.kv_a_layernorm.register_forward_pre_hook(lambda m, x: seen.update(c=x[0].flatten(0, -2).double()))
    logits(model)
    hook.remove()
    c, fit = seen["c"], fits[1, "kv_a_layernorm"]
    u = c / (c.square().mean(-1, keepdim=True) + EPSILON).sqrt()

    def loss(gain: Tensor) -> float:
        return float((u * gain - c).square().sum())

    best = torch.linalg.lstsq(torch.cat([torch.diag(row) for row in u]), c.flatten()).solution
    assert torch.allclose(fit.gain, best, rtol=1e-8)
    assert fit.error == pytest.approx((loss(fit.gain) / float(c.square().sum())) ** 0.5, rel=1e-9)
    assert fit.size == pytest.approx(float(c.square().mean()) ** 0.5, rel=1e-3)
    assert loss(fit.gain) < loss(torch.full_like(fit.gain, float(c.square().mean(-1).sqrt().mean())))


def test_fitted_norms_are_a_stage_and_an_export(tmp_path: Path) -> None:
    model = latent(qwen2(), {"biases": ["kv_a_proj_with_mqa"], "q_rank": 21})
    before = logits(model)
    made, facts = as_deepseek(model, norm="fitted", batches=[IDS])
    assert torch.equal(logits(model), before)  # not touched
    assert (facts["rank"], facts["q_rank"], facts["norm"]) == (29, 21, "fitted")
    stage = fit_norms(model, [IDS])
    assert stage is not None
    assert not stage.exact
    assert [0 < e < 1 for e in stage.facts["norm_error"]["kv_a_layernorm"]] == [True, True]
    assert away(logits(model), before) > 1e-4
    assert away(logits(made), logits(model)) < 1e-5
    again, facts = as_deepseek(model)
    assert facts["norm"] == "own"
    assert away(logits(again), logits(model)) < 1e-5
    assert model.config.attention_layers[1]["spec"]["norm"] == "rms"
    assert fit_norms(model, [IDS]) is None
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_an_epsilon_under_the_root_makes_no_difference() -> None:
    """Latents of tiny numbers are scaled up, so that loaders with another epsilon compute the same."""
    model = latent(llama())
    for layer in decoder_layers(model):
        layer.self_attn.kv_a_proj_with_mqa.weight.data *= 1e-4
    made, _ = as_deepseek(model, norm="fitted", batches=[IDS])
    before = logits(made)
    for layer in decoder_layers(made):
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    assert away(logits(made), before) < 2e-5


# -- refusals ----------------------------------------------------------------------------------------------------------


def plain() -> Any:
    return container(llama())


def mlp_biased() -> Any:
    model = latent(llama(mlp_bias=True))
    decoder_layers(model)[1].mlp.up_proj.bias.data += 1
    return model


def experts() -> Any:
    model = latent(llama())
    decoder_layers(model)[1].mlp = torch.nn.Identity()
    return model


def gemma() -> Any:
    model = tiny("gemma3", layers=2, heads=4, kv_heads=2)
    return container(model)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (llama, {}, "give a converted model"),
        (plain, {}, "layer 0 is LlamaAttention"),
        (gemma, {}, "cannot compute a gemma3_text model: Gemma scales its embeddings"),
        (lambda: latent(llama(), {"softcap": 30.0}), {}, "does not cap its scores"),
        (lambda: latent(llama(), {"window": 8}), {}, "no sliding window"),
        (lambda: latent(tiny("mistral", layers=2, heads=4, window=8)), {}, "no sliding window"),
        (lambda: latent(llama(), {"rank": 20}, {"rank": 12}), {}, "one kv_lora_rank, these have 20, 12; pad=True"),
        (lambda: latent(llama(), {}, {"q_rank": 12}), {}, "one q_lora_rank, these have None, 12; pad=True"),
        (lambda: latent(llama(), {"v_dim": 8}, {}), {"pad": True}, "one v_head_dim, these have 8, 16"),
        (lambda: latent(llama(), {"frequencies": [0, 1, 2, 3]}), {}, "layer 0 turns 8 dims by other frequencies"),
        (lambda: latent(llama(), {"norm": "rms", "q_rank": 9, "biases": ["q_b_proj"]}), {}, "a bias behind a norm"),
        (
            lambda: latent(llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
            {},
            "dynamic",
        ),
        (mlp_biased, {}, "the MLP of layer 1 has biases"),
        (experts, {}, "layer 1 has no gated MLP"),
        (lambda: latent(llama(), dtype=torch.float16), {}, "float16"),
        (lambda: latent(llama()), {"norm": "none"}, "norm='none': give one of exact, fitted"),
        (lambda: latent(llama()), {"norm": "fitted"}, "needs text"),
    ],
)
def test_what_deepseek_cannot_compute_is_refused(
    make: Callable[[], Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises((Refused, BadArgument), match=said) as caught:
        export_deepseek(make(), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_shape_is_that_of_latent_attention() -> None:
    model = latent(llama())
    made, _ = as_deepseek(model)
    (layer, _) = ModelShape.of(made).layers
    assert (layer.store_heads, layer.store_k_dim, layer.store_v_dim) == (1, 32 + 8, 0)
    assert made.dtype == torch.float32
