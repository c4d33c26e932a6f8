"""Whether a step can be replayed is found out behind the last one, and anew if anything changed since."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.recorded import recording
from tests.contract.runs import EXACT, tokens
from torch import Tensor

import foveate
from foveate.engine.step import StepCall
from foveate.models import tiny


def test_looks_are_made_behind_a_step_and_anew_after_changes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny("llama")
    looks: list[bool] = []
    kinds: list[bool] = []
    stale: Any = StepCall.stale
    kind = StepCall.kind

    def counted(self: StepCall) -> bool:
        looks.append(True)
        return stale.fget(self)

    monkeypatch.setattr(StepCall, "stale", property(counted))
    monkeypatch.setattr(StepCall, "kind", lambda self: kinds.append(True) or kind(self))
    ids, new = tokens(seed, 1, 30), tokens(seed + 1, 1, 12)

    def step(i: int) -> Tensor:
        return net(input_ids=new[:, i : i + 1], past_key_values=cache, use_cache=True).logits

    with torch.no_grad(), foveate.apply(net, "dense") as handle, recording(net, handle):
        cache = handle.cache()
        net(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.waiting = 1
        for i in range(4):
            step(i)
        recorded = cache.step
        assert recorded is not None
        looks.clear()
        kinds.clear()
        step(4)
        assert len(looks) == len(kinds) == 1  # behind it, for the next
        cache.crop(-1)
        want = step(4)
        assert len(looks) == len(kinds) == 3 and cache.step is recorded
        other = cache.fork(handle.binding)
        cache.crop(-1)
        cache.waiting, cache.step = 99, None
        assert_close(step(4), want, EXACT)
        before = [layer.changes for layer in other.couriers()]
        other.reorder_cache(torch.tensor([0]))
        assert all(layer.changes > count for layer, count in zip(other.couriers(), before, strict=True))
