"""Kernels of a recorded step that start before the one in front of them has ended.

Between two kernels of a CUDA graph a GPU empties itself and fills up again, some two microseconds of which little is
work, and a decode step has hundreds of them. On Hopper and later the programs of the next kernel may take their places
as soon as all of the one in front have theirs ("programmatic dependent launch"): they get ready, and wait until the
results are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

_able: ContextVar[bool] = ContextVar("able", default=False)


@contextmanager
def early_starts(device: torch.device) -> Iterator[None]:
    """Within it `early` kernels start early, if the device can: for steps that are recorded, in which nobody changes
    what a kernel may read before it waits."""
    token = _able.set(device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))
    try:
        yield
    finally:
        _able.reset(token)


class early:
    """A Triton kernel that may start early. Its last parameter is `EARLY: tl.constexpr`, which is not given where it is
    launched, and `in_turn(EARLY)` stands in front of whatever an earlier kernel may have written or may still read."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return partial(launch, EARLY=True, launch_pdl=True) if _able.get() else partial(launch, EARLY=False)
