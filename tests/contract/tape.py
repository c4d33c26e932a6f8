"""A CUDA graph on a CPU: device work is noted once and repeated; what the host worked out stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from foveate.attention import attend
from foveate.engine import read
from foveate.errors import Refused

aten = torch.ops.aten
LOOKS = {
    aten._local_scalar_dense.default: "item()",
    aten.nonzero.default: "nonzero()",
    aten.masked_select.default: "masked_select()",
    aten.equal.default: "equal()",
    aten._unique2.default: "unique()",
    aten.repeat_interleave.Tensor: "repeat_interleave()",
    aten.lift_fresh.default: "a tensor of host values",
}
HOST = {torch: ("from_numpy",), Tensor: ("numpy", "cpu", "tolist")}
"""What brings values from or to the host, besides operations."""


class Tape(TorchDispatchMode):
    """Notes every operation within it. What needs the host is refused, as a graph refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.away = False
        """Within a kernel, which is one operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if func in LOOKS or (func in (aten.index.Tensor, aten.index_put_.default) and masks):
            raise _refused(LOOKS.get(func, "a mask as an index"))
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(x, Tensor):
                held = x.untyped_storage()
                self.before.setdefault(held.data_ptr(), (held, held.clone()))
        out = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, out))
        return out

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Attention as one operation: which kernel serves it, and what that looks at, is another matter on a GPU."""
        self.away = True
        with _disable_current_modes():
            out = attend(*args, **kwargs)
        self.away = False
        self.notes.append((attend, args, kwargs, out))
        return out

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within it, all work is noted and undone at the end: a graph does nothing while it is recorded."""

        def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            def look(*args: Any, **kwargs: Any) -> Any:
                if not self.away:
                    raise _refused(f"{name}()")
                return function(*args, **kwargs)

            return look

        guards = [
            patch.object(owner, name, guarded(getattr(owner, name), name))
            for owner, names in HOST.items()
            for name in names
        ]
        try:
            for guard in guards:
                guard.start()
            with self, patch.object(read, "attend", self.attend):
                yield
        finally:
            for guard in guards:
                guard.stop()
            for held, before in self.before.values():
                held.copy_(before)

    def play(self) -> dict[int, Tensor]:
        """Make all of it again. Returns by id what each noted tensor is this time."""
        now: dict[int, Tensor] = {}
        for func, args, kwargs, out in self.notes:
            again = func(*_with(args, now), **_with(kwargs, now))
            for old, new in zip(
                tree_leaves(tuple(out) if isinstance(out, tuple) else out), tree_leaves(again), strict=True
            ):
                if isinstance(old, Tensor):
                    now[id(old)] = new
        return now


def _refused(what: str) -> Refused:
    return Refused(f"the step could not be recorded: {what}")


def _with(x: Any, now: dict[int, Tensor]) -> Any:
    """The same with tensors of this time."""
    if isinstance(x, Tensor):
        return now.get(id(x), x)
    if isinstance(x, dict):
        return {key: _with(value, now) for key, value in x.items()}
    if isinstance(x, list | tuple):
        values = [_with(value, now) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: _with(getattr(x, f.name), now) for f in fields(x) if f.init})
    return x


def record(run: Callable[..., Tensor], counters: list[Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`foveate.engine.captured.record` with a tape instead of a graph."""
    before = [t.clone() for t in counters]
    try:
        run(rehearsing=True)  # as on a GPU, whose libraries initialise themselves outside the recording
    finally:
        for t, value in zip(counters, before, strict=True):
            t.copy_(value)
    tape = Tape()
    with tape.noting():
        result = run()
    return lambda: tape.play().get(id(result), result)
