"""What methods remember from one token to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, dict[str, Tensor]]
"""Tensors with rows first, by method id and name."""


def state_tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a state with their dotted names."""
    for owner, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                yield f"{owner}.{name}", value


def select_rows(state: State, rows: np.ndarray) -> State:
    index = torch.from_numpy(rows)
    return {
        owner: {name: value.index_select(0, index.to(value.device)) for name, value in values.items()}
        for owner, values in state.items()
    }


def clone_state(state: State) -> State:
    return {owner: {name: value.clone() for name, value in values.items()} for owner, values in state.items()}


def brought(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device: one of them, or a tuple, list or dict of such values."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: brought(x, device) for name, x in value.items()}
    if isinstance(value, list | tuple):
        moved = [brought(x, device) for x in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
