"""Recorded decode steps on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tests.contract.tape import record
from torch import Tensor, nn

from foveate.attention import decoding
from foveate.cache.fixed_column import FixedPacked
from foveate.engine import captured
from foveate.engine.apply import Handle
from foveate.engine.captured import Forward


@contextmanager
def recording(net: nn.Module, handle: Handle, by: Callable[..., Any] = record) -> Iterator[None]:
    net.__dict__["forward"] = Forward(handle, net.forward)
    try:
        with patch.object(captured, "record", by):
            yield
    finally:
        del net.__dict__["forward"]


def steps(net: nn.Module, handle: Handle, ids: Tensor, mask: Tensor | None, new: Tensor) -> tuple[Any, Tensor]:
    """Logits [B, n, V] of the given new tokens, one at a time, and the cache."""
    cache = handle.cache()
    cache.expect(ids.shape[1])
    out = []
    with torch.no_grad():
        start = torch.full((ids.shape[0], 1), ids.shape[1]) if mask is None else mask.sum(1, keepdim=True)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
        net(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        for i in range(new.shape[1]):
            got = net(input_ids=new[:, i : i + 1], position_ids=start + i, past_key_values=cache, use_cache=True)
            out.append(got.logits[:, -1])
    return cache, torch.stack(out, dim=1)


def steps_in_place(net: nn.Module, handle: Handle, ids: Tensor, mask: Tensor | None, new: Tensor) -> tuple[Any, Tensor]:
    """`steps`, recorded as on a GPU but in Triton's interpreter; one that unpacks what a column holds fails."""
    serve = patch.object(decoding, "serves", lambda q, forced=False: (True, ""))
    with serve, recording(net, handle, by=captured.record), patch.object(FixedPacked, "read", None):
        return steps(net, handle, ids, mask, new)
