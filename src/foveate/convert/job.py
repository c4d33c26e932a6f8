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
from foveate.convert.run import answered, convert
from foveate.convert.sample_text import SampleText, sample_text
from foveate.convert.saving import LADDER, check_free, save
from foveate.convert.subject import Asking, Questions, Rung, Subject, subject_of
from foveate.errors import BadArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Watch = Callable[[float, float, str], None]
"""Told (work done, work in all or 0, what is at work)."""

FORMAT = 1


@dataclass
class Job:
    """What `foveate convert` does.

    Args:
        model: name or folder, as the kind of model that the conversion takes is opened.
        to: id of the conversion; settings: its parameters.
        out: folder of the result, new or empty.
        text: file or folder to calibrate and measure on; None: Python's documentation.
        needles: prompts to ask after each stage; None: as many as is usual. needle_length: tokens of each.
        heal: settings of the healing (`Recipe`), None: none. heal_text: what it reads.
        export: save a stock DeepSeek-V3 checkpoint in place of one of the converted type. pad: see `as_deepseek`.
        texts: by name, files to save beside the record, made of it.
    """

    model: str
    to: str
    settings: dict[str, Any]
    out: Path
    text: str | None
    calibration_tokens: int
    probe_tokens: int
    length: int
    needles: int | None
    needle_length: int
    heal: dict[str, Any] | None
    heal_text: Path | None
    export: bool
    pad: bool
    dtype: str
    device: str
    seed: int
    texts: Callable[[dict[str, Any]], dict[str, str]] = lambda record: {}

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
        subject = subject_of(chosen)
        self._check_options(subject)
        check_free(self.out, "--out")
        if self.heal_text is not None and not self.heal_text.exists():
            raise BadArgument("--heal-text", str(self.heal_text), "no such file or folder")
        watch(0, 0, "loading")
        model, tokenizer = subject.open(self.model, self.dtype, self.device)
        if self.export:
            check_around(model)
        subject.check(chosen, model)
        watch(0, 0, "reading text")
        text = sample_text(
            tokenizer,
            self.text,
            calibration=self.calibration_tokens,
            probe=self.probe_tokens,
            length=min(self.length, subject.positions(model)),
            seed=self.seed,
        )
        asking = Asking(
            tokenizer,
            self.text,
            self.needles,
            self.needle_length,
            self.seed,
            lambda done, number: watch(done, number, f"question {min(done + 1, number)} of {number}"),
        )
        questions = subject.questions(asking, model)
        identity = plain(
            {
                "model": subject.name(model),
                "to": self.to,
                "settings": chosen.settings(),
                "text": text.facts,
                "dtype": str(model.dtype).removeprefix("torch."),
                "questions": None if questions is None else questions.facts,
            }
        )
        kept = self._kept(identity) if self.heal is not None else None
        if kept is not None:
            made = subject.open(str(self.work / "converted"), model.dtype, model.device).model
            record = kept
        else:
            watch(0, 0, "timing the original")
            before = subject.in_use(model, text.calibration)
            made, record = self._converted(model, chosen, subject, text, questions, watch)
            record |= {"before": before, "identity": identity}
            if self.export:
                as_deepseek(made, pad=self.pad)  # refuses before the healing, not after it
            if self.heal is not None:
                watch(0, 0, "timing the converted model")
                record["converted"] = subject.in_use(made, text.calibration)
                save(made, tokenizer, self.work / "converted", record)
        if self.heal is not None:
            self._heal(made, model, tokenizer, subject, text, questions, record, watch)
        final = made
        if self.export:
            final, record["export"] = self._exported(made, text, questions)
        watch(0, 0, "timing the result")
        record["after"] = subject.in_use(final, text.calibration)
        watch(0, 0, "saving")
        del record["identity"]
        save(final, tokenizer, self.out, record, self.texts(record))
        shutil.rmtree(self.work, ignore_errors=True)
        return record

    def _check_options(self, subject: Subject) -> None:
        """Refuse what such models cannot be given."""
        for option, value in (
            ("--needles", self.needles),
            ("--heal", None if self.heal is None else self.heal["tokens"]),
            ("--export", "deepseek" if self.export else None),
        ):
            if value is not None and option in subject.lacks:
                raise BadArgument(option, value, f"{self.to} takes {subject.plural}, for which there is no {option}")

    def _converted(
        self,
        model: PreTrainedModel,
        chosen: Conversion,
        subject: Subject,
        text: SampleText,
        questions: Questions | None,
        watch: Watch,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        def told(words: str) -> None:
            watch(0, 0, words)

        def measured(rung: Rung) -> None:
            watch(0, 0, f"{rung.stage}: {rung.summary}")

        calibration = Calibration(text.calibration, watch=told)
        found = convert(model, chosen, calibration, text.probe, questions=questions, watch=told, measured=measured)
        record = {
            "format": FORMAT,
            "model": subject.name(model),
            "kind": subject.id,
            "family": model.config.model_type,
            "layers": model.config.num_hidden_layers,
            "conversion": self.to,
            "what": chosen.what,
            "settings": chosen.settings(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "text": text.facts,
            "questions": None if questions is None else questions.facts,
            "rungs": [rung.json() for rung in found.ladder],
            "converted": None,
            "healing": None,
            "export": None,
            "versions": {name: metadata.version(name) for name in ("foveate", "torch", "transformers")},
        }
        return found.model, plain(record)

    def _heal(
        self,
        made: PreTrainedModel,
        model: PreTrainedModel,
        tokenizer: Any,
        subject: Subject,
        text: SampleText,
        questions: Questions | None,
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
        watch(0, 0, "measuring after: healed")
        stage = Stage("healed", False, {"tokens": healing.tokens})
        rung = subject.measure(made.eval(), stage, model, text.probe, healing.seconds)
        record["rungs"].append(plain(answered(rung, made, questions).json()))
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

    def _exported(
        self, made: PreTrainedModel, text: SampleText, questions: Questions | None
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        final, facts = as_deepseek(made, pad=self.pad)
        ids = text.probe[:1].to(made.device)
        with torch.no_grad():
            ours, theirs = (each(ids, use_cache=False).logits.double() for each in (final, made))
        facts = {**facts, "error": float((ours - theirs).norm() / theirs.norm())}
        if questions is not None:
            facts[questions.name] = questions.ask(final)
        return final, facts


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON values; a number that is none becomes null."""
    return json.loads(json.dumps(record), parse_constant=lambda name: None)
