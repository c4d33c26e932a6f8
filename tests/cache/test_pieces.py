"""Rows of different lengths take a further piece of different lengths, also where a part of them is packed already."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.evaluate.small import small
from tests.methods.runs import prompt

import foveate
from foveate.evaluate.batch import Batch
from foveate.methods import METHODS
from foveate.models.shape import ModelShape


@pytest.mark.parametrize("first", [(430, 429, 428, 427), (257, 300, 129, 383)])
def test_packed_rows_take_uneven_pieces(first: tuple[int, ...]) -> None:
    model, _ = small()
    model = model.double()  # in float32 a number may be packed to the next code, since rows are read in other company
    shape = ModelShape.of(model)
    rows = [prompt(1, n, seed=n)[0].tolist() for n in first]
    more = [prompt(1, 40 + i, seed=i)[0].tolist() for i in range(4)]
    with foveate.apply(model, METHODS["kivi"](bits=8)) as handle, torch.inference_mode():

        def ends(some: list[int]) -> torch.Tensor:
            batch = Batch(model, handle.cache(), len(some), shape)
            batch.prompt([rows[i] for i in some])
            steps = [batch.prompt([more[i] for i in some])]
            steps += [batch.step([7] * len(some)) for _ in range(3)]
            return torch.stack(steps)

        together = ends([0, 1, 2, 3])
        for i in range(4):
            assert_close(together[:, i : i + 1], ends([i]), 1e-10)
