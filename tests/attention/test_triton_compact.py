"""What is kept of rows, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import on

from foveate.errors import BadArgument
from foveate.methods.policies import lists

pytest.importorskip("triton")

from foveate.attention.triton.compact import compact


@pytest.mark.parametrize(("n", "share"), [(1, 0.5), (70, 0.3), (2100, 0.9), (1024, 0.0), (40, 1.0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_is_kept(seed: int, n: int, share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    kept = torch.rand(2, 3, n) < share
    width = int(kept.sum(-1).max()) + 2
    numbers = torch.randint(0, 1000, (2, 3, n), dtype=dtype)
    marked = numbers.masked_fill(~kept, -1)
    cases = [(None, kept, lists.set_lists(kept, width)), (numbers, kept, lists.close_gaps(numbers, kept, width))]
    for x, bits, want in [*cases, (marked, None, lists.close_gaps(marked, width=width))]:
        x, bits = (None if y is None else on(y)[0] for y in (x, bits))
        got = compact(x, bits, width)
        assert got.dtype == torch.int32
        assert torch.equal(got.cpu(), want)


def test_many_rows_take_the_kernel(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(5, 70) < 0.4
    marked = torch.where(mask, 7, -1)
    want = lists.mask_lists(mask), lists.close_gaps(marked)
    monkeypatch.setattr(lists, "_ROWS", 5)
    monkeypatch.setattr(lists.decoding, "serves", lambda x: (True, ""))
    monkeypatch.setattr(lists, "_running", lambda mask: pytest.fail("counted by steps"))
    mask, marked = on(mask, marked)
    assert torch.equal(lists.mask_lists(mask).cpu(), want[0])
    assert torch.equal(lists.close_gaps(marked).cpu(), want[1])


def test_bad_arguments() -> None:
    with pytest.raises(BadArgument, match="give numbers, what is kept, or both"):
        compact(None, None, 3)
    with pytest.raises(BadArgument, match="give numbers, what is kept, or both"):
        compact(torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), 3)
