"""Parts over disjoint keys merge into one softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.attention.reads import tensors
from tests.closeness import LIMIT, assert_close

from foveate.attention import Partial, decoding, merge, reference
from foveate.errors import BadArgument


def split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, owner: torch.Tensor) -> list[Partial]:
    """One part per owner number, each over the keys [M] that are its own (hidden by a bias)."""
    return [
        reference(q, k, v, bias=torch.where(owner == part, 0.0, -torch.inf).view(1, 1, 1, -1).double())
        for part in range(int(owner.max()) + 1)
    ]


@given(
    seed=st.integers(0, 2**31),
    queries=st.sampled_from([1, 7]),
    past=st.integers(0, 40),
    data=st.data(),
    count=st.integers(1, 6),
)
def test_any_partition_in_any_order_is_one_softmax(
    seed: int, queries: int, past: int, data: st.DataObject, count: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(2, 3, 1, queries, queries + past, 8)
    owner = torch.randint(0, count, (queries + past,))
    parts = split(q, k, v, owner)
    order = data.draw(st.permutations(range(len(parts))))
    whole = reference(q, k, v)
    merged = merge([parts[i] for i in order])
    assert_close(merged.out, whole.out, 1e-10)
    assert_close(merged.lse, whole.lse, 1e-10)
    # Merging is associative too: the first two beforehand.
    if len(parts) > 2:
        nested = merge([merge([parts[i] for i in order[:2]]), *(parts[i] for i in order[2:])])
        assert_close(nested.out, whole.out, 1e-10)


def test_a_part_that_saw_nothing_adds_nothing_even_if_it_is_nan(seed: int) -> None:
    torch.manual_seed(seed)
    part = Partial(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5))
    empty = Partial(torch.full((2, 3, 5, 8), torch.nan), torch.full((2, 3, 5), -torch.inf))
    for parts in ([part, empty], [empty, part], [empty, part, empty]):
        merged = merge(parts)
        assert_close(merged.out, part.out, 1e-7)
        assert_close(merged.lse, part.lse, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "queries"), [(2, 1), (3, 1), (4, 1), (5, 1), (2, 37), (3, 37), (4, 37)])
def test_parts_in_one_launch(
    seed: int, count: int, queries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kernel where it serves, which says what is said elsewhere; more parts are merged as ever."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    torch.manual_seed(seed)
    outs, lses = torch.randn(count, 2, 3, queries, 20).to(dtype), 8 * torch.randn(count, 2, 3, queries)
    outs[0, 0, 0], lses[0, 0, 0] = torch.nan, -torch.inf
    outs[:, 1], lses[:, 1] = torch.nan, -torch.inf
    parts = [Partial(out, lse) for out, lse in zip(outs, lses, strict=True)]
    parts[1] = Partial(outs[1].mT.contiguous().mT, lses[1, :, :1].expand(-1, 3, -1))
    want = merge([Partial(part.out.double(), part.lse) for part in parts])
    monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (q.dtype != torch.float64, ""))
    assert decoding.merges(parts) == (count < 5)
    got = merge(parts)
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    assert_close(got.out, want.out, LIMIT[dtype])
    assert torch.equal(got.lse == -torch.inf, want.lse == -torch.inf)
    assert_close(got.lse.clamp_min(-99), want.lse.clamp_min(-99), 1e-6)


def test_nothing_seen_by_any_part_is_zero(seed: int) -> None:
    empty = Partial(torch.full((1, 2, 3, 4), torch.nan), torch.full((1, 2, 3), -torch.inf))
    for parts in ([empty], [empty, empty]):
        merged = merge(parts)
        assert torch.equal(merged.out, torch.zeros(1, 2, 3, 4))
        assert torch.equal(merged.lse, empty.lse)


def test_far_apart_masses_do_not_overflow() -> None:
    one, two = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 2.0)
    lse = torch.tensor(5000.0).view(1, 1, 1)
    merged = merge([Partial(one, lse), Partial(two, -lse)])
    assert torch.equal(merged.out, one)
    assert torch.equal(merged.lse, lse)


def test_bfloat16_parts_are_added_in_float32(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(1, 2, 1, 64, 300, 16)
    parts = split(q, k, v, torch.arange(300) // 5)
    rounded = [Partial(p.out.bfloat16(), p.lse.float()) for p in parts]
    merged = merge(rounded)
    assert merged.out.dtype == torch.bfloat16
    assert merged.lse.dtype == torch.float32
    # Sixty additions in bfloat16 would lose a digit; in float32 only the roundings of the parts and the result show.
    assert_close(merged.out, reference(q, k, v).out, 3e-3)


def test_bad_parts_are_named() -> None:
    part = Partial(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
    with pytest.raises(BadArgument, match="at least one part"):
        merge([])
    with pytest.raises(BadArgument, match=r"parts\[1\].*parts must agree"):
        merge([part, Partial(torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3))])
    with pytest.raises(BadArgument, match=r"parts\[0\].lse.*lse=True"):
        merge([Partial(part.out, None)])  # type: ignore[arg-type]
