"""What a model costs when it answers: time and bytes of decoding."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORT = 32  # tokens of the prompt before the one that is timed
_WARM = 2  # first steps, not timed


@torch.no_grad()
def decoding(model: PreTrainedModel, ids: Tensor, steps: int = 16) -> dict[str, Any]:
    """Seconds of reading a prompt and of one token behind it, with transformers' own cache, and the bytes it holds.

    Args:
        ids: [1, N] token ids.
        steps: tokens that are timed, one by one; their median is told.
    """
    ids = ids.to(model.device)
    model(ids[:, :_SHORT], use_cache=True)  # what is done once is not timed
    begin = _now(model)
    out: Any = model(ids, use_cache=True, logits_to_keep=1)
    prefill = _now(model) - begin
    seconds = []
    for _ in range(_WARM + steps):
        token = out.logits[:, -1:].argmax(-1)
        begin = _now(model)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        seconds.append(_now(model) - begin)
    return {
        "context": ids.shape[1],
        "repeats": steps,
        "prefill_s": prefill,
        "decode_ms": 1e3 * statistics.median(seconds[_WARM:]),
        "cache_bytes": held_bytes(out.past_key_values),
    }


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors in a transformers cache, states of recurrent layers included."""

    def inside(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.nbytes
        if isinstance(value, dict):
            return sum(inside(each) for each in value.values())
        return sum(inside(each) for each in value) if isinstance(value, list | tuple) else 0

    return sum(inside(vars(layer)) for layer in cache.layers)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
