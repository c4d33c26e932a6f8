"""What recorded steps do to a store by kernels is what they do to it otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.closeness import LIMIT, assert_close
from torch import Tensor

from foveate.attention import decoding
from foveate.cache.fixed_column import FixedColumn
from foveate.cache.fixed_store import FixedStore, FixedView
from foveate.cache.state import Blocks, Tag
from foveate.cache.store import Store, StoreSpec
from foveate.engine.seal import least
from foveate.methods.h2o import H2O

TAGS = {"columns": Tag(), "pair": Tag(width=2, fill=0.5), "whole": Tag(dtype=torch.int32, fill=7)}


def mean(k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return (k * valid.unsqueeze(-1)).sum(2) / valid.sum(2, keepdim=True).clamp_min(1)


@pytest.mark.parametrize("more", [{}, {"short": Tag(dtype=torch.int16, fill=-1)}])
@pytest.mark.parametrize("blocks", [{}, {"mean": Blocks(4, mean)}])
def test_tokens_come_and_go_with_all_that_is_theirs(
    seed: int, more: dict[str, Tag], blocks: dict[str, Blocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    torch.manual_seed(seed)
    one = Store(StoreSpec(2, tags=TAGS | more, blocks=blocks))
    one.append(torch.randn(2, 2, 19, 16), torch.randn(2, 2, 19, 24), np.array([19, 16]))
    one.keep({0: np.arange(4, 19), 1: np.arange(4, 19), 2: np.arange(1, 16), 3: np.arange(0, 15)}, one.seen)
    for tag in one.bands[0].tags.values():
        tag.data.copy_(torch.randn(tag.data.shape).mul(9))
    other, keeper, recent = one.fork(), H2O(), torch.tensor([4, 2])
    assert keeper.protect.sink == 0
    stores = FixedStore(other, 8, evicting=True), FixedStore(one, 8, evicting=True)
    k, v, score = torch.randn(3, 2, 2, 1, 16), torch.randn(3, 2, 2, 1, 24), torch.randn(3, 2, 2, 99)
    for kernels, store in enumerate(stores):
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False, here=bool(kernels): (here, ""))
        for step in range(3):
            store.append(k[step], v[step])
            view = FixedView(store)
            scores = score[step, :, :, : view.capacity]
            assert store.evict(scores, 0, recent, newest=False) == bool(kernels)
            if not kernels:
                store.drop(least(keeper, scores, view, recent))
    (want,), (got,) = (store.bands for store in stores)
    assert torch.equal(got.lengths, want.lengths) and torch.equal(got.seen, want.seen)
    held = torch.arange(got.used) < got.lengths[:, None]
    for x, y in zip(got._columns(), want._columns(), strict=True):
        assert isinstance(x, FixedColumn) and isinstance(y, FixedColumn)
        assert torch.equal(x.data[:, : got.used][held], y.data[:, : got.used][held])
    full = -(-int(got.lengths.max()) // 4)
    for name in blocks:
        assert_close(got.summaries[name][:, :full], want.summaries[name][:, :full], LIMIT[torch.float32])
