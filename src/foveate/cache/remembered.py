"""What methods remember from one token to the next."""

from __future__ import annotations

from collections.abc import Iterator

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
