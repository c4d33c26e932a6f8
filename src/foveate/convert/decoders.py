"""Decoders as the subject of conversions: logits, perplexity, bytes of cache, needles found, time of decoding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from foveate.convert.base import Conversion, Stage
from foveate.convert.exporting.serving import decoding
from foveate.convert.subject import Asking, Questions, Rung, Subject
from foveate.errors import BadArgument
from foveate.models.converted import container
from foveate.models.open import Loaded, load
from foveate.models.placement import one_device
from foveate.models.shape import ModelShape
from foveate.tasks import Sample, task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NEEDLES = "niah_single_2"
_NUMBER = 10  # needle prompts, unless told otherwise
_CONTEXT = 1024  # tokens behind which decoding is timed, where text and model have so many


@dataclass(frozen=True, kw_only=True)
class DecoderRung(Rung):
    """A decoder after one stage.

    Args:
        kl: mean over tokens of KL(original ‖ this), nats.
        perplexity: on the probe text.
        kv_bytes: that one token of context costs in the cache, all layers, in the model's dtype.
        share: of the original's `kv_bytes`.
        needles: share of needle prompts answered; None: none were asked.
    """

    kl: float
    perplexity: float
    kv_bytes: int
    share: float
    needles: float | None = None

    @property
    def summary(self) -> str:
        return f"perplexity {self.perplexity:.3g}"


class Decoder(Subject):
    """Language models that `foveate.load` opens."""

    id = "decoder"
    plural = "decoders"

    def open(self, source: str, dtype: Any, device: Any) -> Loaded:
        return load(source, dtype=dtype, device=one_device(device, "a conversion"))

    def check(self, conversion: Conversion, model: PreTrainedModel) -> None:
        conversion.check(model, ModelShape.of(model))

    def name(self, model: PreTrainedModel) -> str:
        return ModelShape.of(model).name

    def positions(self, model: PreTrainedModel) -> int:
        return ModelShape.of(model).max_positions

    def container(self, model: PreTrainedModel) -> PreTrainedModel:
        return container(model)

    @torch.no_grad()
    def measure(self, made: Any, stage: Stage, model: Any, probe: Tensor, seconds: float) -> DecoderRung:
        error = norm = kl = loss = 0.0
        count = 0
        for batch in probe.to(model.device).split(4):
            ours, theirs = made(batch, use_cache=False).logits, model(batch, use_cache=False).logits
            # In float64: errors of 1e-10 are measured, and float32 would round a KL near 0 below it.
            for x, y, ids in zip(ours, theirs, batch, strict=True):
                x, y = x.double(), y.double()
                error += float((x - y).square().sum())
                norm += float(y.square().sum())
                log_p, log_q = y.log_softmax(-1), x.log_softmax(-1)
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                loss -= float(log_q[:-1].gather(-1, ids[1:, None]).sum())
                count += len(ids)
        held = ModelShape.of(made).kv_bytes_per_token
        return DecoderRung(
            stage=stage.name,
            exact=stage.exact,
            error=math.sqrt(error / norm),
            kl=kl / count,
            perplexity=math.exp(min(loss / (count - len(probe)), 700.0)),
            kv_bytes=held,
            share=held / ModelShape.of(model).kv_bytes_per_token,
            parameters=sum(p.numel() for p in made.parameters()),
            seconds=seconds,
            facts=copy.deepcopy(stage.facts),
        )

    def questions(self, asking: Asking, model: PreTrainedModel) -> Questions | None:
        """Needles in prompts of a given length, answered greedily."""
        number = _NUMBER if asking.number is None else asking.number
        if number < 0:
            raise BadArgument("--needles", number, "give a number of prompts, or 0")
        if not number:
            return None
        most = self.positions(model)
        if asking.length > most:
            raise BadArgument("--needle-length", asking.length, f"the model has {most:,} positions; give fewer tokens")
        try:
            samples = task(_NEEDLES).generate(asking.tokenizer, asking.length, number, asking.seed)
        except BadArgument as error:
            if error.argument != "length":
                raise
            mend = f"{error.mend}; --needles 0 asks none"
            raise BadArgument("--needle-length", asking.length, mend) from None
        facts = {"task": _NEEDLES, "samples": number, "length": asking.length, "seed": asking.seed}
        return Questions(
            "needles", facts, lambda model: needles_found(model, asking.tokenizer, samples, told=asking.told)
        )

    def in_use(self, model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
        room = min(_CONTEXT, tokens.numel(), self.positions(model) - 32)
        return decoding(model, tokens.flatten()[None, :room])


SUBJECT = Decoder()


@torch.no_grad()
def needles_found(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    told: Callable[[int, int], None] = lambda done, number: None,
) -> float:
    """Share of the needles in these prompts that greedy answers name, with transformers' own cache.

    Args:
        told: how many of how many prompts are answered.
    """
    generate, found = cast(Callable[..., Any], model.generate), 0.0
    for done, sample in enumerate(samples):
        told(done, len(samples))
        ids = torch.tensor([[*sample.context_ids, *sample.question_ids]], device=model.device)
        made: Any = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sample.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        text = str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        found += task(sample.task).score(text, sample)
    told(len(samples), len(samples))
    return found / len(samples)
