"""Decode over a full window and the first tokens in front of it, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import DTYPES, check, made, on

from foveate.attention import Partial, merge
from foveate.attention.angles import Angles
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.decode_window import decode_window


@pytest.mark.parametrize(
    ("dtype", "group", "dim", "pairs", "last", "slots", "sink"),
    [
        (DTYPES[0], 1, 48, 24, False, 300, 4),
        (DTYPES[1], 3, 128, 64, False, 133, 1),
        (DTYPES[2], 8, 80, 16, False, 40, 7),
        (DTYPES[1], 20, 144, 8, True, 70, 16),
        (DTYPES[0], 3, 32, 16, False, 9, 9),
        (DTYPES[0], 3, 32, 16, True, 129, 0),
    ],
)
def test_the_first_tokens_are_met_from_elsewhere(
    seed: int, dtype: torch.dtype, group: int, dim: int, pairs: int, last: bool, slots: int, sink: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = made(dtype, 2, 2 * group, 1, dim, factor=2), made(dtype, 4, slots, dim), made(dtype, 4, slots, 24)
    speeds = 100 ** -(torch.arange(pairs) / pairs)
    now, place = torch.tensor([130000, 77]), torch.tensor([sink + slots, 5])
    moved = Angles(speeds, last).move(q, (place - now).unsqueeze(1))
    parts = []
    for x, some in ((q, slice(sink, None)), (moved, slice(sink))):
        keys, values = (y[:, some].double().view(2, 2, -1, y.shape[2]).repeat_interleave(group, 1) for y in (k, v))
        s = (x.double() @ keys.transpose(-1, -2) * 0.2 / 5).tanh() * 5
        parts.append(Partial((s.softmax(-1) @ values), s.logsumexp(-1)))
    want = merge(parts)
    q, k, v, place, seen, speeds = on(q, k, v, place, (now + 1).repeat_interleave(2), speeds)
    got = decode_window(q, k, v, sink, place, seen, speeds, last=last, scale=0.2, softcap=5.0)
    check(got, want, dtype)


def test_refusals() -> None:
    q, k, place, speeds = torch.zeros(1, 4, 1, 64), torch.zeros(2, 40, 64), torch.zeros(1).long(), torch.ones(32)
    seen = torch.zeros(2).long()
    with pytest.raises(BadArgument, match="sink"):
        decode_window(q, k, k, 41, place, seen, speeds, scale=0.1)
    with pytest.raises(BadArgument, match="frequencies"):
        decode_window(q, k, k, 4, place, seen, torch.ones(33), scale=0.1)
    with pytest.raises(BadArgument, match="int64"):
        decode_window(q, k, k, 4, place.int(), seen, speeds, scale=0.1)
