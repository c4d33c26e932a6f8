"""Multi-head latent attention: one set of weights, three ways to read it, and what it caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.errors import BadArgument
from foveate.layers.latent import LatentAttention, latent_spec
from foveate.layers.mixer import build
from foveate.models.converted import container, decoder_layers, replace
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny

SIZES: dict[str, Any] = {"num_heads": 8, "rank": 24, "rope_dim": 8, "nope_dim": 12, "v_dim": 10}
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q-rank": {"q_rank": 20, "biases": ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"]},
    "no-norm": {"norm": "none", "biases": ["q_proj", "kv_a_proj_with_mqa"]},
    "interleaved": {"interleaved": True, "scale": 0.41},
    "lifted": {"nope_dim": 0, "rope_dim": 32, "frequencies": [i for i in range(8) for _ in range(2)], "norm": "none"},
    "capped": {"softcap": 3.0},
}


def relative(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, over that of b."""
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


def made(model: Any, dtype: torch.dtype, **spec: Any) -> Any:
    """The model with a random latent layer in the place of every attention."""
    new: Any = container(model)
    torch.manual_seed(1)
    for index in range(new.config.num_hidden_layers):
        layer = replace(new, index, "latent", **{**SIZES, **spec})
        for name, parameter in layer.named_parameters():
            gain = 2.0 if name.startswith("q_") and parameter.ndim == 2 else 1.0
            noise = torch.randn(parameter.shape) * (gain * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3)
            parameter.data = (noise + (1.0 if "layernorm" in name else 0.0)).to(dtype)
    return new.to(dtype)


def set_mode(model: Any, mode: str, chunk: int = 5) -> None:
    for layer in decoder_layers(model):
        layer.self_attn.mode, layer.self_attn.chunk = mode, chunk


@torch.no_grad()
def stepwise(model: Any, tokens: Tensor, cuts: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits of several forwards over one cache, and the cache."""
    cache, outs, start = None, [], 0
    for stop in [*cuts, tokens.shape[1]]:
        seen = None if mask is None else mask[:, :stop]
        out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True, attention_mask=seen)
        cache, start = out.past_key_values, stop
        outs.append(out.logits)
    return torch.cat(outs, dim=1), cache


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_three_forms_agree_and_steps_give_the_full_forward(name: str, dtype: torch.dtype) -> None:
    base = tiny("llama", layers=2)
    if "softcap" in SPECS[name]:
        base.config._attn_implementation = "eager"
    model = made(base, dtype, **SPECS[name])
    tokens = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(0))
    limit = 1e-10 if dtype == torch.float64 else 2e-2
    with torch.no_grad():
        full = model(tokens).logits
        assert relative(full[:, 1:], full[:, :-1]) > 0.1
    for mode in ("absorbed", "chunked", "naive", "auto"):
        set_mode(model, mode)
        with torch.no_grad():
            assert relative(model(tokens).logits, full) < limit, mode
        got, _ = stepwise(model, tokens, [11, 12, 20, 21, 22])
        assert relative(got, full) < limit, mode


def test_auto_takes_the_cheapest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tiny("llama", layers=1), torch.float32)
    set_mode(model, "auto", chunk=8)
    taken: list[str] = []
    kept = LatentAttention._mode

    def watched(self: Any, *args: Any) -> str:
        taken.append(kept(self, *args))
        return taken[-1]

    monkeypatch.setattr(LatentAttention, "_mode", watched)
    tokens = torch.arange(3, 75)[None]
    stepwise(model, tokens, [7, 40, 71])
    assert taken == ["naive", "naive", "chunked", "absorbed"]


def test_few_tokens_are_read_without_expanding_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tiny("llama", layers=1), torch.float32)
    tokens = torch.arange(3, 30)[None]
    _, cache = stepwise(model, tokens, [])
    monkeypatch.setattr(LatentAttention, "expand_kv", lambda *args: pytest.fail("expanded"))
    with torch.no_grad():
        model(tokens[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("mode", ["naive", "absorbed", "chunked"])
def test_left_padding_changes_nothing(mode: str) -> None:
    model = made(tiny("llama", layers=2), torch.float64)
    set_mode(model, mode)
    tokens = torch.randint(3, 250, (2, 19), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], dim=1)
    padded[1, 4:6] = 0
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    mask[1, :6] = 0
    got, _ = stepwise(model, padded, [14, 15], mask)
    alone, _ = stepwise(model, tokens[:1], [])
    short, _ = stepwise(model, tokens[1:, 2:], [])
    # Without position_ids the padded rows stand further back, which moves no score.
    assert relative(got[:1, 4:], alone) < 1e-6
    assert relative(got[1:, 6:], short) < 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
def test_shifted_positions_change_nothing(interleaved: bool) -> None:
    model = made(tiny("llama", layers=2), torch.float64, interleaved=interleaved)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        at = [model(tokens, position_ids=torch.arange(17)[None] + shift).logits for shift in (0, 100)]
        spread = model(tokens, position_ids=2 * torch.arange(17)[None]).logits
    assert relative(at[1], at[0]) < 1e-5  # cosines are computed in float32
    assert relative(spread, at[0]) > 1e-2


@pytest.mark.parametrize("heads", [2, 8])
def test_the_cache_holds_latents_alone(heads: int) -> None:
    model = made(tiny("llama", layers=3), torch.float64, num_heads=heads)
    _, cache = stepwise(model, torch.arange(3, 20)[None], [9])
    for layer in cache.layers:
        assert layer.keys.shape == (1, 1, 17, 24) and layer.values.shape == (1, 1, 17, 8)
        assert layer.keys.nbytes + layer.values.nbytes == 17 * (24 + 8) * 8
    shape = ModelShape.of(model)
    assert shape.kv_bytes_per_token == 3 * (24 + 8) * 8
    (first, *_) = shape.layers
    assert (first.kind, first.latent, first.latent_dim, first.num_heads) == ("full", True, 24, heads)
    assert (first.head_dim, first.v_head_dim, first.store_heads) == (20, 10, 1)


def _deepseek(q_rank: int | None, interleaved: bool, yarn: bool, bias: bool) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            kv_lora_rank=16, q_lora_rank=q_rank, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
            vocab_size=256, max_position_embeddings=128, first_k_dense_replace=2, rope_interleave=interleaved,
            rope_parameters=rope, attention_bias=bias, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
        else:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
def test_weights_of_deepseek_give_the_same(q_rank: int | None, interleaved: bool, yarn: bool) -> None:
    model = _deepseek(q_rank, interleaved, yarn, bias=q_rank is not None)
    new = container(model)
    for index, layer in enumerate(decoder_layers(model)):
        mine = replace(new, index, "latent", **latent_spec(layer.self_attn))
        mine.load_state_dict(layer.self_attn.state_dict())
    tokens = torch.randint(3, 250, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(new(tokens).logits, model(tokens).logits) < 1e-5
    got, _ = stepwise(new, tokens, [20, 21])
    want, _ = stepwise(model, tokens, [20, 21])
    assert relative(got, want) < 1e-5


def test_weights_of_deepseek_v2_give_the_same() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    model: Any = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
            vocab_size=256, max_position_embeddings=128, first_k_dense_replace=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    new = container(model)
    for index, layer in enumerate(decoder_layers(model)):
        replace(new, index, "latent", **latent_spec(layer.self_attn)).load_state_dict(layer.self_attn.state_dict())
    tokens = torch.randint(3, 250, (2, 31), generator=torch.Generator().manual_seed(0))
    got, _ = stepwise(new, tokens, [20, 21])
    want, _ = stepwise(model, tokens, [20, 21])
    assert relative(got, want) < 1e-5


def test_a_static_cache() -> None:
    model = made(tiny("llama", layers=2), torch.float32)
    tokens = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    ask: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ask |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(tokens, **ask)
    static = model.generate(tokens, cache_implementation="static", **ask)
    assert relative(torch.stack(static.logits), torch.stack(plain.logits)) < 1e-5


def test_parameters_of_deepseek_v3() -> None:
    class Config:
        hidden_size = 7168

    with torch.device("meta"):
        layer = LatentAttention(
            Config(), 0, num_heads=128, rank=512, rope_dim=64, nope_dim=128, v_dim=128, q_rank=1536, interleaved=True
        )
    count = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert count == 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 16384 * 7168
    assert sum(p.numel() for p in layer.parameters()) == count + 1536 + 512
    assert layer.holds["store_heads"] * (layer.holds["store_k_dim"] + layer.holds["store_v_dim"]) * 2 == 1152
    assert 61 * 1152 == 70_272


@pytest.mark.parametrize("mode", ["naive", "absorbed", "chunked"])
def test_gradients_reach_every_weight(mode: str) -> None:
    model = made(tiny("llama", layers=1), torch.float64, q_rank=16, biases=["q_a_proj", "o_proj"])
    set_mode(model, mode)
    tokens = torch.arange(3, 16)[None]
    grads = []
    for way in ("naive", mode):
        set_mode(model, way)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        layer = decoder_layers(model)[0].self_attn
        grads.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, want in grads[0].items():
        assert want.abs().max() > 0, name
        assert relative(grads[1][name], want) < 1e-8, name


@pytest.mark.parametrize("name", ["plain", "lifted", "no-norm"])
def test_foveate_applies_to_it(name: str) -> None:
    model = made(tiny("llama", layers=2), torch.float32, **SPECS[name])
    tokens = torch.randint(3, 250, (2, 41), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    ask: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ask |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(tokens, **ask)
    with foveate.apply(model, "dense"):
        got = model.generate(tokens, **ask)
        cache = got.past_key_values
    for a, b in zip(got.logits, plain.logits, strict=True):
        assert relative(a, b) < 1e-5
    held = SIZES["rank"] + SPECS[name].get("rope_dim", SIZES["rope_dim"])
    assert ModelShape.of(model).kv_bytes_per_token == 2 * held * 4
    assert {band.keys().shape[-1] for layer in cache.layers for band in layer.store.bands} == {held}


@pytest.mark.parametrize(
    ("method", "settings", "limit"),
    [
        ("kivi", {"bits": 8, "group": 8, "residual": 8}, 0.05),
        ("xkv", {"group": 2, "rank_k": 48, "rank_v": 48}, 1e-3),
        ("quest", {"budget": 1.0}, 1e-5),
        ("snapkv", {"budget": 0.5}, None),
        ("streaming-llm", {"budget": 0.5}, None),
    ],
)
def test_methods_work_on_it(method: str, settings: dict[str, Any], limit: float | None) -> None:
    model = made(tiny("llama", layers=4), torch.float32)
    tokens = torch.randint(3, 250, (1, 61), generator=torch.Generator().manual_seed(0))
    ask: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ask |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(tokens, **ask)
    with foveate.apply(model, method, **settings):
        got = model.generate(tokens, **ask)
    assert got.sequences.shape == (1, 66)
    error = relative(got.logits[1], plain.logits[1])  # the first step that reads what is held
    assert error < limit if limit is not None else 1e-5 < error < 2.0


def test_methods_on_heads_refuse_latents() -> None:
    for method in ("think", "spatten", "deltallm"):
        with (
            pytest.raises(foveate.Refused, match="MLA"),
            foveate.apply(made(tiny("llama", layers=2), torch.float32), method),
        ):
            pass


def test_positions_are_moved_by_its_own_frequencies() -> None:
    from foveate import compat

    model = made(tiny("llama", layers=2), torch.float64, frequencies=[0, 3, 3, 5])
    frequencies, last = compat.rotary(model)
    base = model.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, base[[0, 3, 3, 5]]) and last
    even = made(tiny("llama", layers=2), torch.float64)
    assert torch.equal(compat.rotary(even)[0], base[::2])


def test_it_is_saved_and_opened(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = made(tiny("llama", layers=2), torch.float32, **SPECS["q-rank"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"rope_dim": 7}, "rope_dim"),
        ({"frequencies": [0, 1]}, "frequencies"),
        ({"norm": "layer"}, "norm"),
        ({"biases": ["kv_b_proj"]}, "biases"),
        ({"rank": 0}, "rank"),
    ],
)
def test_what_does_not_fit_is_named(spec: dict[str, Any], named: str) -> None:
    with pytest.raises(BadArgument, match=named):
        build("latent", tiny("llama", layers=1).config, 0, {**SIZES, **spec})
