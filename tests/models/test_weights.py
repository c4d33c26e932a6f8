"""Head-wise weights say what an attention module computes, and go back to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.closeness import assert_close
from tests.families import FAMILIES, LATENT, family_model
from torch import Tensor

from foveate.errors import BadArgument, Refused
from foveate.models.converted import container
from foveate.models.converted import replace as replace_layer
from foveate.models.weights import HeadWeights, LatentWeights, read_heads, read_latent, write_heads, write_latent


def modules(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def rotate(x: Tensor, angle_cos: Tensor, angle_sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs of x [N, 2m] turned by angles [N, m], one pair after the other."""
    out = torch.empty_like(x)
    pairs = x.shape[-1] // 2
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        c, s = angle_cos[:, i], angle_sin[:, i]
        out[:, a], out[:, b] = c * x[:, a] - s * x[:, b], s * x[:, a] + c * x[:, b]
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
    rows = []
    for i in range(q.shape[0]):
        first = 0 if window is None else max(0, i + 1 - window)
        scores = k[first : i + 1] @ q[i] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(scores.softmax(0) @ v[first : i + 1])
    return torch.stack(rows)


def by_heads(x: Tensor, w: HeadWeights, cos: Tensor, sin: Tensor) -> Tensor:
    """What the layer makes of x [N, d], one head at a time."""
    out = torch.zeros_like(x)
    for h in range(w.q.shape[0]):
        g = h // w.groups
        q, k, v = x @ w.q[h].T, x @ w.k[g].T, x @ w.v[g].T
        if w.q_bias is not None and w.k_bias is not None and w.v_bias is not None:
            q, k, v = q + w.q_bias[h], k + w.k_bias[g], v + w.v_bias[g]
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, w.norm_eps), rms_norm(k, w.k_norm, w.norm_eps)
        turned = [
            torch.cat([rotate(t[:, : w.rotary_dim], cos, sin, False), t[:, w.rotary_dim :]], dim=1) for t in (q, k)
        ]
        out += attend(turned[0], turned[1], v, w.scale, w.softcap, w.window) @ w.o[h].T
    return out if w.o_bias is None else out + w.o_bias


def by_latents(x: Tensor, w: LatentWeights, cos: Tensor, sin: Tensor) -> Tensor:
    def plus(y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + bias

    c = plus(x @ w.w_dkv.T, w.dkv_bias)
    c = c if w.kv_norm is None else rms_norm(c, w.kv_norm, w.eps)
    key = rotate(plus(x @ w.w_kr.T, w.kr_bias), cos, sin, w.interleaved)
    source, heads = x, w.q
    if heads is None:
        assert w.q_a is not None and w.q_b is not None
        source, heads = plus(x @ w.q_a.T, w.q_a_bias), w.q_b
        source = source if w.q_norm is None else rms_norm(source, w.q_norm, w.eps)
    out, nope = torch.zeros_like(x), w.w_uk.shape[1]
    for h in range(heads.shape[0]):
        q = plus(source @ heads[h].T, None if w.q_bias is None else w.q_bias[h])
        q = torch.cat([q[:, :nope], rotate(q[:, nope:], cos, sin, w.interleaved)], dim=1)
        k = torch.cat([c @ w.w_uk[h].T, key], dim=1)
        out += attend(q, k, c @ w.w_uv[h].T, w.scale, None, None) @ w.o[h].T
    return plus(out, w.o_bias)


def seen(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each layer's attention what it read, the cosines and sines of its angles, and what it returned; one row."""
    caught: list[Any] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        angles = kwargs["position_embeddings"]
        if isinstance(angles, Tensor):
            cos, sin = angles.real, angles.imag
        else:
            cos, sin = (t[..., : t.shape[-1] // 2] for t in angles)
        x = args[0] if args else kwargs["hidden_states"]
        caught.append((x[0], cos[0], sin[0], out[0][0]))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules(model)]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return caught


def limit(family: str) -> float:
    """Norms, eager attention (whose softmax is float32) and DeepSeek-V2's rotation leave float64."""
    return 1e-6 if family in ("qwen3", "gemma2", "gemma3", *LATENT) else 1e-11


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_compute_what_the_module_computes(family, kv_heads, seed):
    model = family_model(family, kv_heads=kv_heads, seed=seed, dtype=torch.float64)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers' SDPA leaves the softcap out
    ids = torch.randint(3, 250, (1, 13), generator=torch.Generator().manual_seed(seed))
    for module, (x, cos, sin, out) in zip(modules(model), seen(model, ids), strict=True):
        weights = read_heads(module)
        assert weights.groups == 8 // kv_heads
        assert_close(by_heads(x.double(), weights, cos.double(), sin.double()), out, limit(family))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek-v2", {}),
        ("deepseek-v2", {"q_lora_rank": 24}),
        ("deepseek-v3", {}),
        ("deepseek-v3", {"q_lora_rank": 24, "rope_interleave": False}),
        (
            "deepseek-v3",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.7,
                }
            },
        ),
    ],
)
def test_latent_weights_compute_what_the_module_computes(family, changes, seed):
    model = family_model(family, seed=seed, dtype=torch.float64, **changes)
    ids = torch.randint(3, 250, (1, 13), generator=torch.Generator().manual_seed(seed))
    for module, (x, cos, sin, out) in zip(modules(model), seen(model, ids), strict=True):
        weights = read_latent(module)
        if "rope_parameters" in changes:
            assert weights.scale > 1.1 * 24**-0.5
        assert_close(by_latents(x.double(), weights, cos.double(), sin.double()), out, limit(family))


@pytest.mark.parametrize(
    "spec",
    [
        {"rope_dim": 4, "q_rank": None, "biases": ["q_proj", "o_proj", "kv_a_proj_with_mqa"], "interleaved": True},
        {
            "rope_dim": 6,
            "q_rank": 20,
            "biases": ["q_a_proj", "q_b_proj"],
            "norm": "none",
            "frequencies": [1, 0, 5],
            "scale": 0.3,
        },
    ],
)
def test_latent_layers_of_converted_models_are_read_and_written_like_deepseek_s(spec, seed):
    model = container(family_model("llama", seed=seed))
    for layer in range(2):
        replace_layer(model, layer, "latent", num_heads=4, rank=12, nope_dim=5, v_dim=7, **spec)
    model = model.double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 250, (1, 13), generator=torch.Generator().manual_seed(seed))
    for module, (x, cos, sin, out) in zip(modules(model), seen(model, ids), strict=True):
        weights = read_latent(module)
        chosen = module.frequency_indices(8)
        assert_close(by_latents(x, weights, cos[:, chosen].double(), sin[:, chosen].double()), out, 1e-11)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        for parameter in module.parameters():
            parameter.data.zero_()
        write_latent(module, weights)
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, *LATENT])
def test_what_is_read_goes_back_to_the_bit(family, dtype, seed):
    source = family_model(family, seed=seed, dtype=dtype)
    target = family_model(family, seed=seed, dtype=dtype)
    read, write = (read_latent, write_latent) if family in LATENT else (read_heads, write_heads)
    with torch.no_grad():
        for module in modules(source):
            for parameter in module.parameters():
                if parameter.ndim == 1:  # 1 + w drops the digits of these
                    parameter[1], parameter[2] = 1e-19, -3e-25
    for module in modules(source):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        write(module, read(module))
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    if family != "gemma3":
        # Into other weights as well; there a gain of 1 + w is all that is known of w.
        with torch.no_grad():
            for parameter in (p for module in modules(target) for p in module.parameters()):
                parameter.zero_()
        for module, other in zip(modules(source), modules(target), strict=True):
            write(other, read(module))
            assert all(torch.equal(module.state_dict()[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("family", [*FAMILIES, *LATENT])
def test_every_parameter_is_read_and_is_a_copy(family):
    read = read_latent if family in LATENT else read_heads
    module = modules(family_model(family))[1]
    weights = read(module, torch.float32)
    tensors = [value for value in vars(weights).values() if isinstance(value, Tensor)]
    assert sum(t.numel() for t in tensors) == sum(p.numel() for p in module.parameters())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_gain_is_given_as_multiplied_and_written_as_the_family_writes_it():
    module = modules(family_model("gemma3"))[0]
    weights = read_heads(module)
    assert weights.q_norm is not None
    assert torch.equal(weights.q_norm, 1 + module.q_norm.weight.double())
    weights.q_norm = torch.full((16,), 3.0, dtype=torch.float64)
    write_heads(module, weights)
    assert torch.equal(module.q_norm.weight.detach(), torch.full((16,), 2.0))
    qwen = modules(family_model("qwen3"))[0]
    gain = read_heads(qwen).q_norm
    assert gain is not None and torch.equal(gain, qwen.q_norm.weight.double())


def test_windows_softcap_scale_and_rotary_dims_are_those_of_the_layer():
    gemma = [read_heads(module) for module in modules(family_model("gemma2"))]
    assert [w.window for w in gemma] == [5, None]
    assert [w.softcap for w in gemma] == [3.0, 3.0]
    assert gemma[0].scale == 20**-0.5
    assert read_heads(modules(family_model("mistral"))[0]).window == 5
    assert read_heads(modules(family_model("phi3"))[0]).window == 7
    assert read_heads(modules(family_model("llama"))[0]).window is None
    dims = {family: read_heads(modules(family_model(family))[0]).rotary_dim for family in ("llama", "phi", "phi3")}
    assert dims == {"llama": 16, "phi": 8, "phi3": 12}


@pytest.mark.parametrize(
    ("family", "change", "name"),
    [
        ("llama", {"scale": 1.0}, "scale"),
        ("llama", {"window": 3}, "window"),
        ("llama", {"softcap": 3.0}, "softcap"),
        ("llama", {"rotary_dim": 8}, "rotary_dim"),
        ("llama", {"k": torch.ones(4, 16, 64)}, "k="),
        ("llama", {"o": torch.ones(4, 64, 32)}, "o="),
        ("llama", {"o_bias": torch.ones(64)}, "o_bias"),
        ("llama", {"q_norm": torch.ones(16)}, "q_norm"),
        ("qwen3", {"q_norm": None}, "q_norm"),
        ("qwen3", {"k_norm": torch.ones(8)}, "k_norm"),
        ("qwen2", {"q_bias": torch.ones(3)}, "q_bias"),
        ("deepseek-v3", {"scale": 1.0}, "scale"),
        ("deepseek-v3", {"interleaved": False}, "interleaved"),
        ("deepseek-v3", {"q_b": None}, "q="),
        ("deepseek-v3", {"kv_norm": torch.ones(3)}, "kv_norm"),
        ("deepseek-v3", {"w_dkv": torch.ones(3, 64)}, "w_dkv"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(family, change, name):
    module = modules(family_model(family))[0]
    read, write = (read_latent, write_latent) if family in LATENT else (read_heads, write_heads)
    weights = read(module)
    for tensor in (value for value in vars(weights).values() if isinstance(value, Tensor)):
        tensor.mul_(2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(BadArgument, match=name):
        write(module, replace(weights, **change))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_bias_that_is_not_given_is_zero():
    module = modules(family_model("qwen2"))[0]
    weights = read_heads(module)
    write_heads(module, replace(weights, q_bias=None))
    assert not module.q_proj.bias.count_nonzero() and module.k_proj.bias.count_nonzero()
    llama = modules(family_model("llama"))[0]
    write_heads(llama, replace(read_heads(llama), q_bias=torch.zeros(8, 16)))


def test_the_other_kind_of_module_is_refused_with_who_reads_it():
    with pytest.raises(Refused, match="read_latent"):
        read_heads(modules(family_model("deepseek-v3"))[0])
    with pytest.raises(Refused, match="read_heads"):
        read_latent(modules(family_model("llama"))[0])
    with pytest.raises(Refused, match="o_proj"):
        read_heads(torch.nn.Linear(2, 2))


def test_norms_with_a_mean_and_wrapped_projections_are_refused():
    with pytest.raises(Refused, match="mean"):
        read_heads(modules(family_model("phi", qk_layernorm=True))[0])
    wrapped: Any = get_peft_model(family_model("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(Refused, match="merge adapters"):
        read_heads(modules(wrapped.base_model.model)[0])
