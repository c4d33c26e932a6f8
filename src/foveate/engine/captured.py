"""Decode steps on a GPU: recorded once as a CUDA graph, then replayed, so that no time is lost in Python.

A step of one token per row is the same device work whatever has been decoded before it: the store's tensors stay where
they are, lengths are counted on the device, and the host only says which tokens come in. Where that is not so (a method
looks at values on the host, a window is still filling, a column has to grow) the step is made in the ordinary way.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.cache import FoveateCache
from foveate.cache.cache import WARMUP
from foveate.engine.fused import fused
from foveate.engine.later import now
from foveate.engine.step import StepCall
from foveate.errors import Refused

LEAST_ROOM = 256
"""Fewest tokens that a recorded step finds room for."""

LEAST_FUSED = 1024
"""Fewest tokens of a forward that is not recorded whose small operations are fused. Changing the modules takes the host
9 ms where there are 32 layers, and the kernels that it saves less than that where there are few tokens."""

PATIENCE = 64
"""Steps after which a cache that could not be recorded is looked at again."""

_HARMLESS = frozenset({"use_cache", "return_dict", "attention_mask", "cache_position", "position_ids", "input_ids"})
"""Arguments that change nothing about a decode step: the store knows its rows, and positions are given."""


_KNOWN = _HARMLESS | {"past_key_values"}


class Look(NamedTuple):
    """At what may have changed before a step.

    Args:
        changes: count of what was changed by other means than a replay.
        caught: whether it could be caught up with.
        stale: something lies elsewhere now, or has no room for one more token.
        kind: of the next step; None if it is made in the ordinary way.
    """

    changes: int
    caught: bool
    stale: bool
    kind: Hashable


class Step:
    """The recorded decode steps of one cache, one of each kind.

    Args:
        forward: the model's own forward.
        cache: sealed, with a token per row decoded already.
        ids: [B, 1], as the next step brings them; so do positions.
        options: further keyword arguments of the forward.
    """

    def __init__(
        self, forward: Callable[..., Any], cache: FoveateCache, ids: Tensor, positions: Tensor, options: dict[str, Any]
    ) -> None:
        places = {str(x.device) for x in cache.owner.model.parameters()}
        if len(places) > 1:
            raise Refused(f"the model lies on several devices ({', '.join(sorted(places))})")
        seen = max(int(layer.store.seen.max(initial=0)) for layer in cache.couriers())
        room = cache.horizon - seen if cache.horizon > seen else max(LEAST_ROOM, seen // 16)
        self.call = StepCall(cache, room)
        self.forward, self.cache = forward, cache
        self.ids, self.positions, self.options = ids.clone(), positions.clone(), dict(options)
        self.form: Any = None
        self._looked: Look | None = None
        self._replays: dict[Hashable, Callable[[], Tensor]] = {}
        for index in self.call.stores:
            cache.touch(index)  # what was reserved counts

    @property
    def kinds(self) -> int:
        """How many have been recorded."""
        return len(self._replays)

    def catches_up(self) -> bool:
        """Take over what came by another way since the last replay. False if the next step can be none of these."""
        return self._look().caught

    def fits(self, ids: Tensor, options: dict[str, Any]) -> bool:
        """Whether the next step is one of these."""
        return ids.shape == self.ids.shape and options == self.options and not self._look().stale

    def _look(self) -> Look:
        changes = self.call.changes
        if self._looked is None or self._looked.changes != changes:
            caught = self.call.catch_up()
            self._looked = Look(changes, caught, self.call.stale, self.call.kind())
        return self._looked

    def __call__(self, ids: Tensor, positions: Tensor) -> Any:
        """The model's output for tokens [B, 1] at positions [B, 1]; None if this step is made in the ordinary way.

        Raises:
            Refused: if it cannot be recorded.
        """
        kind = self._look().kind
        if kind is None:
            return None
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        if kind not in self._replays:
            self._replays[kind] = record(self._run, self.call.counters(), ids.device)
        logits = self._replays[kind]()
        self.call.arrived()
        self._looked = None
        self._look()  # now, while the device works, and not while it waits for the next step
        return self.form(logits=logits.clone(), past_key_values=self.cache)

    def _run(self, rehearsing: bool = False) -> Tensor:
        self.cache.recording, self.call.rehearsing, self.call.scratch = self.call, rehearsing, {}
        try:
            with fused(self.cache.owner.model):
                out = self.forward(
                    input_ids=self.ids,
                    position_ids=self.positions,
                    past_key_values=self.cache,
                    use_cache=True,
                    **self.options,
                )
            self.call.standing.write_back()
        finally:
            self.cache.recording = None
            self.call.standing.put_back()
            for layer in self.cache.couriers():
                layer.staged = None
        self.form = type(out)
        return now(out.logits)


def record(run: Callable[..., Tensor], counters: list[Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that repeats the device work of `run` and returns its result, which the next call overwrites.

    Args:
        run: makes the step; run(rehearsing=True) is undone by putting the counters back.
        counters: what a step changes, besides what nobody reads yet.

    Raises:
        Refused: if the work waits for the host.
    """
    if device.type != "cuda":
        return run
    before = [t.clone() for t in counters]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        try:
            run(rehearsing=True)  # libraries initialise themselves outside the recording
        finally:
            for t, value in zip(counters, before, strict=True):
                t.copy_(value)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with uncollected(), torch.cuda.graph(graph, stream=stream):  # torch's own lies on the GPU that recorded first
            result = run()
    except RuntimeError as error:  # something waited for the device
        torch.cuda.synchronize(device)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f"the step could not be recorded: {reason[0]}") from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it no garbage is collected: if an older graph is among it, the device refuses to let it go while another
    is recorded, and gives up that one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Forward:
    """`model.forward` of an applied model: replays decode steps where it can, else calls the model."""

    def __init__(self, handle: Any, original: Callable[..., Any]) -> None:
        self.handle, self.original = handle, original
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if args or not isinstance(cache, FoveateCache) or cache.recording is not None:
            return self._ordinary(*args, **kwargs)
        if not steps_alone(cache, kwargs):
            return self._ordinary(**kwargs)
        ids = kwargs["input_ids"]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, cache.get_seq_length())
        options = {k: v for k, v in kwargs.items() if k not in _KNOWN and v is not None}
        with torch.cuda.device_of(ids):
            out = self._replayed(cache, ids, positions, options)
        return self._ordinary(**kwargs) if out is None else out

    def _ordinary(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward. The small operations of a long one are fused where nobody asks for gradients."""
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        tokens = given.shape[:2].numel() if isinstance(given, Tensor) else 0
        if tokens < LEAST_FUSED or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        with fused(self.handle.model):
            return self.original(*args, **kwargs)

    def _replayed(self, cache: FoveateCache, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Any:
        """The output of a recorded step, or None where the step has to be made in the ordinary way."""
        step = cache.step
        if step is not None and not step.catches_up():
            cache.step, cache.waiting = None, WARMUP  # methods have to find their way again
            return None
        try:
            if step is None or not step.fits(ids, options):
                cache.step = None
                if cache.waiting > 0:
                    cache.waiting -= 1
                    return None
                cache.step = Step(self.original, cache, ids, positions, options)
            return cache.step(ids, positions)
        except Refused as refused:
            cache.step, cache.unrecorded, cache.waiting = None, str(refused), PATIENCE
            return None


def steps_alone(cache: FoveateCache, kwargs: dict[str, Any]) -> bool:
    """Whether a forward is one decode step that nobody watches, by methods that only need the device."""
    ids = kwargs.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or torch.is_grad_enabled():
        return False
    if kwargs.get("use_cache") is False or any(
        value for key, value in kwargs.items() if key.startswith("output_") or key in ("labels", "inputs_embeds")
    ):
        return False
    if not all(isinstance(v, int | float | str) for k, v in kwargs.items() if v is not None and k not in _KNOWN):
        return False
    if cache.meter is not None or cache.trace is not None or cache.announced or not cache.owner.graph:
        return False
    return all(layer.sealed and not layer.record_past and layer.staged is None for layer in cache.couriers())
