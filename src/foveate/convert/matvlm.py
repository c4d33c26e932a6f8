"""MaTVLM: every fourth attention layer becomes a Mamba-2 layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.layer_distillation import ild
from foveate.convert.surgery.layer_plan import every, listed
from foveate.convert.surgery.state_init import check_states, put_states, state_bytes
from foveate.errors import BadArgument
from foveate.models.converted import container, decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
@dataclass(frozen=True)
class MaTVLM(Conversion):
    """Mamba-2 in every n-th layer, attention in the others (MaTVLM, arXiv 2503.13440).

    Mamba-2 layers take over the attention's projections, as in MambaInLlama, and learn in one stage from the model as
    it was. The paper's loss is KL(teacher ‖ student) of the logits at temperature 1, plus, summed over the replaced
    layers, the 2-norm between the layer's output on the teacher's input to it and the teacher's output, both with
    weight 1 and nothing on the text's own next tokens. The second part is at hand here (`ild_steps`), layer by layer;
    both together are a healing whose hidden loss is on the replaced layers and fed by the teacher. The paper converts
    the decoder of a vision-language model, where teacher and student see the same image tokens; this converts decoders
    on text.

    Args:
        step: of the layers, 0, step, 2 step, ... are replaced: 4 for 25 %, the paper's choice.
        layers: their numbers, in place of `step`.
        conv: taps of the convolution.
        repeat_first: repeat values and keys over their group before the convolution.
        ild_steps: of the layer loss alone, one batch of the calibration text each; 0: none.
        ild_lr: its peak learning rate, the paper's.
    """

    id: ClassVar[str] = "matvlm"
    what: ClassVar[str] = "Mamba-2 in every fourth layer, attention in the others; needs healing (MaTVLM)"

    step: int = 4
    layers: Sequence[int] | None = None
    conv: int = 4
    repeat_first: bool = False
    ild_steps: int = 0
    ild_lr: float = 2e-4

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_states(model)
        for name, least in (("ild_steps", 0), ("conv", 1)):
            if getattr(self, name) < least:
                raise BadArgument(name, getattr(self, name), f"give at least {least}")
        chosen = self._layers(shape.num_layers)
        if not len(chosen) < shape.num_layers:
            # A cache that holds states alone does not know how many tokens it has seen.
            name, value = ("step", self.step) if self.layers is None else ("layers", chosen)
            raise BadArgument(name, value, "leave at least one layer of attention")
        for layer in chosen:
            read_heads(decoder_layers(model)[layer].self_attn)

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        chosen = self._layers(ModelShape.of(model).num_layers)
        if not chosen:
            return
        teacher = container(model) if self.ild_steps else None
        facts = put_states(model, chosen, calibration.batches(), conv=self.conv, repeat_first=self.repeat_first)
        yield Stage("Mamba-2 layers", False, facts | {"layers": chosen, "state_bytes": state_bytes(model)})
        if teacher is not None:
            calibration.watch(f"distilling layers one by one, {self.ild_steps} steps")
            losses = ild(model, teacher, calibration.batches(), self.ild_steps, self.ild_lr, attention=0.0)
            yield Stage("layers distilled one by one", False, {"ild_first": losses[0], "ild_last": losses[-1]})

    def _layers(self, layers: int) -> list[int]:
        return every(layers, self.step) if self.layers is None else listed(layers, self.layers)
