"""lm-evaluation-harness: any of its tasks with any method at work, as a model named `foveate` and as one function.

The harness scores continuations in one forward without a cache, where a method that holds less has nothing to do. Here
the context is read as a prompt, through the method's cache; the continuation is scored token by token behind it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate import compat
from foveate.engine.apply import Handle, ProfileLike, apply
from foveate.engine.tuned import is_file
from foveate.errors import BadArgument, FoveateError, Refused
from foveate.evaluate.batch import Batch, causal_pairs
from foveate.evaluate.machine import describe, versions
from foveate.evaluate.record import DENSE
from foveate.evaluate.setting import MethodLike, parse_budgets, parse_methods, settings_of
from foveate.methods.base import Composition
from foveate.models import load
from foveate.models.shape import ModelShape

try:
    import lm_eval
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError:
    raise FoveateError(
        "the harness needs lm-eval: install foveate with the extra 'harness' (foveate[harness])"
    ) from None

_harness: Any = lm_eval  # it states few types
_Base: Any = HFLM
_register: Any = register_model

Asked = tuple[Any, list[int], list[int]]
"""(text of the request, tokens of the context, tokens of the continuation), as the harness hands them over."""


@dataclass
class Held:
    """What the caches of a harness run held and read, beside what dense ones would have.

    Args:
        prompts, tokens: how many were read, and how long they were together.
        kv_bytes, kv_bytes_dense: sums over prompts, when the prompt was over (answers that were generated: at the end).
        read, dense: query-key pairs by phase, "prompt" and "decode".
    """

    prompts: int = 0
    tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_dense: int = 0
    read: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)

    def add(self, shape: ModelShape, lengths: Sequence[int], nbytes: int, decoded: int = 0) -> None:
        """Prompts of these lengths in one cache of so many bytes, after as many decode steps."""
        self.prompts += len(lengths)
        self.tokens += sum(lengths)
        self.kv_bytes += nbytes
        self.kv_bytes_dense += sum(shape.dense_kv_bytes(length + decoded) for length in lengths)

    def count(self, meter: Mapping[str, float], dense: Mapping[str, float]) -> None:
        """Pairs that a cache's meter counted, and those of the dense model."""
        for phase, pairs in dense.items():
            self.dense[phase] = self.dense.get(phase, 0.0) + pairs
            self.read[phase] = self.read.get(phase, 0.0) + meter.get(f"{phase}_read", 0.0)

    def share(self, phase: str) -> float | None:
        """Pairs read over dense pairs; None where there were none."""
        return self.read[phase] / self.dense[phase] if self.dense.get(phase) else None

    def to_json(self) -> dict[str, Any]:
        """Shares of dense as JSON values."""
        return {
            "prompts": self.prompts,
            "mean_tokens": round(self.tokens / self.prompts, 1) if self.prompts else None,
            "kv_bytes": self.kv_bytes / self.kv_bytes_dense if self.kv_bytes_dense else None,
            "pairs_prefill": self.share("prompt"),
            "pairs_decode": self.share("decode"),
        }

    @property
    def saves(self) -> bool:
        """Whether anything was held or read less than by dense."""
        shares = [self.to_json()[name] for name in ("kv_bytes", "pairs_prefill", "pairs_decode")]
        return any(share is not None and share < 0.999 for share in shares)


@_register("foveate")
class FoveateLM(_Base):
    """A model with a method applied, for `lm_eval.simple_evaluate(model=FoveateLM("smollm2", "snapkv(budget=0.25)"))`,
    or, once this module was imported, `model="foveate", model_args={"pretrained": ..., "method": ...}`.

    The method sees all of a request's context, the question in it. `held` says what it saved. `handle.remove()` takes
    it off the model again.

    Args:
        pretrained: as for `foveate.load`, or an opened model (then give its `tokenizer`).
        method: as for `foveate compare --methods`, one of them; or a file of `foveate tune`.
        budget: for the method that has none of its own.
        profile: calibration, as for `foveate.apply`.
        batch_size: contexts, or prompts, that are read side by side.
        dtype, device: as for `foveate.load`.
        options: further arguments of `HFLM`, such as `max_length` or `add_bos_token`.

    Raises:
        BadArgument, Refused: as `foveate.load` and `foveate.apply`; or a batch size that is no number.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        method: MethodLike = DENSE,
        *,
        tokenizer: Any = None,
        budget: Any = None,
        profile: ProfileLike | None = None,
        batch_size: int | str | None = 1,
        dtype: Any = "auto",
        device: Any = None,
        **options: Any,
    ) -> None:
        if not str(batch_size or 1).isdecimal():
            raise BadArgument("batch_size", batch_size, "give a number")
        wanted: Any = method if is_file(method) else one_composition(method, budget)
        if isinstance(pretrained, str | os.PathLike):
            pretrained, tokenizer = load(os.fspath(pretrained), dtype=dtype, device=device or "auto")
        elif tokenizer is None:
            raise BadArgument("tokenizer", None, "give the tokenizer of the opened model")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is handed over opened
        super().__init__(
            pretrained=pretrained, tokenizer=tokenizer, backend="causal", batch_size=int(batch_size or 1), **options
        )
        self.handle: Handle = apply(pretrained, wanted, profile=profile)
        self.shape = self.handle.binding.shape
        self.held = Held()
        self._at_once = False

    @property
    def _dense(self) -> bool:
        return not any(method.slots for method in self.handle.binding.composition.methods)

    # -- continuations ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Asked], disable_tqdm: bool = False, override_bs: int | None = None, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would say it) of each continuation behind its context."""
        if self._at_once:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        behind: dict[tuple[int, ...], list[int]] = {}
        for number, (_text, context, continuation) in enumerate(requests):
            kept = self.max_length + 1 - len(continuation)
            if not context or not continuation or kept < 1:
                mend = f"give 1 to {self.max_length} tokens, behind a context of at least one"
                raise BadArgument("continuation", f"{len(continuation)} tokens", mend)
            behind.setdefault(tuple(context[-kept:]), []).append(number)
        contexts = sorted(behind, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(contexts), self.batch_size):
            some = contexts[start : start + self.batch_size]
            found |= self._score(some, [behind[context] for context in some], requests)
        for number, (text, _context, _continuation) in enumerate(requests):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[number])
        return [found[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _score(
        self, contexts: Sequence[tuple[int, ...]], behind: Sequence[list[int]], requests: Sequence[Asked]
    ) -> dict[int, tuple[float, bool]]:
        """Score the continuations of several contexts: each context is read once, its rows then go side by side."""
        batch = Batch(self.model, self.handle.cache(), len(contexts), self.shape)
        batch.cache.meter = {}
        logits = batch.prompt(contexts)
        self.held.add(self.shape, [len(context) for context in contexts], batch.cache.nbytes)
        rows = [number for numbers in behind for number in numbers]
        places = [place for place, numbers in enumerate(behind) for _ in numbers]
        total, greedy = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, True)
        step = 0
        logits = logits[places]
        while True:
            tokens = [requests[row][2][step] for row in rows]
            chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
            values = logits.log_softmax(-1).gather(1, chosen).squeeze(1).tolist()
            best = (logits.argmax(-1) == chosen.squeeze(1)).tolist()
            for row, value, same in zip(rows, values, best, strict=True):
                total[row] += value
                greedy[row] &= same
            step += 1
            going = [i for i, row in enumerate(rows) if step < len(requests[row][2])]
            if not going:
                break
            if step == 1 or len(going) < len(rows):
                batch.keep([places[i] for i in going] if step == 1 else going)
            rows, tokens = [rows[i] for i in going], [tokens[i] for i in going]
            logits = batch.step(tokens)
        self.held.count(batch.cache.meter or {}, batch.dense)
        return {row: (total[row], greedy[row]) for row in total}

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, which only dense can give.

        Raises:
            Refused: with any other method: no prompt stands before these texts, so it would have nothing to act on.
        """
        if not self._dense:
            raise Refused(
                f"{self.handle.id} cannot act where whole texts are scored without a prompt before them; "
                "take `foveate compare --tasks perplexity`"
            )
        self._at_once = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._at_once = False

    # -- answers ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """`model.generate` with a cache of the method's."""
        cache = self.handle.cache()
        cache.meter = {}
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
        lengths = options["attention_mask"].sum(1).tolist() if "attention_mask" in options else None
        lengths = [context.shape[1]] * context.shape[0] if lengths is None else lengths
        decoded = out.shape[1] - context.shape[1] - 1  # nothing reads the last token
        self.held.add(self.shape, lengths, cache.nbytes, decoded)
        dense = {"prompt": 0.0, "decode": 0.0}
        for length in lengths:
            dense["prompt"] += causal_pairs(self.shape, 0, length)
            dense["decode"] += causal_pairs(self.shape, length, length + decoded)
        self.held.count(cache.meter or {}, dense)
        return out


def one_composition(method: MethodLike, budget: Any = None) -> Composition:
    """One composition from a text such as `"snapkv(budget=0.25)|kivi"`, or an object.

    Raises:
        BadArgument: a name or parameter that is not known, several methods, one that changes what is read of a prompt,
            or a budget that nothing takes.
    """
    dense, *named = parse_methods(method)
    if len(named) > 1:
        raise BadArgument("method", str(method), "give one method, or one composition (A | B)")
    entry = named[0] if named else dense
    if not entry.reader.whole:
        raise BadArgument("method", str(method), "the harness decides what is read of a prompt; give methods alone")
    if budget is not None and entry.free is None:
        raise BadArgument("budget", budget, f"no method of {entry.composition.id} takes it")
    settings = settings_of([entry], parse_budgets(budget))
    if len(settings) > 1:
        raise BadArgument("budget", budget, "give one")
    return settings[0].composition


def evaluate(
    model: Any = "smollm2",
    tasks: str | Iterable[str] = (),
    method: MethodLike = DENSE,
    *,
    limit: int | float | None = None,
    fewshot: int | None = None,
    include: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a model with a method at work.

    Args:
        model, method, options: as for `FoveateLM`.
        tasks: names as the harness knows them.
        limit: samples of each task; below 1 a share of them.
        fewshot: examples in front of each question; None: what the task says.
        include: a folder with tasks (YAML files) of your own.
        seed: of what the harness draws.

    Returns:
        JSON values: `results` by task, as the harness gives them, `held` (bytes and pairs as shares of dense) and what
        the run was.

    Raises:
        BadArgument: no task, or one that is not known; as `FoveateLM`.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    manager = TaskManager(include_path=None if include is None else str(include))
    known = set(manager.all_tasks)
    if not names or not set(names) <= known:
        missing = ", ".join(sorted(set(names) - known))
        raise BadArgument(
            "tasks", missing, "give names of tasks that `lm-eval ls tasks` lists, or include their folder"
        )
    lm = FoveateLM(model, method, **options)
    try:
        found = _harness.simple_evaluate(
            model=lm,
            tasks=names,
            num_fewshot=fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    finally:
        lm.handle.remove()
    assert found is not None  # it is None only in a process that is not the first of several
    return {
        "model": str(model) if isinstance(model, str | os.PathLike) else lm.shape.name,
        "method": lm.handle.id,
        "settings": lm.handle.state()["methods"],
        "results": {name: _plain(values) for name, values in found["results"].items()},
        "held": lm.held.to_json(),
        "saves": lm.held.saves,
        "limit": limit,
        "seed": seed,
        "device": describe(*compat.devices(lm.model)),
        "versions": {**versions(), "lm_eval": _harness.__version__},
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers and words of a task's results."""
    return {key: value for key, value in values.items() if isinstance(value, int | float | str) and value != " "}
