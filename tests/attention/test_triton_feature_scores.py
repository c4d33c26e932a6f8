"""Scores of blocks that are known by one feature, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.attention.test_triton_decode import made, on
from tests.attention.test_triton_decode_votes import speeds, turn
from tests.closeness import assert_close

from foveate.attention import turned
from foveate.attention.angles import Angles
from foveate.errors import BadArgument
from foveate.methods.policies.features import Limits, best_features

pytest.importorskip("triton")

from foveate.attention.triton.feature_scores import feature_scores

CASES = [
    (torch.float32, 64, 32, False, 1, None, True),
    (torch.bfloat16, 80, 40, False, 3, 3.0, False),
    (torch.float16, 128, 64, False, 2, None, False),
    (torch.float32, 48, 12, False, 3, 3.0, True),  # a part of the channels is rotated
    (torch.bfloat16, 48, 8, True, 6, None, True),  # and here they are the last ones
]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Angles of 700 positions are float32: off by some 2e-5, which float32 shows."""


def given(dtype: torch.dtype, dim: int, share: int, blocks: int) -> tuple[torch.Tensor, ...]:
    """Queries, features that are NaN from `high` on, where the queries stand, the limits."""
    q, features = made(dtype, 2, 6, 1, dim), torch.randn(2, 6 // share, blocks, dim)
    own, high = torch.tensor([700, 31]), torch.tensor([blocks - 2, 5])
    hidden = torch.arange(blocks) >= high[:, None]
    return q, features.masked_fill(hidden[:, None, :, None], torch.nan), own, high, high - 2


@pytest.mark.parametrize(("dtype", "dim", "pairs", "last", "share", "softcap", "forced"), CASES)
def test_against_the_definition(seed: int, dtype, dim, pairs, last, share, softcap, forced) -> None:
    torch.manual_seed(seed)
    q, features, own, high, sure = given(dtype, dim, share, 70)
    x = turn(q, (40 - own).double().view(2, 1, 1, 1) * speeds(pairs).double(), last)
    want = x @ features.double().nan_to_num(0.0).repeat_interleave(share, 1).mT * 0.3
    want = want if softcap is None else softcap * (want / softcap).tanh()
    number, hidden = torch.arange(70), (torch.arange(70) >= high[:, None])[:, None, None]
    if forced:
        want = torch.where((number == 0) | (number >= sure[:, None])[:, None, None], torch.inf, want)
    want = want.masked_fill(hidden, -torch.inf)
    q, features, own, high, sure = on(q, features, own, high, sure)
    angles = Angles(speeds(pairs), last)
    got = feature_scores(q, features, own, high, sure if forced else None, angles, place=40, scale=0.3, softcap=softcap)
    assert_close(got.cpu(), want, LIMIT[dtype])


@pytest.mark.parametrize("forced", [False, True])
def test_blocks_are_those_that_are_chosen_without_it(seed: int, forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    q, features, own, high, sure = given(torch.float32, 32, 3, 40)
    features = features.nan_to_num(0.0)  # matrix products touch what is hidden
    q, features, own, high, sure = on(q, features, own, high, sure)
    limits = Limits(own[:, None], high[:, None], sure[:, None] if forced else None)
    angles = Angles(speeds(16).to(q.device))
    ctx: Any = SimpleNamespace(rope=SimpleNamespace(move=angles.move, angles=lambda: angles))
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(turned, "serves", lambda q, angles, kernel=kernel: kernel)
        found.append(best_features(q, features, limits, 9, ctx, place=10, scale=0.5, scored=True))
    (lists, scores), (want, worth) = found[1], found[0]
    assert torch.equal(lists, want)
    assert scores is not None and worth is not None
    assert_close(scores.cpu(), worth.cpu(), 2e-6)


def test_what_does_not_fit_is_named() -> None:
    q, features, at = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 3, 16), torch.zeros(1, dtype=torch.int64)
    angles = Angles(speeds(8))
    with pytest.raises(BadArgument, match="one query per row"):
        feature_scores(q.expand(-1, -1, 2, -1), features, at, at, None, angles, place=0)
    with pytest.raises(BadArgument, match="float32 with adjacent"):
        feature_scores(q, features.half(), at, at, None, angles, place=0)
    with pytest.raises(BadArgument, match=r"int64 \[1\]"):
        feature_scores(q, features, at, at[:, None], None, angles, place=0)
