"""How many numbers are held at a time of what is only made to be used up: scores, masks, gathered keys."""

from __future__ import annotations

from functools import cache

import torch

_LEAST = 1 << 24
"""Where memory is read from a processor, larger pieces fall out of its caches and gain nothing."""
_SHARE = 512
"""Bytes of a GPU for each number: 2^27 of them on 80 GB, as few as on a processor on 8 GB. Each piece costs launches,
which at 128K tokens and small pieces take longer than the work."""


@cache
def at_once(device: torch.device) -> int:
    """Numbers of four bytes that may be alive at a time on this device."""
    if device.type != "cuda":
        return _LEAST
    return max(_LEAST, torch.cuda.get_device_properties(device).total_memory // _SHARE)
