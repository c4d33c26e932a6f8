"""Numbers that are sent to a device without waiting for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.attention.sent import sent

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU alone are sent without waiting")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.bool_, np.float32])
def test_what_arrives_is_what_was_sent(dtype: type, device: str) -> None:
    numbers = (np.arange(24).reshape(2, 12)[:, ::2] % 5).astype(dtype)
    got = sent(numbers, torch.device(device))
    assert got.device.type == device and got.dtype == torch.from_numpy(numbers).dtype
    np.testing.assert_array_equal(got.cpu().numpy(), numbers)


@on_a_gpu
def test_the_array_may_change_at_once() -> None:
    numbers, busy = np.arange(1 << 20), torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy / 64
    got = sent(numbers, busy.device)
    numbers[:] = -1
    assert torch.equal(got.cpu(), torch.arange(1 << 20))


@on_a_gpu
def test_nothing_is_sent_while_a_graph_is_recorded() -> None:
    """A replay would read memory that holds something else by then."""
    device, graph = torch.device("cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError), torch.cuda.graph(graph):
        sent(np.arange(3), device)
