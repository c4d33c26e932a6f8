"""What is timed: a case, the kernels that can compute it, and the truth that they are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Answer = Any
"""What a kernel returns: a tensor, or tensors of which the first is the output."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute a case.

    Args:
        name: "foveate ..." for our own.
        work: the call that is timed.
        read: brings its answer into the form that the check of the case takes; not timed.
        slow: it takes long to compile, and is left out where time is short.
    """

    name: str
    work: Callable[[], Answer]
    read: Callable[[Answer], Answer] = lambda answer: answer
    slow: bool = False


@dataclass(frozen=True)
class Check:
    """How far an answer is from the truth.

    Args:
        error: relative, root of the mean square; exact choices give 0 or 1.
        bound: the most that is allowed.
        lse_error: largest difference of log-masses, None where there are none; 0.01 is allowed.
    """

    error: float
    bound: float
    lse_error: float | None = None

    @property
    def passed(self) -> bool:
        # Written so that NaN does not pass.
        return self.error <= self.bound and (self.lse_error is None or self.lse_error <= 1e-2)


@dataclass(frozen=True)
class Made:
    """A case with its inputs.

    Args:
        kernels: those that can compute it here.
        check: compares an answer with the truth.
        nbytes: that must be read and written at least.
        flops: operations that must be done.
        density: share of the dense case's work.
        facts: further JSON values of the rows.
    """

    kernels: Sequence[Kernel]
    check: Callable[[Answer], Check]
    nbytes: float
    flops: float
    density: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One problem of one length.

    Args:
        family: the group it belongs to.
        name: the problem in a few words, the same at every length.
        length: tokens of context.
        make: draws its inputs from a generator.
        dense: family whose fastest kernel is the dense attention of this case; None: nothing to compare with.
        recorded: times are those of a replayed graph, as in decoding.
    """

    family: str
    name: str
    length: int
    make: Callable[[torch.Generator], Made]
    dense: str | None = None
    recorded: bool = False


def has_kernels(device: torch.device) -> bool:
    """Whether our Triton kernels are timed on this device."""
    return device.type == "cuda"


BOUNDS = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3, torch.float32: 1e-4}
"""Relative errors that rounding explains."""


def distance(got: Tensor, want: Tensor) -> float:
    """Root of the mean square of the difference, relative to the truth; NaN where one is not finite."""
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))


def compare(got: Answer, out: Tensor, lse: Tensor, dtype: torch.dtype, whole: Tensor | None = None) -> Check:
    """Check out and, if the kernel gives it, lse.

    Args:
        whole: all that the kernel wrote, which must be finite.
    """
    answer, mass = (got[0], got[1]) if isinstance(got, tuple | list) else (got, None)
    error = distance(answer, out)
    if whole is not None and not bool(torch.isfinite(whole).all()):
        error = float("nan")
    return Check(error, BOUNDS[dtype], None if mass is None else float((mass.float() - lse).abs().max()))
