"""Decode kernels against the reference in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from tests.attention.reads import random_lists
from tests.closeness import LIMIT, assert_close
from torch import Tensor

from foveate.attention import ALL, Geometry, Partial, Selection, Span, merge, reference
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.decode import Stores, decode_ragged
from foveate.attention.triton.decode_lists import decode_lists

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERY = DEVICE.type == "cuda"
"""The interpreter is slow: there a part of the combinations must do."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (576, 512), (24, 40)]


def bound(dtype: torch.dtype) -> float:
    """Weights of the values are rounded to the dtype of the values, and tf32 in three parts is not quite float32."""
    return max(LIMIT[dtype], 1e-5 if DEVICE.type == "cuda" else 0.0)


def made(dtype: torch.dtype, *shape: int, factor: float = 1.0) -> Tensor:
    return (factor * torch.randn(shape)).to(dtype)


def spoiled(x: Tensor, lengths: Tensor) -> Tensor:
    """x [P, C, D] with NaN in the slots behind the lengths: whoever reads them is found out."""
    behind = torch.arange(x.shape[1]) >= lengths[:, None]
    return x.masked_fill(behind.unsqueeze(-1), torch.nan)


def truth(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, selection: Selection = ALL, **options: float | None
) -> Partial:
    """The reference over stores [P, C, D] of which pair p holds lengths[p]."""
    batch, _, queries, _ = q.shape
    k, v = (x.double().view(batch, -1, *x.shape[1:]) for x in (k, v))
    grid = lengths.view(batch, -1)
    where = Geometry(batch, queries, k.shape[2], grid, grid - queries)
    return reference(q.double(), k, v, selection, where, **options)  # type: ignore[arg-type]


def check(got: tuple[Tensor, Tensor], want: Partial, dtype: torch.dtype) -> None:
    out, lse = got
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out.cpu(), want.out, bound(dtype))
    assert_close(lse.cpu(), want.lse, min(bound(dtype), 1e-3))


def on(*tensors: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("dtype", "group"), list(zip(DTYPES, [1, 3, 8], strict=True)))
@pytest.mark.parametrize(
    "lengths", [[0, 1, 131, 17], [131, 131, 131, 131], [0, 0, 0, 0], [2, 128, 0, 64], [131, 0, 0, 0]]
)
def test_pairs_of_different_lengths(seed: int, lengths: list[int], group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    held = torch.tensor(lengths, dtype=torch.int32)
    q, k, v = made(dtype, 2, 2 * group, 1, 32, factor=2), made(dtype, 4, 131, 32), made(dtype, 4, 131, 32)
    want = truth(q, k, v, held)
    q, k, v, held = on(q, spoiled(k, held), spoiled(v, held), held)
    check(decode_ragged(q, Stores(k, v, held)), want, dtype)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, dtype) for i, size in enumerate(SIZES) for dtype in DTYPES if EVERY or dtype is DTYPES[i % 3]],
)
def test_head_sizes(seed: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([70, 33], dtype=torch.int32)
    q, k, v = made(dtype, 1, 6, 1, size[0], factor=2), made(dtype, 2, 75, size[0]), made(dtype, 2, 75, size[1])
    want = truth(q, k, v, held, scale=0.1, softcap=7.0)
    q, k, v, held = on(q, spoiled(k, held), spoiled(v, held), held)
    check(decode_ragged(q, Stores(k, v, held), 0.1, 7.0), want, dtype)


@pytest.mark.parametrize("queries", [2, 5])
def test_several_queries_see_what_came_before_them(seed: int, queries: int) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([queries, queries + 1, 140, 129], dtype=torch.int32)
    q, k, v = made(torch.float32, 2, 6, queries, 32), made(torch.float32, 4, 140, 32), made(torch.float32, 4, 140, 32)
    want = truth(q, k, v, held)
    q, k, v, held = on(q, spoiled(k, held), spoiled(v, held), held)
    check(decode_ragged(q, Stores(k, v, held)), want, torch.float32)


def test_several_bands_in_one_launch(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.tensor([150, 20, 9, 16], dtype=torch.int32)
    pairs = [torch.tensor([1, 2]), torch.tensor([0, 3])]
    q = made(torch.float16, 2, 4, 1, 80)
    bands: list[tuple[Tensor, Tensor, Tensor]] = []
    whole_k, whole_v = torch.zeros(4, 150, 80), torch.zeros(4, 150, 80)
    for numbers, held, capacity in zip(pairs, lengths.split(2), (150, 24), strict=True):
        k, v = made(torch.float16, 2, capacity, 80), made(torch.float16, 2, capacity, 80)
        whole_k[numbers, :capacity], whole_v[numbers, :capacity] = k.float(), v.float()
        bands.append((*on(spoiled(k, held), spoiled(v, held), numbers),))  # type: ignore[arg-type]
    by_pair = torch.empty(4, dtype=torch.int32)
    by_pair[torch.cat(pairs)] = lengths
    want = truth(q, whole_k, whole_v, by_pair)
    stores = Stores.of(bands, on(lengths)[0])
    check(decode_ragged(on(q)[0], stores), want, torch.float16)


def test_values_that_are_a_view_of_the_keys(seed: int) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([65, 90], dtype=torch.int32)
    q, k = made(torch.bfloat16, 2, 20, 1, 96), made(torch.bfloat16, 2, 90, 96)
    want = truth(q, k, k[..., :64], held)
    q, k, held = on(q, spoiled(k, held), held)
    check(decode_ragged(q, Stores(k, k[..., :64], held)), want, torch.bfloat16)


def test_sinks_take_mass_without_a_value(seed: int) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([0, 40], dtype=torch.int32)
    q, k, v = made(torch.float32, 1, 4, 1, 64), made(torch.float32, 2, 40, 64), made(torch.float32, 2, 40, 64)
    sinks = torch.randn(4)
    plain = truth(q, k, v, held)
    want = merge([plain, Partial(torch.zeros_like(plain.out), sinks.double().view(1, 4, 1))])
    q, k, v, held, sinks = on(q, k, v, held, sinks)
    check(decode_ragged(q, Stores(k, v, held), sinks=sinks), want, torch.float32)


def test_ragged_refusals() -> None:
    q, k, held = torch.zeros(1, 4, 1, 64), torch.zeros(2, 40, 64), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(BadArgument, match="int32"):
        decode_ragged(q, Stores(k, k, held.long()))
    with pytest.raises(BadArgument, match="like the keys"):
        decode_ragged(q[..., :32], Stores(k, k, held))
    with pytest.raises(BadArgument, match="multiple"):
        decode_ragged(q[:, :3], Stores(k, k, held))


LISTED = list(itertools.product(["layer", "store", "query"], [None, (4, 30)], [1, 16, 32, 64], DTYPES))


@pytest.mark.parametrize(("listed", "near", "page", "dtype"), LISTED if EVERY else LISTED[::7])
def test_lists(seed: int, listed: str, near: tuple[int, int] | None, page: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    batch, stores, group, capacity = 2, 2, 3, 150
    heads = {"layer": 1, "store": stores, "query": stores * group}[listed]
    held = torch.tensor([150, 77, 1, 120], dtype=torch.int32)
    lists = random_lists(rng, (batch, heads, 1), -(-capacity // page), 40 if page == 1 else 4)
    q = made(dtype, batch, stores * group, 1, 64, factor=2)
    k, v = made(dtype, batch * stores, capacity, 64), made(dtype, batch * stores, capacity, 64)
    if near is None:
        want = truth(q, k, v, held, Selection(lists, k_block=page))
    else:
        # A span is relative to the position of the query, which is the last of each pair: written as lists of slots.
        want = truth(q, k, v, held, _with_near(lists, page, near, held.view(batch, stores), group, capacity))
    lists, held = lists[:, :, 0], held.view(batch, stores)
    counts = (lists >= 0).sum(-1, dtype=torch.int32)
    wasted = lists.masked_fill(lists < 0, 10**6)  # behind the counts anything may stand
    k, v = (spoiled(x, held.flatten()) for x in (k, v))
    q, k, v, wasted, counts, held = on(q, k, v, wasted, counts, held)
    check(decode_lists(q, k, v, wasted, counts, held, page=page, near=near), want, dtype)


def test_one_list_serves_all_pairs_as_it_lies(seed: int) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([90, 90, 90], dtype=torch.int32)
    one = random_lists(random.Random(seed), (1, 1, 1), 12, 5)[:, :, 0]
    lists, counts = one.expand(3, 1, -1), (one >= 0).sum(-1, dtype=torch.int32).expand(3, 1)
    q, k, v = made(torch.float32, 3, 2, 1, 32), made(torch.float32, 3, 96, 32), made(torch.float32, 3, 96, 32)
    want = truth(q, k, v, held, Selection(lists.unsqueeze(2), k_block=8))
    q, k, v, held, one, many = on(q, k, v, held, one, counts[:1])
    got = decode_lists(q, k, v, one.expand(3, 1, -1), many.expand(3, 1), held.view(3, 1), page=8)
    check(got, want, torch.float32)


def _with_near(
    lists: Tensor, page: int, near: tuple[int, int], lengths: Tensor, group: int, capacity: int
) -> Selection:
    """Lists and both ends of what is held, as lists of single slots per query head."""
    batch, heads = lengths.shape[0], lengths.shape[1] * group
    slots = torch.full((batch, heads, 1, capacity), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            own = lists[b, h * lists.shape[1] // heads, 0].tolist()
            length = int(lengths[b, h // group])
            seen = {p * page + i for p in own if p >= 0 for i in range(page)}
            seen |= set(range(near[0])) | set(range(max(0, length - near[1]), length))
            chosen = sorted(s for s in seen if s < length)
            slots[b, h, 0, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return Selection(slots)


@pytest.mark.parametrize("size", [(80, 80), (192, 128), (96, 96)])
def test_lists_of_other_head_sizes(seed: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([[90, 40]], dtype=torch.int32)
    lists = random_lists(random.Random(seed), (1, 2, 1), 6, 4)
    q = made(torch.float32, 1, 16, 1, size[0])
    k, v = made(torch.float32, 2, 96, size[0]), made(torch.float32, 2, 96, size[1])
    want = truth(q, k, v, held.flatten(), Selection(lists, k_block=16), softcap=3.0)
    counts = (lists[:, :, 0] >= 0).sum(-1, dtype=torch.int32)
    q, k, v, lists, counts, held = on(q, k, v, lists[:, :, 0], counts, held)
    got = decode_lists(q, k, v, lists, counts, held, page=16, softcap=3.0)
    check(got, want, torch.float32)


def test_a_whole_span_reads_everything(seed: int) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([[50, 0]], dtype=torch.int32)
    q, k, v = made(torch.float32, 1, 2, 1, 64), made(torch.float32, 2, 50, 64), made(torch.float32, 2, 50, 64)
    lists = torch.tensor([[[3, 7]]], dtype=torch.int32)
    want = truth(q, k, v, held.flatten(), Selection(span=Span()))
    counts = torch.tensor([[2]], dtype=torch.int32)
    q, k, v, lists, counts, held = on(q, k, v, lists, counts, held)
    check(decode_lists(q, k, v, lists, counts, held, near=(20, 100)), want, torch.float32)


def test_list_refusals() -> None:
    q, k, held = torch.zeros(1, 4, 1, 64), torch.zeros(2, 40, 64), torch.zeros(1, 2, dtype=torch.int32)
    lists, counts = torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(BadArgument, match="power of two"):
        decode_lists(q, k, k, lists, counts, held, page=5)
    with pytest.raises(BadArgument, match="counts"):
        decode_lists(q, k, k, lists, counts[:, :1], held)
    with pytest.raises(BadArgument, match="lists"):
        decode_lists(q, k, k, lists[:, [0, 1, 1]], counts, held)


def test_compile_sees_one_operation_each() -> None:
    """Under fake tensors the shapes and dtypes are right and no kernel runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 4, 1, 64, dtype=torch.bfloat16), torch.empty(4, 40, 64, dtype=torch.bfloat16)
        held, lists = torch.empty(4, dtype=torch.int32), torch.empty(2, 2, 5, dtype=torch.int32)
        for out, lse in (
            decode_ragged(q, Stores(k, k[..., :32], held)),
            decode_lists(q, k, k[..., :32], lists, held.view(2, 2), held.view(2, 2)),
        ):
            assert (out.shape, out.dtype) == ((2, 4, 1, 32), torch.bfloat16)
            assert (lse.shape, lse.dtype) == ((2, 4, 1), torch.float32)
