"""Work on a model that ends early: behind its first layers, or when its time is over."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from foveate import compat


class Late(Exception):
    """The time of a row is over."""


class _Enough(Exception):
    """The layers that were asked for have been computed."""


class Deadline:
    """When a row is given up.

    Args:
        seconds: from now on; None: never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.began, self.seconds = time.perf_counter(), seconds

    def check(self, *args: Any) -> None:
        """Late if it is over. Takes whatever a hook is given."""
        spent = time.perf_counter() - self.began
        if self.seconds is not None and spent > self.seconds:
            raise Late(f"stopped after {spent:.0f} s of prompt and answer, which is more than the limit")

    @contextmanager
    def watched(self, model: Any) -> Iterator[None]:
        """Within it, each layer looks at the time before it begins."""
        with ExitStack() as stack:
            if self.seconds is not None:
                for module in compat.attention_modules(model):
                    stack.callback(module.register_forward_pre_hook(self.check).remove)
            yield


@contextmanager
def first_layers(model: Any, count: int | None) -> Iterator[None]:
    """Within it, a forward of the model ends, without a word, behind so many layers; None: behind the last."""
    attention = list(compat.attention_modules(model))
    if count is None or count >= len(attention):
        yield
        return

    def stop(*args: Any) -> None:
        raise _Enough

    hook = attention[count].register_forward_pre_hook(stop)
    try:
        with suppress(_Enough):
            yield
    finally:
        hook.remove()


def of_each_kind(kinds: Sequence[Hashable], least: int = 4) -> int:
    """How many of the first layers hold one of each kind, and `least` at least."""
    return max(least, *(kinds.index(kind) + 1 for kind in set(kinds))) if kinds else least
