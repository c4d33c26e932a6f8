"""A recorded decode step is the eager one: same logits, same bookkeeping, and what cannot be recorded stays eager.

On a CPU the graph is a tape of the step's operations: what the host worked out while it was made stays as it was.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.recorded import recording, steps
from tests.contract.runs import EXACT, left_padded, tokens
from tests.contract.subjects import CASES, Case, applied, each_method, model, precise
from tests.contract.tape import record
from torch import Tensor

from foveate.attention import decoding
from foveate.engine import captured
from foveate.engine.apply import Handle
from foveate.errors import Refused


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_recorded_steps_are_eager_steps(case: Case, family: str, seed: int) -> None:
    net = precise(case, family)
    ids, mask = left_padded([tokens(seed, 61), tokens(seed + 1, 88)])
    new = torch.stack([tokens(seed + 2, 40), tokens(seed + 3, 40)])
    with applied(net, case) as handle:
        if not handle.binding.graph:
            new = new[:, :5]  # nothing is recorded: a few steps show that nothing is touched either
        eager, want = steps(net, handle, ids, mask, new)
        with recording(net, handle):
            cache, got = steps(net, handle, ids, mask, new)
        if not handle.binding.graph:
            assert cache.step is None and not cache.unrecorded
        elif cache.step is None:
            assert cache.unrecorded, "nothing was recorded, and nobody said why"
        assert_close(got, want, EXACT)
        for layer, other in zip(cache.couriers(), eager.couriers(), strict=True):
            cache.owner.settle(layer)
            eager.owner.settle(other)
            assert (layer.store.lengths == other.store.lengths).all()
            assert layer.columns == other.columns


@pytest.mark.parametrize(
    "name",
    [
        "snapkv",
        "duo-attention",
        "quest",
        "kivi",
        "h2o",
        "delta-attention",
        "tokenselect",
        "streaming-llm",
        "lycheedecode",
        "recycled-attention",
    ],
)
def test_kernels_make_the_same_steps(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but in Triton's interpreter: tokens arrive and are read by kernels."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    case = CASES[name]
    net = model("llama", 2)
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 8).unsqueeze(0)
    with applied(net, case) as handle:
        _, want = steps(net, handle, ids, None, new)
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
        with recording(net, handle, by=captured.record):  # no tape notes what Triton launches
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None
        stores = cache.step.call.stores.values()
        assert all(store.kernels is not None or not band.exact for store in stores for band in store.bands)
        assert_close(got, want, EXACT)


@pytest.mark.parametrize(
    ("name", "settings", "recordings"),
    [
        ("kivi", {}, 1),
        ("snapkv|kivi", {}, 1),
        ("kivi|quest", {}, 1),
        ("h2o", {}, 1),
        ("h2o|quest", {}, 1),
        ("h2o", {"budget": 80}, 2),
    ],
)
def test_a_recording_serves_an_answer(name: str, settings: dict[str, Any], recordings: int, seed: int) -> None:
    """Packing a group, moving a tail on and freeing tokens leave everything where it is. Before a cache is full its
    steps free nothing, which is another recording."""
    case, *others = (CASES[part] for part in name.split("|"))
    net = precise(CASES["kivi"])
    methods = case.method(**settings) if not others else case.method() | others[0].method()
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 60).unsqueeze(0)
    with applied(net, case, methods) as handle:
        _, want = steps(net, handle, ids, None, new)
        made: list[Any] = []
        with recording(net, handle, by=lambda *args: made.append(args) or record(*args)):
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None and len(made) == recordings
        assert_close(got, want, EXACT)


def test_steps_of_each_kind_are_recorded_once(seed: int) -> None:
    """Recycled Attention looks everywhere in one step of so many: that is another step than those between."""
    net, method = model("llama", 2), CASES["recycled-attention"].cls(tokens=24, stride=6)
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 40).unsqueeze(0)
    with applied(net, CASES["recycled-attention"], method) as handle:
        _, want = steps(net, handle, ids, None, new)
        made: list[Any] = []
        with recording(net, handle, by=lambda *args: made.append(args) or record(*args)):
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None and len(made) == 2
        assert_close(got, want, EXACT)


def test_what_is_remembered_may_be_lost_between_steps(seed: int) -> None:
    """A crop forgets votes: a few steps are made in the ordinary way, then one is recorded again."""
    net, case = model("llama", 2), CASES["tokenselect"]
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 24).unsqueeze(0)

    def go(handle: Handle) -> tuple[Any, Tensor]:
        cache, first = steps(net, handle, ids, None, new[:, :12])
        cache.crop(-3)
        out = []
        with torch.no_grad():
            for i in range(12, 24):
                at = torch.full((1, 1), 61 + i - 3)
                got = net(input_ids=new[:, i : i + 1], position_ids=at, past_key_values=cache, use_cache=True)
                out.append(got.logits[:, -1])
        return cache, torch.cat([first, torch.stack(out, 1)], 1)

    with applied(net, case) as handle:
        _, want = go(handle)
        with recording(net, handle):
            cache, got = go(handle)
        assert cache.step is not None
        assert_close(got, want, EXACT)


def test_a_step_that_looks_at_values_is_refused_by_the_tape() -> None:
    """The test above would not notice otherwise."""
    x = torch.zeros(3)

    def step(rehearsing: bool = False) -> Tensor:
        return x + float(x.sum())

    with pytest.raises(Refused, match="item"):
        record(step, [], x.device)


def test_nothing_is_collected_while_a_graph_is_recorded() -> None:
    """On a GPU the end of an older graph would be the end of the one that is recorded."""

    def fail() -> None:
        with captured.uncollected():
            assert not gc.isenabled()
            raise RuntimeError("wrong")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="wrong"):
        fail()
    assert gc.isenabled()
    gc.disable()
    try:
        with captured.uncollected():
            pass
        assert not gc.isenabled(), "who had it disabled has it so"
    finally:
        gc.enable()
