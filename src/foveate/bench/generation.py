"""Prompts and answers timed on one model: every method beside plain transformers, and the floor that bytes set."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from foveate import compat
from foveate.attention import Geometry, Selection
from foveate.attention.pairs import bytes_read
from foveate.bench.clock import Rates, Timing, rates, wait
from foveate.bench.early import Deadline, Late, first_layers, of_each_kind
from foveate.bench.pairs import PromptPairs, density, multiplied, narrowed, prompt_flops
from foveate.bench.profile import Profiled, Work
from foveate.bench.prompt import filled, plain
from foveate.cache import Band, FoveateCache
from foveate.engine.apply import apply
from foveate.engine.binding import Binding
from foveate.errors import FoveateError
from foveate.methods.base import Composition, Profile
from foveate.models.shape import ModelShape

PLAIN = "transformers"
"""The row of the model without Foveate."""

_UNTIMED = 8
"""First tokens of an answer, in which steps are recorded and kernels compiled."""

_PROFILED = 4
"""Tokens that a profile is made of; one more lies between them and the timed ones."""

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Args:
        method: composition id, or `PLAIN`.
        length: tokens of context.
        settings: by method id.
        arbitrary: methods whose calibration was made up, since random weights have nothing to calibrate on.
        prefill: of the prompt; None where it was made of random keys without one.
        density: pairs of the prompt that were read, over those that the model reads.
        prefill_floor_s: seconds for the operations of the weights and of the pairs that were read.
        decode: of one token; None where none was asked for.
        floor_s: seconds for the bytes that one token must read, at the measured rate.
        read_bytes: of keys and values (and of what is looked at to choose them) per token.
        weight_bytes: of the model, read by every token.
        kv_bytes: held while decoding.
        prefill_peak_bytes, peak_bytes: most that the device held in all, weights included, by the end of the prompt and
            of the answer; 0 where the device does not say.
        prefill_profile, decode_profile: what the device did for the prompt and for one token, where it was looked at;
            `unprofiled` says why there is none though it was asked for.
        recorded: whether steps were replayed from a graph; why_not otherwise.
        refused: why there are no figures.
    """

    method: str
    length: int
    settings: dict[str, Any] = field(default_factory=dict)
    arbitrary: tuple[str, ...] = ()
    prefill: Timing | None = None
    density: float = 1.0
    prefill_floor_s: float = 0.0
    decode: Timing | None = None
    floor_s: float = 0.0
    read_bytes: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    prefill_peak_bytes: int = 0
    peak_bytes: int = 0
    prefill_profile: Work | None = None
    decode_profile: Work | None = None
    unprofiled: str = ""
    recorded: bool = False
    why_not: str = ""
    refused: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON values; times in milliseconds."""
        apart = {"prefill", "density", "prefill_floor_s", "decode", "floor_s", "arbitrary"}
        apart |= {"prefill_profile", "decode_profile", "unprofiled"}
        values = {k: v for k, v in vars(self).items() if k not in apart}
        if self.arbitrary:
            values["arbitrary"] = list(self.arbitrary)
        both = ("prefill", self.prefill, self.prefill_profile), ("decode", self.decode, self.decode_profile)
        for name, timing, work in both:
            if timing is not None:
                values |= {f"{name}_{k}": v for k, v in timing.as_ms().items()}
            if timing is not None and work is not None:
                values[f"{name}_profile"] = work.as_json(timing.median)
        if self.unprofiled:
            values["unprofiled"] = self.unprofiled
        if self.prefill is not None:
            values |= {"prefill_density": self.density, "prefill_floor_ms": 1e3 * self.prefill_floor_s}
            values["prefill_of_floor"] = self.prefill.median / self.prefill_floor_s
        if self.decode is not None:
            values |= {"decode_floor_ms": 1e3 * self.floor_s, "decode_of_floor": self.decode.median / self.floor_s}
        return values


Applied = tuple[Composition, dict[str, Profile]]


@dataclass(frozen=True)
class Bench:
    """What is measured of every method.

    Args:
        prompt: read a real prompt of random tokens, and time it; False fills the cache with random keys and values.
        repeats: prompts that are timed.
        steps: tokens that are timed; 0: none.
        rows: sequences side by side.
        baseline: measure plain transformers first.
        profile: look where the time goes, too: at the prompt that is not timed, and at tokens behind the timed ones.
        limit: seconds that the prompts and tokens of a row may take before it is given up; None: any.
    """

    prompt: bool = False
    repeats: int = 1
    steps: int = 64
    rows: int = 1
    baseline: bool = True
    profile: bool = False
    limit: float | None = None

    def run(
        self, model: Any, methods: Sequence[Applied], lengths: Sequence[int], watch: Watch = lambda what: None
    ) -> Iterator[Row]:
        """A row for each length and method, as they come."""
        machine = rates(model.device)
        for length in lengths:
            if self.baseline:
                watch(f"{PLAIN}, {length} tokens")
                yield self._safely(Row(PLAIN, length), lambda n=length: self._plain(model, n, machine), model.device)
            for composition, profiles in methods:
                watch(f"{composition.id}, {length} tokens")
                settings = {m.id: m.settings() for m in composition.methods}
                row = Row(composition.id, length, settings, tuple(n for n, p in profiles.items() if p.arbitrary))
                yield self._safely(
                    row, lambda r=row, a=(composition, profiles): self._method(model, a, r, machine), model.device
                )

    def _safely(self, row: Row, measure: Callable[[], Row], device: torch.device) -> Row:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            with torch.no_grad():
                return measure()
        except (FoveateError, Late) as error:
            return replace(row, refused=str(error))
        except torch.OutOfMemoryError:
            return replace(row, refused="out of memory")
        except Exception as error:  # one method that fails must not take the rows of the others with it
            return replace(row, refused=f"{type(error).__name__}: {str(error).strip()[-300:]}")

    def _plain(self, model: Any, length: int, machine: Rates) -> Row:
        row, end = Row(PLAIN, length, weight_bytes=weight_bytes(model)), Deadline(self.limit)
        cache: Any = None
        if self.prompt:
            kinds = [(layer.kind, layer.window) for layer in ModelShape.of(model).layers]
            row, cache = self._read(model, row, lambda: compat.DynamicCache(config=model.config), machine, kinds, end)
        if self.steps:
            cache = plain(model, length, rows=self.rows) if cache is None else cache
            row = self._generate(model, row, cache, end)
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        floor = machine.floor(row.weight_bytes + held)
        return replace(row, floor_s=floor, read_bytes=held, kv_bytes=held, peak_bytes=peak(model.device))

    def _method(self, model: Any, applied: Applied, row: Row, machine: Rates) -> Row:
        composition, profiles = applied
        row = replace(row, weight_bytes=weight_bytes(model))
        with apply(model, composition, profile=list(profiles.values())) as handle:
            handle.binding.check(row.length)
            cache: Any = None
            end = Deadline(self.limit)
            if self.prompt:
                count, kinds = narrowed(handle.binding, row.length), layer_kinds(handle.binding, row.length)
                row, cache = self._read(model, row, handle.cache, machine, kinds, end, count)
            if self.steps:
                cache = filled(handle.binding, row.length, rows=self.rows) if cache is None else cache
                row = self._generate(model, row, cache, end)
                recorded = cache.step is not None
                why = "" if recorded else cache.unrecorded or handle.binding.ungraphed
                cache.step = None  # a graph has memory of its own
                row = replace(row, recorded=recorded, why_not=why if model.device.type == "cuda" else "")
            row = replace(row, kv_bytes=cache.nbytes, peak_bytes=peak(model.device))
            if self.steps:
                read = read_bytes(handle.binding, cache, self.rows)
                row = replace(row, read_bytes=read, floor_s=machine.floor(row.weight_bytes + read))
        return row

    def _read(
        self,
        model: Any,
        row: Row,
        make: Callable[[], Any],
        machine: Rates,
        kinds: Sequence[Hashable],
        end: Deadline,
        count: bool = False,
    ) -> tuple[Row, Any]:
        """Read a prompt into a new cache, several times; the last cache stays.

        The first prompt compiles what this length asks for. Layers of one kind ask for the same, so that it ends behind
        the first of each kind, unless it is to be profiled.

        Args:
            kinds: of the layers.
            count: count the pairs that are read. What that takes is taken off the time.
        """
        vocabulary = compat.text_config(model).vocab_size
        ids = torch.randint(0, vocabulary, (self.rows, row.length), device=model.device)
        seconds, cache, pairs = [], None, PromptPairs()
        seen = Profiled(model.device)
        for number in range(self.repeats + 1):
            cache = None
            cache = make()
            pairs = PromptPairs()
            looked = self.profile and not number
            layers = None if number or looked else of_each_kind(kinds)
            if count:  # what counting takes is no part of a profile, but a trace may change what kernels are taken
                cache.trace = (lambda *read: None) if looked else pairs
            wait(model.device)
            start = time.perf_counter()
            with seen if looked else nullcontext(), end.watched(model), first_layers(model, layers):
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            wait(model.device)
            if number:
                seconds.append(time.perf_counter() - start - pairs.seconds)
            if count:
                cache.trace = None
        shape = ModelShape.of(model)
        flops = prompt_flops(shape, row.length, self.rows, multiplied(model, row.weight_bytes), pairs.read)
        row = replace(
            row,
            prefill=Timing.of(seconds),
            density=density(shape, row.length, self.rows, pairs.read),
            prefill_floor_s=machine.floor(row.weight_bytes, flops),
            prefill_peak_bytes=peak(model.device),
            prefill_profile=seen.work,
            unprofiled=seen.why,
        )
        return row, cache

    def _generate(self, model: Any, row: Row, cache: Any, end: Deadline) -> Row:
        """The time of one token inside `generate()`, the first few left out.

        `generate()` waits for the device once per token, when it asks whether the answer is over: from one stamp to the
        next is one token's whole time. To wait at each stamp, too, would have the device stand still for longer than it
        does when nobody looks.

        A profile is made of further tokens of the same answer, for which recorded steps have room already.
        """
        device, stamps = model.device, []
        seen, recorded = Profiled(device, _PROFILED), (0, 0)
        timed = self.steps + _UNTIMED
        new = timed + (1 + _PROFILED if self.profile else 0)

        def stamp(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            stamps.append(time.perf_counter())
            end.check()
            if self.profile:
                look(len(stamps) - timed)
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        def look(further: int) -> None:
            nonlocal recorded
            if further == 0:
                seen.prepare()
            elif further == 1:
                recorded = _recorded(cache)
                seen.start()
            elif further == 1 + _PROFILED:
                seen.stop()

        ids = torch.randint(0, compat.text_config(model).vocab_size, (self.rows, row.length + 1), device=device)
        wait(device)
        try:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                stopping_criteria=[stamp],
                pad_token_id=0,
            )
        finally:
            seen.stop()  # a profiler that is left on would be in the way of the next row
        gaps = [b - a for a, b in pairwise(stamps[:timed])]
        work, why = seen.work, seen.why
        if work is not None and _recorded(cache) != recorded:
            work, why = None, "a step was recorded while tokens were profiled"
        unprofiled = "; ".join(dict.fromkeys(filter(None, (row.unprofiled, why))))
        return replace(row, decode=Timing.of(gaps[_UNTIMED - 1 :]), decode_profile=work, unprofiled=unprofiled)


def _recorded(cache: Any) -> tuple[int, int]:
    """Changes when a decode step is recorded, which takes further steps that are none of the answer."""
    step = getattr(cache, "step", None)
    return (0, 0) if step is None else (id(step), step.kinds)


def layer_kinds(binding: Binding, length: int) -> list[Hashable]:
    """What tells layers apart that take other kernels for a prompt of this length."""
    cache = binding.cache()
    binding.plan_cache(cache, length)
    plans = (plan for _, plan in sorted(binding.plans(cache).items()))
    return [(p.shape.kind, p.shape.window, *(role.name for role in p.roles.values())) for p in plans]


def peak(device: torch.device) -> int:
    """Most bytes that the device held since the row began; 0 where it does not say."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one step reads at least: all but the embedding table, of which it reads a few rows (a tied
    table is read whole by the output head), and of routed experts those of one token."""
    text = compat.text_config(model)
    many = getattr(text, "n_routed_experts", None) or getattr(text, "num_experts", None) or 0
    share = text.num_experts_per_tok / many if many else 1.0
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    total = sum(
        int(p.numel() * p.element_size() * (share if ".experts." in name else 1))
        for name, p in model.named_parameters()
    )
    return total if head is not None and head.weight is table else total - table.numel() * table.element_size()


def read_bytes(binding: Binding, cache: FoveateCache, rows: int) -> int:
    """Bytes of keys, values and summaries that one more decode step reads, counted on the selections themselves, and of
    what methods say that they looked at beside them."""
    total = 0

    def count(layer: int, phase: str, band: Band, chosen: Selection, at: Geometry, seen: Any, group: int) -> None:
        nonlocal total
        held = band.k.nbytes + (0 if band.v is None else band.v.nbytes)
        slot = held / max(1, len(band.pairs) * band.capacity)
        total += int(slot * bytes_read(chosen, at, group, 1, 1, seen))
        if chosen.lists is not None:
            total += sum(t.numel() * t.element_size() for t in band.summaries.values())

    fork = cache.fork()
    fork.trace, fork.meter = count, {}
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=binding.model.device)
    binding.model(input_ids=ids, past_key_values=fork, use_cache=True)
    return total + int(fork.meter.get("decode_looked", 0))
