"""A conversion from a model's name to a folder: load, convert, heal, measure before and after, save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.convert.base import Calibration, Conversion, Stage, conversion
from foveate.convert.exporting.export import as_deepseek, check_around
from foveate.convert.exporting.serving import decoding, needles
from foveate.convert.run import Rung, convert, measure
from foveate.convert.sample_text import SampleText, sample_text
from foveate.convert.saving import LADDER, check_free, save
from foveate.errors import BadArgument
from foveate.models.open import load
from foveate.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Watch = Callable[[float, float, str], None]
"""Told (work done, work in all or 0, what is at work)."""

FORMAT = 1
_CONTEXT = 1024  # tokens behind which decoding is timed, where the model has so many positions


@dataclass
class Job:
    """What `foveate convert` does.

    Args:
        model: as `foveate.load` takes it.
        to: id of the conversion; settings: its parameters.
        out: folder of the result, new or empty.
        text: file or folder to calibrate and measure on; None: Python's documentation.
        heal: settings of the healing (`Recipe`), None: none. heal_text: what it reads.
        export: save a stock DeepSeek-V3 checkpoint in place of one of the converted type. pad: see `as_deepseek`.
    """

    model: str
    to: str
    settings: dict[str, Any]
    out: Path
    text: str | None
    calibration_tokens: int
    probe_tokens: int
    length: int
    needles: int
    needle_length: int
    heal: dict[str, Any] | None
    heal_text: Path | None
    export: bool
    pad: bool
    dtype: str
    device: str
    seed: int

    @property
    def work(self) -> Path:
        """Where a healing keeps the converted model and its state until it is done."""
        return self.out.with_name(f"{self.out.name}.healing")

    @property
    def resumable(self) -> bool:
        """Whether a healing can go on from what is on the disk."""
        return (self.work / "converted" / LADDER).is_file()

    def run(self, watch: Watch) -> dict[str, Any]:
        """Do all of it; the record is in the folder as `ladder.json`.

        Raises:
            BadArgument, Refused, Infeasible, FoveateError: nothing was saved but what a healing goes on from.
        """
        chosen = conversion(self.to, **self.settings)
        check_free(self.out, "--out")
        if self.heal_text is not None and not self.heal_text.exists():
            raise BadArgument("--heal-text", str(self.heal_text), "no such file or folder")
        watch(0, 0, "loading")
        model, tokenizer = load(self.model, dtype=self.dtype, device=self.device)
        if self.export:
            check_around(model)
        shape = ModelShape.of(model)
        chosen.check(model, shape)
        watch(0, 0, "reading text")
        text = sample_text(
            tokenizer,
            self.text,
            calibration=self.calibration_tokens,
            probe=self.probe_tokens,
            length=min(self.length, shape.max_positions),
            seed=self.seed,
        )
        identity = plain(
            {
                "model": shape.name,
                "to": self.to,
                "settings": chosen.settings(),
                "text": text.facts,
                "dtype": str(model.dtype).removeprefix("torch."),
                "needles": [self.needles, self.needle_length],
            }
        )
        kept = self._kept(identity) if self.heal is not None else None
        if kept is not None:
            made = load(str(self.work / "converted"), dtype=model.dtype, device=model.device).model
            record = kept
        else:
            before = self._served(model, tokenizer, text, watch, "before")
            made, record = self._converted(model, chosen, text, watch)
            record |= {"before": before, "identity": identity}
            if self.export:
                as_deepseek(made, pad=self.pad)  # refuses before the healing, not after it
            if self.heal is not None:
                save(made, tokenizer, self.work / "converted", record)
        if self.heal is not None:
            self._heal(made, model, tokenizer, text, record, watch)
        final = made
        if self.export:
            final, record["export"] = self._exported(made, text)
        record["after"] = self._served(final, tokenizer, text, watch, "after")
        watch(0, 0, "saving")
        del record["identity"]
        save(final, tokenizer, self.out, record)
        shutil.rmtree(self.work, ignore_errors=True)
        return record

    def _converted(
        self, model: PreTrainedModel, chosen: Conversion, text: SampleText, watch: Watch
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        def told(words: str) -> None:
            watch(0, 0, words)

        def measured(rung: Rung) -> None:
            watch(0, 0, f"{rung.stage}: perplexity {rung.perplexity:.3g}")

        calibration = Calibration(text.calibration, watch=told)
        found = convert(model, chosen, calibration, text.probe, watch=told, measured=measured)
        record = {
            "format": FORMAT,
            "model": ModelShape.of(model).name,
            "family": model.config.model_type,
            "layers": model.config.num_hidden_layers,
            "conversion": self.to,
            "what": chosen.what,
            "settings": chosen.settings(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "text": text.facts,
            "rungs": [rung.json() for rung in found.ladder],
            "healing": None,
            "export": None,
            "versions": {name: metadata.version(name) for name in ("foveate", "torch", "transformers")},
        }
        return found.model, plain(record)

    def _served(
        self, model: PreTrainedModel, tokenizer: Any, text: SampleText, watch: Watch, when: str
    ) -> dict[str, Any]:
        """Decoding of one model, and needles."""
        watch(0, 0, f"decoding {when}")
        room = min(_CONTEXT, text.calibration.numel(), ModelShape.of(model).max_positions - 32)
        found = decoding(model, text.calibration.flatten()[None, :room])
        if self.needles:

            def told(done: int) -> None:
                watch(done, self.needles, f"needles {when}")

            found["needles"] = needles(model, tokenizer, self.needles, self.needle_length, seed=self.seed, watch=told)
            found |= {"needle_samples": self.needles, "needle_length": self.needle_length}
        return found

    def _heal(
        self,
        made: PreTrainedModel,
        model: PreTrainedModel,
        tokenizer: Any,
        text: SampleText,
        record: dict[str, Any],
        watch: Watch,
    ) -> None:
        from foveate.convert.healing.heal import heal
        from foveate.convert.healing.recipe import Progress, Recipe

        recipe = Recipe.of(self.heal or {})

        def told(at: Progress) -> None:
            watch(at.tokens, recipe.tokens, f"healing: loss {at.loss:.3g}, {at.tokens_per_second:,.0f} tokens/s")

        watch(0, 0, "reading text to heal on")
        healing = heal(
            made, model, self.heal_text, tokenizer=tokenizer, recipe=recipe, out=self.work / "state", watch=told
        )
        stage = Stage("healed", False, {"tokens": healing.tokens})
        rung = measure(made.eval(), stage, model, ModelShape.of(model), text.probe, healing.seconds)
        record["rungs"].append(plain(rung.json()))
        record["healing"] = healing.json()

    def _kept(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The record of the converted model whose healing was begun."""
        if not self.resumable:
            return None
        record = json.loads((self.work / "converted" / LADDER).read_text(encoding="utf-8"))
        theirs = record["identity"]
        other = [name for name in identity if theirs.get(name) != identity[name]]
        if other:
            said = ", ".join(f"{name}={theirs.get(name)!r}" for name in other)
            mend = f"{self.work} holds a healing that was begun with {said}; give that, another folder, or remove it"
            raise BadArgument("--out", str(self.out), mend)
        return record

    def _exported(self, made: PreTrainedModel, text: SampleText) -> tuple[PreTrainedModel, dict[str, Any]]:
        final, facts = as_deepseek(made, pad=self.pad)
        ids = text.probe[:1].to(made.device)
        with torch.no_grad():
            ours, theirs = (each(ids, use_cache=False).logits.double() for each in (final, made))
        return final, {**facts, "error": float((ours - theirs).norm() / theirs.norm())}


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON values; a number that is none becomes null."""
    return json.loads(json.dumps(record), parse_constant=lambda name: None)
