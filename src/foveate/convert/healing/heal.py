"""Heal a converted model: it learns from the model that it was made of, in a short distillation.

Logits are distilled as in Hinton et al. (1503.02531); that a converted model comes back so is shown in X-EcoMLA
(2503.11132, section 4) and Zebra-Llama (2505.17272, section 3), whose losses are settings of `Recipe`.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.convert.healing.documents import Documents
from foveate.convert.healing.healing_state import HealingState, digest
from foveate.convert.healing.learner import PARTS, Learner, Teacher
from foveate.convert.healing.mixture import Mixture
from foveate.convert.healing.optimizers import Optimizers
from foveate.convert.healing.recipe import Evaluation, Healing, Progress, Recipe, Watch
from foveate.convert.healing.text import TokenText, token_text
from foveate.convert.healing.trained import compared_layers, trained
from foveate.errors import BadArgument, FoveateError, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    text: str | Path | Documents | TokenText | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    save_minutes: float = 10.0,
    report_every: int = 10,
    watch: Watch | None = None,
    **settings: Any,
) -> Healing:
    """Train the student, in place, to do what the teacher does.

    Runs where the student is; started by `accelerate launch` or `torchrun` on several devices, each process calls it
    with models of its own and they share the work. Neither the logits of a batch nor the vocabulary limit its size:
    they are made for a few hundred tokens at a time.

    Args:
        student: a converted model (`foveate.convert`).
        teacher: the model to learn from, over the same vocabulary; not changed.
        text: what to read: a file or folder (.txt, .md, .rst, .jsonl), tokens that `token_text` made, or None: the
            documentation of all installed packages, without what evaluations read.
        tokenizer: of both models.
        recipe: the settings; or give them by name: `heal(..., tokens=50_000_000, lr=3e-4)`.
        out: a folder for the state, saved whole every `save_minutes`; the same call goes on from it, to the bit on one
            machine. Ctrl-C saves and raises KeyboardInterrupt, which says how to go on.
        report_every: steps between two reports, the only moments at which the device is waited for.
        watch: told at each report, in the first process.

    Returns:
        The record.

    Raises:
        BadArgument: a setting that cannot be, models that do not fit each other, too little text, a folder with
            another healing in it.
        Refused: accelerate, or peft where adapters are asked for, is not installed; a model without known logits.
        FoveateError: the loss is no number any more.
    """
    if recipe is not None and settings:
        raise BadArgument(next(iter(settings)), next(iter(settings.values())), "give it in the recipe, or no recipe")
    recipe = Recipe.of(settings) if recipe is None else recipe
    if report_every < 1:
        raise BadArgument("report_every", report_every, "give at least 1 step")
    if not save_minutes >= 0:
        raise BadArgument("save_minutes", save_minutes, "give minutes from 0 on")
    _check(student, teacher, recipe)
    accelerator = _accelerator(recipe)
    several = accelerator.num_processes > 1
    device = accelerator.device if several else student.device
    student.to(device)  # type: ignore[arg-type]
    teacher.to(device)  # type: ignore[arg-type]
    read = text if isinstance(text, TokenText) else token_text(text, tokenizer, held_out=recipe.held_out)
    mixture = Mixture(read, recipe, teacher, tokenizer, accelerator.process_index, accelerator.num_processes)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(recipe.seed)  # of adapters' first values
        run = _Run(student, teacher, recipe, mixture, accelerator, device, stack)
        run.report_every, run.save_seconds, run.watch = report_every, 60 * save_minutes, watch
        if out is not None:
            run.keep(out, stack)
        return run.go()


def _check(student: PreTrainedModel, teacher: PreTrainedModel, recipe: Recipe) -> None:
    if student is teacher:
        raise BadArgument(
            "teacher", type(teacher).__name__, "it is the student itself; give the model before conversion"
        )
    sizes = [int(each.config.get_text_config(decoder=True).vocab_size) for each in (student, teacher)]
    if sizes[0] != sizes[1]:
        said = f"has a vocabulary of {sizes[1]}, the student one of {sizes[0]}"
        raise BadArgument("teacher", type(teacher).__name__, f"{said}; give a model with the student's tokenizer")
    shared = {each.data_ptr() for each in teacher.parameters()} & {each.data_ptr() for each in student.parameters()}
    if shared - {0}:
        raise BadArgument("teacher", type(teacher).__name__, "it shares weights with the student; give a copy")
    if student.dtype == torch.float64 and recipe.precision in ("autocast", "bf16"):
        raise BadArgument("precision", recipe.precision, "the student is float64; give fp32")
    compared_layers(student, teacher, recipe)


def _accelerator(recipe: Recipe) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise Refused('healing needs accelerate, which is not installed: pip install "foveate[heal]"') from None
    # Without a loss on logits, what is behind the last layer gets no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=not recipe.kl and not recipe.ce)
    return Accelerator(mixed_precision="no", kwargs_handlers=[unused])


class _Run:
    """One call of `heal`."""

    report_every: int
    save_seconds: float
    watch: Watch | None

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        recipe: Recipe,
        mixture: Mixture,
        accelerator: Any,
        device: torch.device,
        stack: ExitStack,
    ) -> None:
        self.recipe, self.mixture, self.accelerator, self.device = recipe, mixture, accelerator, device
        layers = compared_layers(student, teacher, recipe)
        self.trained = stack.enter_context(trained(student, recipe, device))
        halved = device.type == "cuda" and self.trained.precision != "fp32"
        stack.callback(teacher.train, teacher.training)
        self.teacher = Teacher(teacher.eval(), layers, halved)
        self.learner = Learner(student, self.teacher, recipe, layers, device)
        stack.enter_context(self.teacher.streams.hooked())
        stack.enter_context(self.learner.streams.hooked())
        self.optimizers = Optimizers(self.trained.named, self.trained.initial, recipe)
        stack.callback(self.optimizers.release)
        if recipe.compile:
            stack.enter_context(_compiled(student, teacher))
        several = accelerator.num_processes > 1
        self.model: Any = accelerator.prepare_model(self.learner) if several else self.learner
        self.per_step = recipe.batch * recipe.accumulation * recipe.length * accelerator.num_processes
        self.steps = math.ceil(recipe.tokens / self.per_step)
        self.step = 0
        self.sums = torch.zeros(len(PARTS) + 1, device=device)
        self.summed = 0
        self.held = mixture.text.held_out(recipe.length, recipe.evaluate_on)
        self.state: HealingState | None = None
        self.stopping = False
        names = ("foveate", "torch", "transformers", "accelerate", *(("peft",) if recipe.trainable == "lora" else ()))
        self.healing = Healing(
            recipe=asdict(recipe),
            text=mixture.text.facts,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            processes=accelerator.num_processes,
            precision=self.trained.precision,
            trained=sum(each.numel() for each in self.optimizers.parameters),
            versions={name: metadata.version(name) for name in names},
        )

    def keep(self, out: str | Path, stack: ExitStack) -> None:
        """Go on from what the folder holds, and save there."""
        own = {id(each) for each in self.optimizers.parameters}
        frozen = [(name, each) for name, each in self.learner.student.named_parameters() if id(each) not in own]
        shapes = [(name, tuple(each.shape)) for name, each in self.trained.named]
        identity = {
            **Healing(asdict(self.recipe), {}).json()["recipe"],
            "text": self.mixture.text.fingerprint,
            "processes": self.accelerator.num_processes,
            "teacher": digest(self.teacher.model.named_parameters()),
            "student": digest([(str(shapes), torch.empty(0)), *frozen]),
        }
        self.state = HealingState(out, identity)
        if self.accelerator.is_main_process:
            self.state.lock()
            stack.callback(self.state.unlock)
        found = self.state.load()
        if found is None:
            return
        self.optimizers.load(found)
        self.step = found["step"]
        self.healing = Healing.of({**found["healing"], "versions": self.healing.versions})
        if self.step < self.steps:
            self.healing.resumed.append(self.healing.tokens)

    def go(self) -> Healing:
        """Train to the end."""
        if self.step == 0:
            self.evaluate()
        if self.step < self.steps:
            with self._interruptible():
                self._train()
            if self.healing.evaluations[-1].tokens < self.healing.tokens:
                self.evaluate()
            self.save(quietly=True)
        self.optimizers.release()
        self.trained.finish()
        return self.healing

    def _train(self) -> None:
        self.learner.train()
        self.clock, self.saved, self.reported = time.perf_counter(), time.monotonic(), self.step
        every = self.recipe.evaluate_every
        for step in range(self.step, self.steps):
            rate = self.recipe.rate(step, self.steps)
            self._one(step, rate)
            self.step = step + 1
            if self.step % self.report_every == 0 or self.step == self.steps or self._alone_and_stopping():
                self._report(rate)
            done = self.step * self.per_step
            if every and done // every > (done - self.per_step) // every and self.step < self.steps:
                self._report(rate)
                self.evaluate()
                self.clock = time.perf_counter()

    def _one(self, step: int, rate: float) -> None:
        """One step of the optimiser."""
        recipe = self.recipe
        # Whatever a layer draws depends on the step alone, so that a run that was stopped draws it again.
        torch.manual_seed((recipe.seed << 32) + step * self.accelerator.num_processes + self.accelerator.process_index)
        for turn in range(recipe.accumulation):
            ids, sources = self.mixture.batch(step * recipe.accumulation + turn, self.device)
            seen = self.teacher(ids)
            last = turn + 1 == recipe.accumulation
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self._computing():
                    loss, parts = self.model(ids, seen.last, seen.read, seen.written)
                (loss / recipe.accumulation).backward()
            self.sums += torch.cat([loss.detach().float().reshape(1), parts])
            self.summed += 1
            for source in sources:
                self.healing.mix[source] += recipe.length * self.accelerator.num_processes
        self.optimizers.step(rate)

    def _computing(self) -> AbstractContextManager[Any]:
        if self.trained.precision == "autocast":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _report(self, rate: float) -> None:
        """Read what was summed up, tell it, and save where it is time."""
        if self.step == self.reported:
            return
        sums = self.accelerator.reduce(self.sums, "mean") if self.accelerator.num_processes > 1 else self.sums
        loss, *parts = (sums / max(1, self.summed)).tolist()
        self.sums.zero_()
        self.summed = 0
        seconds = time.perf_counter() - self.clock
        tokens = (self.step - self.reported) * self.per_step
        healing = self.healing
        if not math.isfinite(loss):
            kept = f"; {self.state.file} holds the last good state" if self.state and self.state.file.exists() else ""
            said = f"the loss is {loss} after {self.step * self.per_step} tokens"
            raise FoveateError(f"{said}: give a smaller lr than {self.recipe.lr:g}, or more warmup{kept}")
        healing.tokens, healing.steps = self.step * self.per_step, self.step
        healing.seconds += seconds
        found: dict[str, float] = dict(zip(PARTS, parts, strict=True))
        healing.curve.append({"tokens": healing.tokens, "loss": loss, **found, "lr": rate})
        self.reported = self.step
        speed = tokens / max(seconds, 1e-9)
        left = (self.steps - self.step) * self.per_step / speed
        try:
            if self.watch is not None and self.accelerator.is_main_process:
                self.watch(Progress(self.step, self.steps, healing.tokens, loss, found, rate, speed, left))
        except KeyboardInterrupt:
            self.stopping = True
        if self._all_stopping() and self.step < self.steps:
            self._stop()
        if self.step < self.steps and time.monotonic() - self.saved >= self.save_seconds:
            self.save(quietly=True)
        self.clock = time.perf_counter()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Perplexity and divergence on held-out text, a part of it in each process."""
        learner, processes = self.learner, self.accelerator.num_processes
        known = not math.isnan(self.healing.teacher_perplexity)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        learner.eval()
        mine = self.held[self.accelerator.process_index :: processes]
        for batch in mine.split(self.recipe.batch):
            ids = batch.to(self.device)
            seen = self.teacher(ids)
            with self._computing():
                kl, ce = learner.compared(ids, seen)
                theirs = ce if known else learner.compared(ids, seen, alone=True)[1]
            sums += torch.stack([kl, ce, theirs, torch.ones_like(kl)]).double() * len(ids)
        learner.train()
        kl, ce, theirs, count = (self.accelerator.reduce(sums, "sum") if processes > 1 else sums).tolist()
        if not known:
            self.healing.teacher_perplexity = _exp(theirs / count)
        self.healing.evaluations.append(Evaluation(self.healing.tokens, _exp(ce / count), kl / count))

    def save(self, quietly: bool = False) -> None:
        """Write the state, in the first process. quietly: where that fails, warn and go on."""
        self.saved = time.monotonic()
        if self.state is None or not self.accelerator.is_main_process:
            return
        try:
            made = self.optimizers.state()
            if self.step == self.steps:
                made["optimizers"] = []  # nothing is left to do
            self.state.save({"step": self.step, "healing": asdict(self.healing), **made})
        except FoveateError as error:
            if not quietly:
                raise
            warnings.warn(str(error), stacklevel=2)

    def _stop(self) -> None:
        done = f"stopped after {self.healing.tokens} of {self.steps * self.per_step} tokens"
        if self.state is None:
            raise KeyboardInterrupt(f"{done}; nothing was saved, since no folder was given as out")
        try:
            self.save()
        except FoveateError as error:
            raise KeyboardInterrupt(f"{done}; {error}") from error
        raise KeyboardInterrupt(f"{done}; the same call with out={str(self.state.folder)!r} goes on from there")

    def _alone_and_stopping(self) -> bool:
        return self.stopping and self.accelerator.num_processes == 1

    def _all_stopping(self) -> bool:
        """Whether any process was asked to stop: all stop together, at a report."""
        if self.accelerator.num_processes == 1:
            return self.stopping
        asked: Tensor = torch.tensor(float(self.stopping), device=self.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C is heard between two steps; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        before = signal.signal(signal.SIGINT, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _compiled(*models: Any) -> Iterator[None]:
    """The decoders of these models, compiled as long as this is entered."""
    from foveate import compat

    decoders = [compat.base_model(model) for model in models]
    before = [decoder._compiled_call_impl for decoder in decoders]
    for decoder in decoders:
        decoder.compile()
    try:
        yield
    finally:
        for decoder, old in zip(decoders, before, strict=True):
            decoder._compiled_call_impl = old


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
