"""Queries and keys turned in one launch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on
from tests.attention.test_triton_decode_votes import speeds, turn
from tests.closeness import assert_close

from foveate.attention import decoding
from foveate.attention.angles import Angles
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton import turn as kernel

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Rounding of the result, and of float32 angles of 900 positions."""


@pytest.mark.parametrize(
    ("dtype", "dim", "pairs", "last"),
    [
        (torch.float32, 64, 32, False),
        (torch.bfloat16, 80, 40, False),
        (torch.float16, 128, 64, False),
        (torch.float32, 48, 12, False),  # a part of the channels is rotated
        (torch.bfloat16, 48, 8, True),  # and here they are the last ones
    ],
)
@pytest.mark.parametrize("shared", ["nothing", "heads", "rows and heads", "queries"])
def test_against_the_definition(seed: int, dtype, dim: int, pairs: int, last: bool, shared: str, monkeypatch) -> None:
    torch.manual_seed(seed)
    x = made(dtype, 2, 3, 37, dim + 8)[..., 4:-4].transpose(1, 2).contiguous().transpose(1, 2)  # heads side by side
    shape = {"nothing": (2, 3, 37), "heads": (2, 37), "rows and heads": (1, 37), "queries": (2, 3, 1)}[shared]
    delta = torch.randint(-900, 900, shape)
    angle = (delta if delta.dim() == 3 else delta.unsqueeze(1)).unsqueeze(-1).double() * speeds(pairs).double()
    want = turn(x, angle.expand(2, 3, 37, -1), last)
    angles = Angles(speeds(pairs), last)
    got = kernel.turn(*on(x, delta), angles)
    assert got.dtype == dtype and got.is_contiguous()
    assert_close(got.cpu(), want, LIMIT[dtype])
    assert_close(angles.move(x, delta), got.cpu(), LIMIT[dtype])
    monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
    assert torch.equal(angles.move(*on(x, delta)), got)


def test_nothing_to_turn_and_what_does_not_fit() -> None:
    angles = Angles(speeds(8))
    assert kernel.turn(torch.zeros(1, 2, 0, 16), torch.zeros(1, 0), angles).shape == (1, 2, 0, 16)
    with pytest.raises(BadArgument, match="it must fit x"):
        kernel.turn(torch.zeros(1, 2, 3, 16), torch.zeros(1, 4), angles)
    with pytest.raises(BadArgument, match="a frequency for each pair"):
        kernel.turn(torch.zeros(1, 2, 3, 8), torch.zeros(1, 3), angles)
