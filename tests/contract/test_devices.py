"""A model whose layers lie on several devices reads as one that lies on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.reach import reachable_tensors
from tests.contract.recorded import recording, steps
from tests.contract.runs import EXACT, Run, left_padded, run, tokens
from tests.contract.subjects import CASES, Case, applied, each_method, model, precise
from tests.devices import device, several_devices, spread
from torch import Tensor, nn

import foveate
from foveate.engine.binding import Binding
from foveate.methods import METHODS


def check(case: Case, net: nn.Module, seed: int) -> None:
    ids, mask = left_padded([tokens(seed, 20), tokens(seed + 1, 61)])
    then = tokens(seed + 2, 2, 5)
    with applied(net, case) as handle:
        want = run(net, handle.cache(), ids, then, mask)
    with spread(net) as apart, applied(apart, case) as handle:
        cache = handle.cache()
        got = run(apart, cache, ids, then, mask)
        for i, layer in enumerate(cache.layers):
            assert {x.device for x in reachable_tensors(layer.store.bands, (Binding,))} <= {
                device(i),
                torch.device("cpu"),
            }
        assert {band.device for layer in cache.couriers() for band in layer.store.bands} > {device(0)}
        got = Run(*(x.cpu() for x in got))
    assert_close(got.prompt, want.prompt, EXACT)
    assert_close(got.steps, want.steps, EXACT)


@each_method()
def test_each_layer_on_a_device_of_its_own(case: Case, seed: int) -> None:
    check(case, precise(case), seed)


@pytest.mark.parametrize(("name", "family"), [("dense", "gemma3"), ("xkv", "deepseek-v3"), ("snapkv", "deepseek-v3")])
def test_other_attention(name: str, family: str, seed: int) -> None:
    check(CASES[name], precise(CASES[name], family), seed)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("packed", [False, True])
def test_generate(packed: bool, how: dict[str, Any], seed: int) -> None:
    net, ids = model("llama"), tokens(seed, 1, 40)
    method = METHODS["snapkv"](budget=20, window=4) | METHODS["kivi"](group=8, residual=8) if packed else "dense"

    def answer(net: Any) -> Tensor:
        with foveate.apply(net, method):
            return net.generate(ids.to(net.device), max_new_tokens=12, do_sample=False, pad_token_id=0, **how).cpu()

    want = answer(net)
    with spread(net) as apart:
        assert torch.equal(answer(apart), want)


def test_a_step_over_several_devices_is_not_recorded(seed: int) -> None:
    """A graph belongs to one device; the step is made in the ordinary way, and the cache says why."""
    net, ids, then = model("llama"), tokens(seed, 1, 30), tokens(seed + 1, 1, 6)
    with foveate.apply(net, "dense") as handle, recording(net, handle):
        cache, want = steps(net, handle, ids, None, then)
        assert cache.step is not None
    with spread(net) as apart, foveate.apply(apart, "dense") as handle, recording(apart, handle):
        cache, got = steps(apart, handle, ids, None, then)
        assert cache.step is None
        assert "several devices (lazy:0, lazy:1, lazy:2)" in cache.unrecorded
        assert_close(got.cpu(), want, EXACT)


def test_stand_ins_refuse_what_a_gpu_refuses() -> None:
    with several_devices():
        x, y, i = torch.ones(3, device=device(0)), torch.ones(3, device=device(1)), torch.tensor([2, 0])
        for other in (y, torch.ones(3)):
            with pytest.raises(RuntimeError, match="tensors on"):
                x + other
        assert (x + y.to(device(0)) + torch.tensor(1.0)).device == device(0)
        assert x[i].tolist() == [1.0, 1.0]
        x[i] = 5
        assert x.add_(1).tolist() == [6.0, 2.0, 6.0]
        assert (y.device, x.cpu().device.type) == (device(1), "cpu")
