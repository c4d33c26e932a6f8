"""Zebra-Llama: some layers keep a small latent per token, the others a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.latent_init import joint_svd, largest_rank, put_latent
from foveate.convert.surgery.layer_distillation import ild
from foveate.convert.surgery.layer_plan import every, listed, sensitivities, smart, spread
from foveate.convert.surgery.state_init import check_states, put_states, state_bytes
from foveate.errors import BadArgument, Infeasible, Refused
from foveate.models.converted import KEY, container, decoder_layers, replace
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACEMENTS = ("smart", "spread")


@register
@dataclass(frozen=True)
class ZebraLlama(Conversion):
    """A hybrid of latent attention and Mamba-2 (Zebra-Llama, arXiv 2505.17272).

    Latent layers begin as in X-EcoMLA (section 3.1), Mamba-2 layers as in MambaInLlama. Each new layer can first learn
    from its teacher's layer (ILD, section 3.2). Which layers become latent can be told by what each does for the output
    (SMART, section 3.3): a model of Mamba-2 layers alone is tried with one latent layer at a time. What the paper does
    next, end-to-end distillation and DPO, is healing; without it such a model is not fit for use.

    The published models have ranks of 128, 160 at 8B, and a query rank below the width; here the rank follows from the
    bytes that a token may cost. States are not counted in them: they do not grow.

    Args:
        mla_layers: the latent layers: "even" for 0, 2, 4, ..., their numbers, or how many.
        placement: of a number of layers: "smart" by scores, "spread" evenly.
        kv: share of the dense cache's bytes per token, which sets the rank.
        rank: of the latents, in place of `kv`.
        rope_dim: dims of a head that stay rotated; None: half of them.
        q_rank: of the queries' own down-projection; None: one matrix, as before.
        rope_rows: which dims stay rotated (see `latent_init.joint_svd`): "last" as published, "even" or "fastest"
            nearer to what the model did.
        conv: taps of the Mamba-2 layers' convolution.
        repeat_first: repeat values and keys over their group before the convolution.
        ild_steps: of intermediate-layer distillation, one batch of the calibration text each; 0: none. The paper
            spends a fifth of its 7 to 11 billion tokens on it.
        ild_lr: its learning rate; the paper has 1e-4 at 8B.
        scored: calibration sequences on which layers are scored.
    """

    id: ClassVar[str] = "zebra-llama"
    what: ClassVar[str] = "latent attention in some layers, Mamba-2 in the others; needs healing (Zebra-Llama)"

    mla_layers: str | int | Sequence[int] = "even"
    placement: str = "smart"
    kv: float | None = 0.25
    rank: int | None = None
    rope_dim: int | None = None
    q_rank: int | None = None
    rope_rows: str = "last"
    conv: int = 4
    repeat_first: bool = False
    ild_steps: int = 0
    ild_lr: float = 2e-4
    scored: int = 4

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_states(model)
        if any(getattr(model.config, KEY, None) or ()):
            raise Refused("layers of this model were replaced already; convert it as it came")
        for name, least in (("ild_steps", 0), ("conv", 1), ("scored", 1)):
            if getattr(self, name) < least:
                raise BadArgument(name, getattr(self, name), f"give at least {least}")
        if self.placement not in PLACEMENTS:
            raise BadArgument("placement", self.placement, f"give one of {', '.join(PLACEMENTS)}")
        weights = read_heads(decoder_layers(model)[0].self_attn)
        joint_svd(weights, **self._latent(shape, weights.q.shape[1], largest_rank(weights)))

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        shape = ModelShape.of(model)
        first = read_heads(decoder_layers(model)[0].self_attn)
        latent = self._latent(shape, first.q.shape[1], largest_rank(first))
        chosen = self._layers(shape.num_layers)
        everything = range(shape.num_layers)
        facts: dict[str, Any] = {}
        if isinstance(chosen, int):
            teacher, latents = container(model), container(model)
            calibration.watch("making every layer latent")
            energy = {layer: put_latent(latents, layer, **latent).kv_energy for layer in everything}
            calibration.watch("making every layer a Mamba-2 layer")
            states = self._states(model, everything, calibration)
            if self.ild_steps:
                states |= self._distil(model, teacher, calibration)
                facts |= {f"latent_{name}": fact for name, fact in self._distil(latents, teacher, calibration).items()}
            yield Stage("Mamba-2 in every layer", False, states)
            scores = self._scores(teacher, model, latents, calibration)
            chosen = smart(scores, chosen)
            for layer in chosen:
                _take(model, latents, layer)
            facts |= {"scores": scores}
            name = "latent layers by score"
        else:
            teacher = container(model) if self.ild_steps else None
            facts |= self._states(model, [layer for layer in everything if layer not in chosen], calibration)
            energy = {layer: put_latent(model, layer, **latent).kv_energy for layer in chosen}
            if teacher is not None:
                yield Stage("latent and Mamba-2 layers", False, {"mla_layers": chosen})
                facts |= self._distil(model, teacher, calibration)
            name = "latent and Mamba-2 layers" if teacher is None else "layers distilled one by one"
        facts |= {
            "mla_layers": chosen,
            "rank": latent["rank"],
            "rope_dim": latent["rope_dim"],
            "kv_energy": [energy[layer] for layer in chosen],
            "state_bytes": state_bytes(model),
        }
        yield Stage(name, False, facts)

    def _layers(self, layers: int) -> list[int] | int:
        """The latent layers, or how many have to be found."""
        if isinstance(self.mla_layers, str):
            if self.mla_layers != "even":
                raise BadArgument("mla_layers", self.mla_layers, 'give "even", numbers of layers, or how many')
            return every(layers, 2)
        if isinstance(self.mla_layers, int):
            return spread(layers, self.mla_layers) if self.placement == "spread" else self.mla_layers
        return listed(layers, self.mla_layers)

    def _latent(self, shape: ModelShape, dim: int, most: int) -> dict[str, Any]:
        """The numbers of the latent layers of a model whose keys and values have the rank `most`."""
        chosen = self._layers(shape.num_layers)
        count = chosen if isinstance(chosen, int) else len(chosen)
        if not 1 <= count <= shape.num_layers:
            # A cache that holds states alone does not know how many tokens it has seen.
            raise BadArgument("mla_layers", self.mla_layers, f"choose 1 to {shape.num_layers} layers")
        rope_dim = dim // 2 if self.rope_dim is None else self.rope_dim
        rank = self.rank
        if rank is None:
            if self.kv is None or not 0 < self.kv <= 1:
                raise BadArgument("kv", self.kv, "give a share of the dense cache above 0, up to 1, or a rank")
            dense = shape.kv_bytes_per_token // shape.dtype.itemsize
            rank = min(int(self.kv * dense / count + 1e-9) - rope_dim, most)
            if rank < 1:
                floor = count * (rope_dim + 1) / dense
                raise Infeasible(
                    f"kv={self.kv}: {count} latent layers with {rope_dim} rotated dims take at least {floor:.3f} of "
                    "the dense cache; raise kv, or choose fewer layers or a smaller rope_dim",
                    floor,
                )
        return {"rank": rank, "rope_dim": rope_dim, "q_rank": self.q_rank, "rope_rows": self.rope_rows}

    def _states(self, model: PreTrainedModel, layers: Sequence[int], calibration: Calibration) -> dict[str, Any]:
        if not layers:
            return {}
        return put_states(model, layers, calibration.batches(), conv=self.conv, repeat_first=self.repeat_first)

    def _distil(self, model: Any, teacher: Any, calibration: Calibration) -> dict[str, Any]:
        calibration.watch(f"distilling layers one by one, {self.ild_steps} steps")
        losses = ild(model, teacher, calibration.batches(), self.ild_steps, self.ild_lr)
        return {"ild_first": losses[0], "ild_last": losses[-1]}

    def _scores(self, teacher: Any, states: Any, latents: Any, calibration: Calibration) -> list[float]:
        text = calibration.tokens[: self.scored].split(calibration.batch)
        count = len(decoder_layers(states))
        return sensitivities(
            teacher, states, latents, text, lambda layer: calibration.watch(f"scoring layer {layer + 1} of {count}")
        )


def _take(model: Any, donor: Any, layer: int) -> None:
    """One decoder layer of another model of the same family, attention and MLP."""
    entry = getattr(donor.config, KEY)[layer]
    replace(model, layer, entry["kind"], **entry["spec"])
    decoder_layers(model)[layer].load_state_dict(decoder_layers(donor)[layer].state_dict())
