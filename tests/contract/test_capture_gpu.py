"""Decode steps that a GPU replays from a graph are those made in the ordinary way."""

from __future__ import annotations

import gc

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import tokens
from tests.contract.subjects import CASES, applied, where_it_fits
from torch import Tensor, nn

from foveate.engine.apply import Handle
from foveate.engine.captured import record
from foveate.models.tiny import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
NEVER = 1 << 30


def steps(net: nn.Module, handle: Handle, ids: Tensor, new: Tensor, waiting: int) -> tuple[Tensor, str | None]:
    """Logits [n, V] of given new tokens, and why the last steps were not replayed; None if they were."""
    cache = handle.cache()
    cache.expect(ids.shape[1])
    cache.waiting = waiting
    out = []
    with torch.no_grad():
        net(input_ids=ids, past_key_values=cache, use_cache=True)
        for i in range(new.shape[1]):
            got = net(input_ids=new[:, i : i + 1], past_key_values=cache, use_cache=True)
            out.append(got.logits[0, -1].cpu())
    return torch.stack(out), None if cache.step is not None else cache.unrecorded or handle.binding.ungraphed


@pytest.mark.parametrize("name", [case.id for case in CASES.values()])
@where_it_fits
def test_replayed_steps_are_ordinary_steps(name: str, seed: int) -> None:
    net, case = tiny("llama", heads=4, kv_heads=2, seed=seed % 100).cuda(), CASES[name]
    ids, new = tokens(seed, 1, 90).cuda(), tokens(seed + 1, 1, 60).cuda()
    with applied(net, case) as handle:
        want, _ = steps(net, handle, ids, new, NEVER)
        got, why = steps(net, handle, ids, new, 2)
    assert (why is None) == handle.binding.graph, why
    if not {"format", "keep", "decode"} & case.method().fills:
        assert_close(got, want, 1e-3)
    else:  # a number that is rounded another way may choose another token now and then
        near = (got - want).norm(dim=-1) <= 1e-2 * want.norm(dim=-1)
        assert near.double().mean() > 0.9


def test_an_older_graph_may_become_garbage_while_another_is_recorded() -> None:
    x = torch.ones(8, device="cuda")
    held = [torch.cuda.CUDAGraph()]
    with torch.cuda.graph(held[0]):
        x * 2
    held.append(held)  # only the collector can free it
    kept, before = [held], gc.get_threshold()
    del held

    def step(rehearsing: bool = False) -> Tensor:
        if not rehearsing:
            kept.clear()
            [[] for _ in range(5000)]
        return x + 1

    gc.set_threshold(10)
    try:
        replay = record(step, [], x.device)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert torch.equal(replay(), x + 1)
