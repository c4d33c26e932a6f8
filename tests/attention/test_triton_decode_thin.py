"""Decode over thinned keys against filling the lost channels up with zeros, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import check, made, on, spoiled, truth

from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.decode_thin import ThinKeys, decode_thin


@pytest.mark.parametrize(
    ("group", "dims", "kept", "dtype", "softcap"),
    [
        (1, (64, 64), 38, torch.float32, None),
        (3, (128, 128), 77, torch.bfloat16, None),
        (4, (128, 64), 76, torch.bfloat16, 5.0),
        (8, (80, 96), 1, torch.float16, None),
        (20, (32, 32), 31, torch.float32, 3.0),
    ],
)
def test_thin_and_whole_tokens_in_one_pass(
    seed: int, group: int, dims: tuple[int, int], kept: int, dtype: torch.dtype, softcap: float | None
) -> None:
    """Bodies and tails have room behind what they hold, which is NaN; of one body some tokens were taken back."""
    torch.manual_seed(seed)
    lengths, starts = [5, 199, 64, 0, 131, 30], [0, 130, 64, 0, 128, 50]
    q, k, v = made(dtype, 6, group, 1, dims[0], factor=2), made(dtype, 6, 200, dims[0]), made(dtype, 6, 200, dims[1])
    channels = torch.stack([torch.randperm(dims[0])[:kept].sort().values for _ in range(6)])
    body, tail = k.new_full((6, 141, kept), torch.nan), k.new_full((6, 73, dims[0]), torch.nan)
    held = k.clone()
    for p, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        thin = min(start, length)
        body[p, :thin] = k[p, :thin, channels[p]]
        tail[p, : length - thin] = k[p, thin:length]
        held[p, :start] = 0
        held[p, :start, channels[p]] = k[p, :start, channels[p]]
    count = torch.tensor(lengths, dtype=torch.int32)
    want = truth(q, held, v, count, softcap=softcap, scale=dims[0] ** -0.5)
    q, body, channels, tail, v = on(q, body, channels.to(torch.int16), tail, spoiled(v, count))
    keys = ThinKeys(body, channels, tail, *on(torch.tensor(starts, dtype=torch.int32)))
    (count,) = on(count)
    check(decode_thin(q, keys, v, count, softcap=softcap), want, dtype)


def test_what_does_not_fit_is_refused() -> None:
    keys = ThinKeys(torch.zeros(2, 5, 3), torch.zeros(2, 3).short(), torch.zeros(2, 4, 8), torch.zeros(2).int())
    q, v, lengths = torch.zeros(2, 4, 1, 8), torch.zeros(2, 9, 8), torch.zeros(2).int()
    with pytest.raises(BadArgument, match="2 pairs"):
        decode_thin(q[:1], keys, v, lengths)
    with pytest.raises(BadArgument, match="bfloat16"):
        decode_thin(q, keys, v.bfloat16(), lengths)
    with pytest.raises(BadArgument, match="adjacent"):
        decode_thin(q, keys._replace(body=torch.zeros(2, 5, 6)[..., ::2]), v, lengths)
    with pytest.raises(BadArgument, match="int32"):
        decode_thin(q, keys, v, lengths.long())
