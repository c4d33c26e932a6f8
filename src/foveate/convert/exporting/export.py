"""Write a model of latent attention as a stock DeepSeek-V3 checkpoint, which needs nothing of Foveate to be opened."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.convert.exporting.deepseek_layout import Latent, bias_of, common_dim, interleaved, query_rows
from foveate.convert.saving import check_free, save
from foveate.convert.surgery.latent_norms import Fit, fitted
from foveate.errors import BadArgument, Refused
from foveate.layers.latent import LatentAttention
from foveate.models.converted import FAMILIES, PREFIX, decoder_layers, is_converted
from foveate.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FAMILY = "deepseek_v3"
NORMS = ("exact", "fitted")

_OTHERWISE = {
    "gemma2": "Gemma caps its scores, scales its embeddings and norms what each layer returns",
    "gemma3_text": "Gemma scales its embeddings and norms what each layer returns",
    "phi": "Phi's attention and MLP read the same norm side by side",
}
_ROTARY = ("default", "linear", "llama3", "yarn")
_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
)


def export_deepseek(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    norm: str = "exact",
    batches: Iterable[Tensor] | None = None,
    pad: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ladder: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Save the model as a folder of type deepseek_v3, whole or not at all.

    Args, errors and result as of `as_deepseek`, and:
        folder: new or empty.
        tokenizer: saved beside the model.
        ladder: plain JSON, written as `ladder.json` with the result under "export".
    """
    check_free(Path(folder))
    made, facts = as_deepseek(model, norm=norm, batches=batches, pad=pad)
    save(made, tokenizer, folder, None if ladder is None else {**ladder, "export": facts})
    return facts


@torch.no_grad()
def as_deepseek(
    model: PreTrainedModel, *, norm: str = "exact", batches: Iterable[Tensor] | None = None, pad: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as transformers' own DeepseekV3ForCausalLM; weights outside attention are shared with it.

    DeepSeek norms every latent. Layers whose latents are normed keep their norms; for others:

    Args:
        model: of a converted type, all layers `LatentAttention` of the same numbers.
        norm: "exact" adds one to four constant dims to each latent, beside which the norm is a multiplication by a
            power of two: the same function, to rounding, with biases that serving engines may not read. "fitted" takes
            real norms with the gains that change the latents of `batches` least: another function, to be healed.
        batches: token ids [B, N], for norm="fitted".
        pad: fill latents of different ranks up to the largest, instead of refusing them. The cache grows with it.

    Returns:
        The model, and facts as plain JSON: the numbers, the bytes of the cache per token before and after.

    Raises:
        BadArgument: an unknown norm, or no text for "fitted".
        Refused: DeepSeek's decoder cannot compute this model; the message says why.
    """
    if norm not in NORMS:
        raise BadArgument("norm", norm, f"give one of {', '.join(NORMS)}")
    if norm == "fitted" and batches is None:
        raise BadArgument("batches", None, 'norm="fitted" needs text; give token ids')
    layers = _layers(model, pad)
    fits = fitted(model, batches) if norm == "fitted" and batches is not None else {}
    kv = [_kv(model, index, layer, fits) for index, layer in enumerate(layers)]
    plain = all(layer.q_lora_rank is None and bias_of(layer.q_proj) is None for layer in layers)
    q = [] if plain else [_q(model, index, layer, fits) for index, layer in enumerate(layers)]
    rank, q_rank = common_dim(kv), common_dim(q) if q else None
    bias = any(latent.gain is None or latent.bias is not None for latent in (*kv, *q))
    bias = bias or any(bias_of(layer.o_proj) is not None for layer in layers)
    made: Any = _empty(model, layers[0], rank, q_rank, bias)
    state = _outside(model)
    for index, layer in enumerate(layers):
        rows = interleaved(layer.qk_rope_head_dim, _order(model, made, index, layer), layer.interleaved)
        attention = _keys(layer, kv[index].laid_out(rank), rows, bias)
        scaling = made.model.layers[index].self_attn.scaling
        attention |= _queries(layer, q[index] if q else None, q_rank, rows, scaling, bias)
        state |= {f"model.layers.{index}.self_attn.{name}": tensor for name, tensor in attention.items()}
    made.load_state_dict(state, strict=True, assign=True)
    before, after = (ModelShape.of(each).kv_bytes_per_token for each in (model, made))
    facts = {
        "architecture": type(made).__name__,
        "norm": norm if any(layer.norm == "none" for layer in layers) else "own",
        "norm_error": [fits[key].error for key in sorted(fits)] or None,
        "rank": rank,
        "q_rank": q_rank,
        "biases": bias,
        "ranks_before": [layer.kv_lora_rank for layer in layers],
        "kv_bytes_before": before,
        "kv_bytes": after,
    }
    return made.eval(), facts


def check_around(model: Any) -> None:
    """Refuse a model, be it converted or not, if what is around its attention is not what DeepSeek's decoder has.

    Raises:
        Refused: with the reason.
    """
    family = model.config.model_type.removeprefix(PREFIX)
    if model.dtype == torch.float16:
        raise Refused("float16 has no room for an export's constants; load the model in bfloat16 or float32")
    if family in _OTHERWISE:
        raise Refused(f"DeepSeek's decoder cannot compute a {family} model: {_OTHERWISE[family]}")
    if family not in FAMILIES:
        raise Refused(
            f"{family} models cannot be exported; {', '.join(f for f in FAMILIES if f not in _OTHERWISE)} can"
        )
    for index, block in enumerate(decoder_layers(model)):
        _check_mlp(index, block.mlp)


def _layers(model: Any, pad: bool) -> list[LatentAttention]:
    """The attention layers, if DeepSeek's decoder has all that this model is made of."""
    if not is_converted(model):
        raise BadArgument("model", type(model).__name__, "give a converted model")
    check_around(model)
    layers = [block.self_attn for block in decoder_layers(model)]
    for index, layer in enumerate(layers):
        if not isinstance(layer, LatentAttention):
            what = type(layer).__name__
            raise Refused(f"only models of latent attention alone can be exported; layer {index} is {what}")
        if layer.softcap is not None:
            raise Refused(f"DeepSeek's attention does not cap its scores, which layer {index} does")
    stated = getattr(model.config, "layer_types", None) or compat.layer_types(model)
    windowed = {layer.sliding_window for layer in layers} - {None} or set(stated) - {"full_attention"}
    if windowed:
        raise Refused("DeepSeek's attention has no sliding window, which layers of this model have")
    names = ["num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    for name in names if pad else [*names, "kv_lora_rank", "q_lora_rank"]:
        values = list(dict.fromkeys(str(getattr(layer, name)) for layer in layers))
        if len(values) > 1:
            mend = "; pad=True fills them up to the largest" if name.endswith("rank") else ""
            shown = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
            raise Refused(f"all layers of a DeepSeek model have one {name}, these have {shown}{mend}")
    return layers


def _check_mlp(index: int, mlp: Any) -> None:
    parts = _GATED if hasattr(mlp, "gate_proj") else _FUSED
    linear = [getattr(mlp, name, None) for name in parts]
    if not all(isinstance(part, nn.Linear) for part in linear):
        raise Refused(f"layer {index} has no gated MLP of linear maps ({type(mlp).__name__}): only those are exported")
    if any(bias_of(part) is not None for part in linear if isinstance(part, nn.Linear)):
        raise Refused(f"the MLP of layer {index} has biases, DeepSeek's has none")


def _reach(model: Any, index: int) -> float:
    """The longest that the input of a layer's attention can be: it comes out of an RMS norm."""
    gain = decoder_layers(model)[index].input_layernorm.weight
    return float(gain.abs().max()) * math.sqrt(gain.numel())


def _kv(model: Any, index: int, layer: LatentAttention, fits: Mapping[tuple[int, str], Fit]) -> Latent:
    rank, down = layer.kv_lora_rank, layer.kv_a_proj_with_mqa
    bias = bias_of(down)
    return _latent(
        layer.kv_a_layernorm,
        fits.get((index, "kv_a_layernorm")),
        Latent(
            down.weight[:rank],
            None if bias is None else bias[:rank],
            None,
            layer.kv_b_proj.weight,
            None,
            _reach(model, index),
        ),
    )


def _q(model: Any, index: int, layer: LatentAttention, fits: Mapping[tuple[int, str], Fit]) -> Latent:
    reach = _reach(model, index)
    if layer.q_lora_rank is None:
        # DeepSeek has a bias on the queries' down-projection only: the input itself is the latent.
        weight = layer.q_proj.weight
        whole = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return Latent(whole, None, None, weight, bias_of(layer.q_proj), reach)
    down, up = layer.q_a_proj, layer.q_b_proj
    latent = Latent(down.weight, bias_of(down), None, up.weight, bias_of(up), reach)
    # Where a bias stands behind the latent, the constants that carry it leave no room for a real norm.
    fit = fits.get((index, "q_a_layernorm")) if latent.up_bias is None else None
    latent = _latent(layer.q_a_layernorm, fit, latent)
    if latent.gain is not None and latent.up_bias is not None:
        raise Refused(f"the queries of layer {index} have a bias behind a norm, DeepSeek's have none")
    return latent


def _latent(norm: nn.Module, fit: Fit | None, bare: Latent) -> Latent:
    """The latent with the norm that the layer has, or with the fitted one."""
    if isinstance(norm, nn.RMSNorm):
        return replace(bare, gain=norm.weight)
    if fit is None:
        return bare
    bias = None if bare.bias is None else bare.bias * fit.scale
    return replace(bare, down=bare.down * fit.scale, bias=bias, gain=fit.gain.to(bare.down))


def _empty(model: Any, layer: LatentAttention, rank: int, q_rank: int | None, bias: bool) -> PreTrainedModel:
    """The stock model of these numbers without weights."""
    config_class, model_class = compat.causal_classes(FAMILY)
    old = model.config
    rope = {name: value for name, value in old.rope_parameters.items() if name != "partial_rotary_factor"}
    if rope.get("rope_type", "default") not in _ROTARY:
        raise Refused(f"rotary angles of type {rope['rope_type']} change with the dims; {', '.join(_ROTARY)} do not")
    config = config_class(
        **{name: getattr(old, name) for name in _SAME if hasattr(old, name)},
        num_attention_heads=layer.num_heads,
        num_key_value_heads=layer.num_heads,
        kv_lora_rank=rank,
        q_lora_rank=q_rank,
        qk_rope_head_dim=layer.qk_rope_head_dim,
        qk_nope_head_dim=layer.qk_nope_head_dim,
        v_head_dim=layer.v_head_dim,
        attention_bias=bias,
        rope_parameters=rope,
        rope_interleave=True,
        # Every layer has a dense MLP, and no further token is predicted: the numbers of experts are read by nobody.
        first_k_dense_replace=old.num_hidden_layers,
        moe_intermediate_size=old.intermediate_size,
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        # Engines that read DeepSeek never tie the head to the embeddings, and would find no weights for it.
        tie_word_embeddings=False,
    )
    # Where readers from before transformers 5 look for it, such as those that serving engines carry.
    config.rope_theta = rope["rope_theta"]
    config.dtype = model.dtype
    config.name_or_path = old.name_or_path
    with torch.device("meta"):
        made = model_class(config)
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to(model.device)
    if model.generation_config is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made


def _outside(model: Any) -> dict[str, Tensor]:
    """The weights that are not attention's, under DeepSeek's names."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    for name in [name for name in state if name.endswith("mlp.gate_up_proj.weight")]:
        gate, up = state.pop(name).chunk(2)
        stem = name.removesuffix("gate_up_proj.weight")
        state |= {f"{stem}gate_proj.weight": gate.clone(), f"{stem}up_proj.weight": up.clone()}
    state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    return {name: tensor for name, tensor in state.items() if not name.endswith("_proj.bias")}


def _order(model: Any, made: Any, index: int, layer: LatentAttention) -> list[int]:
    """Which of the layer's rotated pairs turns as DeepSeek's first pair, its second, ...

    Raises:
        Refused: they turn by other frequencies.
    """
    ours, theirs = model.model.rotary_emb, made.model.rotary_emb
    base = ours.inv_freq.double().cpu()
    turned = base[torch.tensor(layer.frequency_indices(len(base)))].tolist()
    order: list[int] = []
    for frequency in theirs.inv_freq.tolist():
        near = (i for i, own in enumerate(turned) if i not in order and math.isclose(own, frequency, rel_tol=1e-5))
        order.append(next(near, -1))
    if -1 in order or ours.attention_scaling != theirs.attention_scaling:
        dim = layer.qk_rope_head_dim
        raise Refused(
            f"layer {index} turns {dim} dims by other frequencies than theta^(-2i/{dim}), which DeepSeek's turn by"
        )
    return order


def _keys(layer: LatentAttention, latent: Latent, rows: Tensor, bias: bool) -> dict[str, Tensor]:
    """The weights behind keys, values and output."""
    down = layer.kv_a_proj_with_mqa
    rotated = down.weight[layer.kv_lora_rank :][rows.to(down.weight.device)]
    assert latent.gain is not None
    found = {
        "kv_a_proj_with_mqa.weight": torch.cat([latent.down, rotated]),
        "kv_a_layernorm.weight": latent.gain,
        "kv_b_proj.weight": latent.up,
        "o_proj.weight": layer.o_proj.weight,
    }
    if bias:
        added = rotated.new_zeros(len(rows)) if down.bias is None else down.bias[layer.kv_lora_rank :][rows]
        own = rotated.new_zeros(len(latent.down)) if latent.bias is None else latent.bias
        found["kv_a_proj_with_mqa.bias"] = torch.cat([own, added])
        out = bias_of(layer.o_proj)
        found["o_proj.bias"] = layer.o_proj.weight.new_zeros(layer.o_proj.out_features) if out is None else out
    return {name: tensor.detach() for name, tensor in found.items()}


def _queries(
    layer: LatentAttention, latent: Latent | None, q_rank: int | None, rows: Tensor, scaling: float, biased: bool
) -> dict[str, Tensor]:
    """The weights behind queries, which also carry what DeepSeek does not scale scores by."""
    factor = layer.scaling / scaling

    def moved(x: Tensor) -> Tensor:
        return query_rows(x, layer.num_heads, layer.qk_rope_head_dim, rows, factor)

    if latent is None or q_rank is None:
        return {"q_proj.weight": moved(layer.q_proj.weight.detach())}
    up_bias = None if latent.up_bias is None else moved(latent.up_bias)
    laid = replace(latent, up=moved(latent.up), up_bias=up_bias).laid_out(q_rank)
    assert laid.gain is not None
    found = {"q_a_proj.weight": laid.down, "q_a_layernorm.weight": laid.gain, "q_b_proj.weight": laid.up}
    if biased:
        found["q_a_proj.bias"] = laid.down.new_zeros(q_rank) if laid.bias is None else laid.bias
    return {name: tensor.detach() for name, tensor in found.items()}
