"""What a GPU reads by kernels is what PyTorch reads: every method once, the kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import EXACT, left_padded, run, tokens
from tests.contract.subjects import Case, applied, each_method, model

from foveate.attention import decoding, triton_prefill
from foveate.attention.angles import Angles
from foveate.methods.policies.lists import counted_lists

pytest.importorskip("triton")

from foveate.attention.triton import turn

FEW = 16
"""Rows of which the interpreter finds the best, and eighths of those that it turns: it is slow, and these kernels have
tests of their own."""


@contextmanager
def as_on_a_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are taken wherever a GPU would take them."""

    serves, best, turned = decoding.serves, decoding.best, turn.turn

    def machine(q: torch.Tensor, forced: bool) -> str:
        return "it knows no float64" if q.dtype == torch.float64 else ""

    def plainly(made: Callable[[], Any]) -> Any:
        with patch.context() as without:
            without.setattr(decoding, "serves", serves)
            return made()

    def best_of_few(scores: torch.Tensor, k: int, limits: torch.Tensor | None = None, **how: Any) -> Any:
        few = scores.shape[:-1].numel() <= FEW
        return best(scores, k, limits, **how) if few else plainly(lambda: counted_lists(scores, k, limits))

    def turn_few(x: torch.Tensor, delta: torch.Tensor, angles: Angles) -> torch.Tensor:
        few = x.shape[:-1].numel() <= 8 * FEW
        return turned(x, delta, angles) if few else plainly(lambda: angles.move(x, delta))

    with patch.context() as within:
        within.setattr(decoding, "serves", lambda q, forced=False: (not machine(q, forced), machine(q, forced)))
        within.setattr(decoding, "best", best_of_few)
        within.setattr(turn, "turn", turn_few)
        for module in ("attention.triton_prefill", "attention.columns", "methods.policies.lowbit"):
            within.setattr(import_module(f"foveate.{module}"), "machine", machine)
        yield


@pytest.mark.skipif(torch.cuda.is_available() or not triton_prefill._interpreted(), reason="needs Triton's interpreter")
@each_method()
def test_kernels_change_nothing(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of rows of different length and two steps."""
    ids, mask = left_padded([tokens(seed + n, n) for n in (61, 45)])
    found = []
    with applied(model(case.family), case) as handle:
        for how in (nullcontext(), as_on_a_gpu(monkeypatch)):
            with how:
                found.append(run(handle.model, handle.cache(), ids, tokens(seed, 2, 2), mask))
    real = mask.bool()
    assert_close(found[1].prompt[real], found[0].prompt[real], EXACT)
    assert_close(found[1].steps, found[0].steps, EXACT)
