"""Correcting a cache: tokens that were decoded sparsely are taken back and given once more, all together and dense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.engine.rows import Rows
from foveate.errors import Refused

if TYPE_CHECKING:
    from foveate.engine.call import Call

GIVEN, PLACES = "given", "places"


def keep_correct(module: nn.Module, call: Call, name: str, given: Tensor, kwargs: dict[str, Any]) -> None:
    """Before a forward: correct the cache if enough tokens wait for it, and remember those that this forward decodes.

    Tokens wait until they are as many as the methods say, and no longer than to the next prompt: it is to read what is
    right. Those of a piece with padding are not taken back, since a crop cannot go behind padding. What leaves windows
    leaves at corrections, so up to twice as many tokens more are held.

    Args:
        module: the decoder, about to run.
        call: what this forward is.
        name, given: `input_ids` [B, N], or `inputs_embeds` [B, N, hidden].
        kwargs: the forward's other arguments.
    """
    cache = call.cache
    assert cache is not None
    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    columns = cache.get_seq_length()
    for kind, waiting in cache.uncorrected.items():
        if kind != name or call.phase == "prompt" or waiting[GIVEN].shape[1] >= call.binding.corrects:
            _correct(module, call, kind, waiting, None if mask is None else mask[:, :columns])
    count = call.queries if call.phase == "decode" else call.pieces[-1].queries if call.pieces else 0
    if not count or not Rows.of(mask, len(given), call.queries).whole:
        cache.uncorrected = {}
        return
    for layer in cache.couriers():
        layer.activate_past_recording()  # what is to be taken back must not push older tokens out of a window
    places = kwargs.get("position_ids")
    if places is None:
        places = torch.arange(columns, columns + call.queries, device=given.device).unsqueeze(0)
    elif places.ndim != 2:
        raise Refused(f"{call.binding.id} corrects what it decoded, which needs one position per token, not several")
    new = {GIVEN: given[:, -count:].detach(), PLACES: places[:, -count:].expand(len(given), -1)}
    waiting = cache.uncorrected.get(name)
    # Copies: a view would keep the caller's tensor alive, and change with it.
    cache.uncorrected = {
        name: {key: torch.cat([waiting[key], x], 1) if waiting else x.clone() for key, x in new.items()}
    }


@torch.no_grad()
def _correct(module: nn.Module, call: Call, kind: str, waiting: dict[str, Tensor], mask: Tensor | None) -> None:
    """Take back what waits and decode it in one dense piece."""
    cache, count = call.cache, waiting[GIVEN].shape[1]
    assert cache is not None
    cache.crop(-count)
    if mask is not None:
        mask = mask.clone()
        mask[:, -count:] = 1  # single tokens are real whatever a mask says
    module(
        **{kind: waiting[GIVEN], compat.KEYWORD: call.correction(count)},
        position_ids=waiting[PLACES],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    )
