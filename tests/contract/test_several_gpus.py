"""Models on another GPU than the current one, and on two at once, read as one on the first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from tests.closeness import assert_close
from tests.contract.runs import tokens
from tests.contract.subjects import CASES, applied, where_it_fits
from torch import Tensor

from foveate.models.tiny import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine"),
]
CLOSE = 1e-3
"""Relative RMS of float32 on GPUs, whose kernels add up in another order where a step is recorded."""


def steps(net: Any, case: Any, ids: Tensor, new: Tensor) -> tuple[Tensor, bool]:
    """Logits [n, V] of a prompt's end and of new tokens one at a time, and whether the last were recorded."""
    out = []
    with torch.no_grad(), applied(net, case) as handle:
        cache = handle.cache()
        cache.expect(ids.shape[1])
        cache.waiting = 2
        for x in (ids, *new.split(1, dim=1)):
            out.append(net(input_ids=x, past_key_values=cache, use_cache=True).logits[0, -1].cpu())
    return torch.stack(out), cache.step is not None


def assert_near(got: Tensor, want: Tensor, case: Any) -> None:
    if not {"format", "keep", "decode"} & case.method().fills:
        assert_close(got, want, CLOSE)
    else:  # a number that is rounded another way may choose another token now and then
        near = (got - want).norm(dim=-1) <= 1e-2 * want.norm(dim=-1)
        assert near.double().mean() > 0.9


@pytest.mark.parametrize("name", list(CASES))
@where_it_fits
def test_any_gpu(name: str, seed: int) -> None:
    net, case = tiny("llama", heads=4, kv_heads=2, seed=seed % 100), CASES[name]
    ids, new = tokens(seed, 1, 90), tokens(seed + 1, 1, 40)
    assert torch.cuda.current_device() == 0
    want, recorded = steps(copy.deepcopy(net).to("cuda:0"), case, ids.to("cuda:0"), new.to("cuda:0"))
    got, again = steps(copy.deepcopy(net).to("cuda:1"), case, ids.to("cuda:1"), new.to("cuda:1"))
    assert again == recorded
    assert torch.cuda.current_device() == 0
    assert_near(got, want, case)


@pytest.mark.parametrize("name", list(CASES))
@where_it_fits
def test_layers_on_two_gpus(name: str, seed: int) -> None:
    net, case = tiny("llama", layers=4, heads=4, kv_heads=2, seed=seed % 100), CASES[name]
    ids, new = tokens(seed, 1, 90).to("cuda:0"), tokens(seed + 1, 1, 40).to("cuda:0")
    want, _ = steps(copy.deepcopy(net).to("cuda:0"), case, ids, new)
    layers = {f"model.layers.{i}": i // 2 for i in range(4)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    got, recorded = steps(dispatch_model(net, {**layers, **ends}), case, ids, new)
    assert not recorded
    assert_near(got, want, case)
