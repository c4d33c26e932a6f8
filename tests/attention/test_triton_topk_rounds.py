"""The best of few long rows, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import on

pytest.importorskip("triton")

from foveate.attention.triton import topk, topk_rounds
from foveate.methods.policies.lists import counted_lists


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "limited"), [(1000, 100, False), (777, 300, True), (192, 5, False), (130, 129, True)]
)
def test_lists_are_exact_and_the_first_of_equals_wins(
    seed: int, n: int, k: int, limited: bool, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    monkeypatch.setattr(topk_rounds, "PIECE", 64)
    monkeypatch.setattr(topk_rounds, "_CHUNK", 4)  # pieces are added up in several goes
    scores = torch.randn(6, n)
    scores[0, ::3] = -torch.inf
    scores[1] = torch.randint(0, 3, (n,)).float()  # many are on the edge, in all pieces
    scores[2, 5], scores[2, 100], scores[2, 9] = torch.inf, torch.inf, -3e38
    scores[3] = -torch.inf
    scores[4] = (37.5 * torch.ones(n)).view(torch.int32).add(torch.randint(0, 90, (n,)).int()).view(torch.float32)
    scores[5, ::2], scores[5, 1::4] = 0.0, -0.0
    scores = scores.bfloat16().float() if coarse else scores
    limits = torch.tensor([k, k - 1, 0, 4, k // 2, k + 9], dtype=torch.int32) if limited else None
    want = counted_lists(scores, k, limits)[0]
    scores, *rest = on(scores, *([] if limits is None else [limits]))
    lists, counts = topk_rounds.best_of_long(scores, k, rest[0] if rest else None, coarse=coarse)
    assert torch.equal(lists.cpu(), want)
    assert torch.equal(counts.cpu(), (want >= 0).sum(-1, dtype=torch.int32))


def test_what_is_no_number_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_rounds, "PIECE", 16)
    (scores,) = on(torch.arange(40.0).view(1, 40))
    scores[0, ::2] = torch.nan
    assert topk_rounds.best_of_long(scores, 3, None, coarse=False)[0].tolist() == [[35, 37, 39]]


def test_few_long_rows_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of which a large part is chosen, and all that are coarse; one list for many programs must be short."""
    calls: list[bool] = []
    plain = topk_rounds.best_of_long
    monkeypatch.setattr(topk, "best_of_long", lambda *a, coarse: calls.append(coarse) or plain(*a, coarse=coarse))
    monkeypatch.setattr(topk, "AT_ONCE", 128)
    scores = (torch.arange(2400) % 101).float().view(2, 1200)
    for width, k, coarse in ((90, 40, True), (1200, 40, True), (1200, 1030, False), (1200, 40, False)):
        some = scores[:, :width]
        got = topk.select_best(on(some)[0], k, coarse=coarse)[0].cpu()
        assert torch.equal(got, counted_lists(some, k)[0])
    assert calls == [True, False]
