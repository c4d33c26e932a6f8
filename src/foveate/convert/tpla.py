"""TPLA: the latent of MLA turned so that it can be cut over ranks, each of which serves all heads with its slice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.compat import is_latent
from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.alignment import OPTIMIZERS, align
from foveate.convert.surgery.latent_slices import BASES, SCALES, basis, choose
from foveate.errors import BadArgument, Refused
from foveate.heads.moments import collect
from foveate.layers.latent import LatentAttention, latent_spec
from foveate.models.converted import decoder_layers, replace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True)
class TPLA(Conversion):
    """Tensor parallel latent attention (2508.15881), for models with latent attention: DeepSeek's and converted ones.

    The latent norm's gain goes into what follows it, and the latent is turned by an orthogonal matrix that suits being
    cut (section 4.2); neither changes the model. Then the latent is cut (`layers.tensor_latent`), which does. The two
    factors of each slice are chosen per layer by the error of the layer's output on the calibration text, where the
    paper takes "variance" for both: on some latents that is worse than no factor.

    Args:
        shards: ranks, each of which holds one slice. What they do not divide is cut as evenly as it goes.
        basis: "pca" of the calibration text's normed latents, "hadamard" with random signs, "identity".
        separation: read prompts whole and only decode from slices; the paper's recommendation. What is measured on a
            text in one forward is then as before: the loss is in decoding (`output_error` of the stage).
        grouped: each rank serves its own share of the heads alone (GLA, the paper's baseline); 9 heads over 4 ranks are
            3, 2, 2 and 2.
        norm_scale, score_scale: how a slice makes up for the norm and the scores of the whole: "none", "variance",
            "least-squares", or "auto": the best of them.
        seed: of the signs.
        align: passes over the calibration text in which each sliced layer learns to return what it returned before.
        rate, optimizer: of the alignment; "muon" or "adamw".
    """

    id = "tpla"
    what = "cut the latent of MLA over ranks, all heads on each (TPLA)"

    shards: int = 2
    basis: str = "pca"
    separation: bool = True
    grouped: bool = False
    norm_scale: str = "auto"
    score_scale: str = "auto"
    seed: int = 0
    align: int = 0
    rate: float = 1e-6
    optimizer: str = "muon"

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        for name, value, known in (
            ("basis", self.basis, BASES),
            ("norm_scale", self.norm_scale, ("auto", *SCALES)),
            ("score_scale", self.score_scale, ("auto", *SCALES)),
            ("optimizer", self.optimizer, tuple(OPTIMIZERS)),
        ):
            if value not in known:
                raise BadArgument(name, value, f"give one of {', '.join(known)}")
        latent = _latent(model)
        if not latent:
            raise Refused(f"{shape.name} has no latent attention (MLA) to cut; convert it to MLA first")
        for index, module in latent.items():
            if getattr(module, "shards", 1) > 1:
                raise Refused(f"layer {index} of {shape.name} is cut into {module.shards} slices already")
            most = min(module.kv_lora_rank, module.num_heads) if self.grouped else module.kv_lora_rank
            if not 1 <= self.shards <= most:
                what = "heads, of which each shard needs one" if most < module.kv_lora_rank else "dims of the latent"
                raise BadArgument("shards", self.shards, f"give 1 to {most}: layer {index} has {most} {what}")
        if self.align < 0 or self.rate <= 0:
            raise BadArgument("align" if self.align < 0 else "rate", min(self.align, self.rate), "give more")
        if self.align and (self.separation or self.shards == 1):
            raise BadArgument("align", self.align, "it needs shards, and separation=False: prompts are read whole else")

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        for index, module in _latent(model).items():
            spec = module.spec if isinstance(module, LatentAttention) else latent_spec(module)
            _fold(_put(model, index, spec))
        yield Stage("fold the norm's gain", True)

        calibration.watch("reading latents")
        norms = {index: module.kv_a_layernorm for index, module in _latent(model).items()}
        for index, held in collect(model, norms, calibration.batches(), side="output").items():
            _turn(_latent(model)[index], basis(self.basis, held.second, self.seed))
        yield Stage("turn the latent", True, {"basis": self.basis})

        if self.shards == 1:
            return
        for index, module in _latent(model).items():
            factors = {"norm_scale": None, "score_scale": None}
            _put(model, index, module.spec | {"shards": self.shards, "grouped": self.grouped} | factors)
        facts = choose(model, _latent(model), calibration, self.norm_scale, self.score_scale)
        teachers = _latent(model) if self.align else {}
        for index, module in _latent(model).items():
            _put(model, index, module.spec | {"separation": self.separation})
        cut = _latent(model).values()
        facts["rank_elements"] = [module.rank_elements for module in cut]
        facts["whole_elements"] = [module.kv_lora_rank + module.qk_rope_head_dim for module in cut]
        yield Stage("cut the latent", False, facts)

        if self.align:
            # Behind the slices the same weights, read whole, are the model as it was before the cut.
            losses = align(model, calibration, teachers, self.align, self.rate, self.optimizer)
            yield Stage("align the layers", False, {"error": losses})


def _latent(model: Any) -> dict[int, Any]:
    """The latent attention modules, by layer."""
    modules = {
        index: layer.self_attn for index, layer in enumerate(decoder_layers(model)) if hasattr(layer, "self_attn")
    }
    return {index: module for index, module in modules.items() if is_latent(module)}


def _put(model: PreTrainedModel, index: int, spec: dict[str, Any]) -> Any:
    """The layer with these numbers and the weights that it has."""
    state = decoder_layers(model)[index].self_attn.state_dict()
    made = replace(model, index, "tensor-latent", **spec)
    made.load_state_dict(state)
    return made


@torch.no_grad()
def _fold(module: Any) -> None:
    """Move the gain of the latent's norm into the up-projection: a norm without one commutes with rotations."""
    if module.norm == "rms":
        module.kv_b_proj.weight.mul_(module.kv_a_layernorm.weight)
        module.kv_a_layernorm.weight.fill_(1)


@torch.no_grad()
def _turn(module: Any, turned: Tensor) -> None:
    """Turn the latent c into c U and what reads it back; U is [r, r], orthogonal, float64."""
    down, up, rank = module.kv_a_proj_with_mqa, module.kv_b_proj, module.kv_lora_rank
    down.weight[:rank] = (turned.T @ down.weight[:rank].double()).to(down.weight)
    if down.bias is not None:
        down.bias[:rank] = (down.bias[:rank].double() @ turned).to(down.bias)
    up.weight.copy_(up.weight.double() @ turned)
