"""Block-sparse kernels against the reference in float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.attention.reads import Read, random_lists, tensors
from tests.closeness import LIMIT, assert_close

from foveate.attention import ALL, Geometry, Partial, Selection, Span, attend, merge, triton_prefill
from foveate.attention.backends import BACKENDS
from foveate.errors import Refused

pytest.importorskip("triton")
knows_gluon = pytest.importorskip("foveate.attention.triton.workers").knows_gluon
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)

FULL = torch.float32
HALF = torch.bfloat16
# Three products of tf32 are not quite float32.
BOUND = {dtype: max(limit, 1e-5 if DEVICE.type == "cuda" else 0.0) for dtype, limit in LIMIT.items()}


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with DEVICE:
        yield


def listed(
    seed: int, shape: tuple[int, int, int, int, int], dims: tuple[int, int], blocks: tuple[int, int], list_heads: int
) -> Read:
    """Queries large enough for attention to be uneven, and lists of any length, empty ones among them."""
    torch.manual_seed(seed)
    batch, _, _, queries, keys = shape
    q, k, v = tensors(*shape, *dims)
    count = -(-keys // blocks[1])
    lists = random_lists(random.Random(seed), (batch, list_heads, -(-queries // blocks[0])), count, min(count, 9))
    return Read(q, k, v, Selection(lists, *blocks))


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel gets for its results holds NaN, so that what it does not write is found."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def filled(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **o: filled(empty(*a, **o)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: filled(new_empty(*a, **o)))


def check(read: Read, dtype: torch.dtype) -> Partial:
    want = read.truth(dtype)
    got = read.attend(dtype, backend="triton")
    assert got.out.dtype == dtype
    assert got.lse.dtype == torch.float32
    assert_close(got.out, want.out, BOUND[dtype])
    assert_close(got.lse, want.lse, min(BOUND[dtype], 1e-3))
    unseen = want.lse == -torch.inf
    assert (got.out[unseen] == 0).all()
    return got


@pytest.mark.parametrize(
    ("shape", "dims", "blocks", "list_heads", "dtype"),
    [
        ((1, 2, 2, 150, 150), (64, 64), (128, 128), 2, FULL),
        ((1, 2, 2, 150, 150), (64, 64), (128, 128), 2, HALF),
        ((2, 3, 1, 100, 150), (80, 80), (64, 64), 3, HALF),
        ((1, 8, 1, 40, 93), (64, 32), (16, 16), 1, FULL),  # heads of a group in one tile
        ((1, 6, 2, 45, 100), (96, 128), (32, 8), 2, FULL),  # groups that fill a tile only in part
        ((1, 2, 1, 140, 140), (24, 8), (128, 32), 2, FULL),
        ((1, 4, 2, 33, 260), (192, 128), (64, 64), 4, HALF),
        ((1, 2, 1, 40, 77), (16, 40), (16, 1), 2, FULL),
        ((1, 1, 1, 300, 300), (32, 32), (256, 128), 1, FULL),
    ],
)
def test_lists(
    seed: int,
    shape: tuple[int, int, int, int, int],
    dims: tuple[int, int],
    blocks: tuple[int, int],
    list_heads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = listed(seed, shape, dims, blocks, list_heads)
    poisoned(monkeypatch)
    check(read, dtype)


@pytest.mark.parametrize(
    ("shape", "blocks", "list_heads", "dtype"),
    [
        ((1, 4, 2, 150, 150), (50, 50), 1, FULL),
        ((2, 4, 1, 70, 133), (17, 7), 4, HALF),
        ((1, 2, 2, 300, 310), (200, 96), 2, FULL),
        ((1, 2, 1, 80, 140), (16, 24), 2, FULL),
    ],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_blocks_of_any_size(
    seed: int, shape: tuple[int, int, int, int, int], blocks: tuple[int, int], list_heads: int, dtype: torch.dtype,
    ragged: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    read = listed(seed, shape, (32, 64), blocks, list_heads)
    if ragged:
        batch, queries, keys = shape[0], *shape[3:]
        lengths = torch.tensor([[keys - 3], [keys - 29]])[:batch]
        read.geometry = Geometry(batch, queries, keys, lengths, lengths - queries, device=DEVICE)
    poisoned(monkeypatch)
    check(read, dtype)


@pytest.mark.parametrize("k_block", [16, 64])
def test_one_list_for_all_queries(seed: int, k_block: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(2, 2, 1, 140, 190, 32)
    lists = random_lists(random.Random(seed), (2, 2, 1), -(-190 // k_block), 3)
    check(Read(q, k, v, Selection(lists, None, k_block)), FULL)


@pytest.mark.parametrize(("k_block", "list_heads"), [(16, 1), (64, 2), (64, 4)])
def test_rows_and_heads_of_their_own_length(seed: int, k_block: int, list_heads: int) -> None:
    """Slots behind a length hold NaN, as memory may that nobody wrote."""
    read = listed(seed, (2, 4, 2, 50, 140), (32, 32), (64, k_block), list_heads)
    lengths = torch.tensor([[140, 97], [61, 133]])
    read.geometry = Geometry(2, 50, 140, lengths, lengths - 50, torch.arange(50).expand(2, -1) + 200, device=DEVICE)
    want = read.truth(FULL)
    k, v = read.k.clone(), read.v.clone()
    for b in range(2):
        for h in range(2):
            k[b, h, lengths[b, h] :] = v[b, h, lengths[b, h] :] = torch.nan
    got = replace(read, k=k, v=v).attend(FULL, backend="triton")
    assert_close(got.out, want.out, BOUND[FULL])
    assert_close(got.lse, want.lse, BOUND[FULL])
    # Rows with fewer new tokens than others: some of their queries stand behind the end or before the beginning.
    first = torch.tensor([[-7], [120]])
    check(replace(read, geometry=Geometry(2, 50, 140, None, first, device=DEVICE)), FULL)


@pytest.mark.parametrize(
    ("span", "k_block", "positions"),
    [
        (Span(5, 40), 16, "slots"),
        (Span(5, 40), 64, "given"),
        (Span(0, 1), 64, "slots"),
        (Span(200, 3), 16, "slots"),
        (Span(4, 20, 10), 16, "given"),
        (Span(33, 0, 30), 64, "slots"),
    ],
)
def test_spans_beside_lists_count_once(seed: int, span: Span, k_block: int, positions: str) -> None:
    read = listed(seed, (2, 2, 1, 70, 140), (32, 32), (64, k_block), 2)
    read.selection = replace(read.selection, span=span)
    if positions == "given":
        start = torch.tensor([[70], [90]])
        read.geometry = Geometry(2, 70, 140, q_positions=start + torch.arange(70), device=DEVICE)
    check(read, FULL)


@pytest.mark.parametrize(
    ("shape", "dims", "span", "dtype"),
    [
        ((1, 2, 1, 200, 270), (32, 32), Span(4, 50), FULL),
        ((1, 3, 1, 300, 333), (64, 64), Span(70, 210), HALF),  # tiles without a mask in the sink and in the window
        ((1, 2, 1, 300, 300), (32, 24), Span(100, 130), FULL),
        ((1, 2, 1, 290, 301), (64, 64), Span(beyond=40), HALF),
        ((1, 2, 2, 150, 400), (24, 32), Span(64, 333, 17), FULL),
        ((1, 8, 1, 130, 290), (32, 32), Span(300, 5), FULL),
    ],
)
def test_a_span_alone(
    seed: int,
    shape: tuple[int, int, int, int, int],
    dims: tuple[int, int],
    span: Span,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(seed)
    poisoned(monkeypatch)
    check(Read(*tensors(*shape, *dims), Selection(span=span)), dtype)


def test_a_span_of_rows_that_stand_elsewhere(seed: int) -> None:
    """Rows of their own length; nothing behind it is read by the tiles without a mask either."""
    torch.manual_seed(seed)
    q, k, v = tensors(2, 2, 1, 150, 330, 32)
    lengths = torch.tensor([[330], [271]])
    start = lengths - 150
    read = Read(q, k, v, Selection(span=Span(66, 200)))
    read.geometry = Geometry(2, 150, 330, lengths, start, start + torch.arange(150), device=DEVICE)
    want = read.truth(FULL)
    k, v = k.clone(), v.clone()
    k[1, :, 271:] = v[1, :, 271:] = torch.nan
    got = replace(read, k=k, v=v).attend(FULL, backend="triton")
    assert_close(got.out, want.out, BOUND[FULL])
    assert_close(got.lse, want.lse, BOUND[FULL])


def test_softcap_and_scale(seed: int) -> None:
    read = listed(seed, (1, 2, 1, 70, 90), (32, 32), (32, 16), 1)
    check(replace(read, options={"softcap": 3.0, "scale": 0.3}), FULL)


def test_strides_do_not_matter(seed: int) -> None:
    """Heads inside tokens, keys in a longer buffer with wider rows, V a view of K, lists expanded over heads."""
    read = listed(seed, (2, 4, 2, 50, 80), (32, 32), (32, 16), 1)
    lists = read.selection.lists
    assert lists is not None
    read.selection = replace(read.selection, lists=lists.expand(-1, 4, -1, -1))
    want = read.truth(FULL)
    q = read.q.float().transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.full((2, 2, 100, 48), torch.nan)
    k[:, :, :80, :32] = read.k
    v = read.v.float().transpose(1, 2).contiguous().transpose(1, 2)
    got = attend(q, k[:, :, :80, :32], v, read.selection, backend="triton")
    assert_close(got.out, want.out, BOUND[FULL])
    want = replace(read, v=read.k[..., :24]).truth(FULL)
    k = read.k.float()
    assert_close(attend(q, k, k[..., :24], read.selection, backend="triton").out, want.out, BOUND[FULL])


def test_a_read_goes_on_where_another_stopped(seed: int) -> None:
    from foveate.attention.triton.block_sparse import forward

    read = listed(seed, (1, 4, 2, 40, 128), (32, 16), (32, 16), 4)
    lists = read.selection.lists
    assert lists is not None
    q, k, v = read.q.float(), read.k.float(), read.v.float()
    even = torch.where(lists % 2 == 0, lists, 999).sort(-1).values
    odd = torch.where((lists % 2 == 1) & (lists >= 0), lists, 999).sort(-1).values
    parts = [torch.where(x == 999, -1, x).int() for x in (even, odd)]
    one = forward(q, k, v, parts[0], 32, 16, scale=0.2)
    out, lse = forward(q, k, v, parts[1], 32, 16, scale=0.2, prior=one)
    want = merge([attend(q, k, v, Selection(x, 32, 16), scale=0.2, backend="gather") for x in parts])
    assert_close(out, want.out, BOUND[FULL])
    assert_close(lse, want.lse, BOUND[FULL])


def test_layouts_change_nothing(seed: int) -> None:
    from foveate.attention.triton.block_sparse import Config, forward

    read = listed(seed, (1, 2, 1, 160, 256), (32, 32), (128, 64), 2)
    lists, want = read.selection.lists, read.truth(FULL)
    assert lists is not None
    q, k, v = read.q.float(), read.k.float(), read.v.float()
    for rows, columns, tma, ahead in ((128, 128, True, True), (128, 64, False, False), (64, 32, True, False)):
        layout = Config(rows, columns, tma=tma, ahead=ahead)
        out, lse = forward(q, k, v, lists, 128, 64, scale=32**-0.5, layout=layout)
        assert_close(out, want.out, BOUND[FULL])
        assert_close(lse, want.lse, BOUND[FULL])


@pytest.mark.gpu
@pytest.mark.skipif(not knows_gluon(DEVICE)[0], reason=knows_gluon(DEVICE)[1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("shape", "dim", "blocks", "list_heads"),
    [
        ((1, 2, 2, 1000, 1333), 128, (128, 128), 2),
        ((2, 8, 2, 777, 777), 64, (64, 128), 2),
        ((1, 4, 1, 130, 2050), 128, (128, 256), 4),
        ((1, 8, 2, 901, 1901), 128, (64, 64), 1),
        ((1, 8, 2, 4001, 4001), 128, (32, 64), 2),
        ((2, 3, 3, 555, 1901), 64, (256, 64), 3),
        ((1, 32, 8, 5000, 5000), 128, (128, 64), 32),
    ],
)
def test_the_kernel_for_hopper(
    seed: int,
    shape: tuple[int, int, int, int, int],
    dim: int,
    blocks: tuple[int, int],
    list_heads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from foveate.attention.triton import block_sparse_hopper

    launch, launched = block_sparse_hopper.launch, []
    monkeypatch.setattr(block_sparse_hopper, "launch", lambda *a: (launched.append(1), launch(*a)))
    read = listed(seed, shape, (dim, dim), blocks, list_heads)
    want = read.truth(dtype)
    poisoned(monkeypatch)
    got = replace(read, q=read.q.to(dtype), k=read.k.to(dtype), v=read.v.to(dtype)).attend(backend="triton")
    assert launched
    assert_close(got.out, want.out, BOUND[dtype])
    assert_close(got.lse, want.lse, 1e-3)


@pytest.mark.parametrize(
    ("shape", "dims", "blocks", "list_heads", "softcap"),
    [
        ((1, 2, 2, 70, 70), (32, 32), (32, 32), 2, 3.0),
        ((2, 3, 1, 30, 60), (24, 40), (16, 16), 1, None),
        ((1, 4, 2, 130, 140), (32, 16), (128, 128), 4, None),
        ((1, 2, 1, 40, 60), (16, 16), (32, 4), 2, None),
    ],
)
def test_gradients(
    seed: int,
    shape: tuple[int, int, int, int, int],
    dims: tuple[int, int],
    blocks: tuple[int, int],
    list_heads: int,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = listed(seed, shape, dims, blocks, list_heads)
    read.options = {"softcap": softcap}
    if shape[0] > 1:
        lengths = torch.tensor([[shape[4]], [shape[4] - 11]])
        read.geometry = Geometry(shape[0], shape[3], shape[4], lengths, lengths - shape[3], device=DEVICE)
    inputs = [x.float().requires_grad_() for x in (read.q, read.k, read.v)]
    twins = [x.detach().double().requires_grad_() for x in inputs]
    want = replace(read, q=twins[0], k=twins[1], v=twins[2]).truth()
    poisoned(monkeypatch)
    got = replace(read, q=inputs[0], k=inputs[1], v=inputs[2]).attend(backend="triton")
    weight, other = torch.randn_like(want.out), torch.randn_like(want.lse)
    seen = want.lse > -torch.inf

    def loss(part: Partial) -> torch.Tensor:
        # lse has a gradient of its own, which merging parts needs.
        return (part.out * weight).sum() + torch.where(seen, part.lse * other, 0.0).sum()

    # The reference cannot be differentiated where a row reads nothing.
    if not seen.all():
        want = Partial(torch.where(seen.unsqueeze(-1), want.out, 0.0), want.lse)
    expected = torch.autograd.grad(loss(want), twins)
    for one, truth in zip(torch.autograd.grad(loss(got), inputs), expected, strict=True):
        assert_close(one, truth.nan_to_num(0.0), 1e-5 if DEVICE.type == "cpu" else 1e-4)


def test_what_it_refuses() -> None:
    q = torch.ones(1, 2, 32, 16)
    lists = torch.zeros(1, 1, 2, 1, dtype=torch.int32)

    def refused(reason: str, selection: Selection = ALL, x: torch.Tensor = q, **options: object) -> None:
        with pytest.raises(Refused, match=reason):
            attend(x, x, x, selection, backend="triton", **options)  # type: ignore[arg-type]

    refused("lists, or a single span")
    refused("float64", Selection(lists, 16, 16), q.double())
    refused("no bias", Selection(lists, 16, 16), bias=torch.zeros(1, 1, 1, 32))
    refused("k_block 7", Selection(lists, 16, 7, Span(0, 4)))
    refused("q_block 17", Selection(lists, 17, 16, Span(0, 4)))
    refused("q_block 3", Selection(lists.repeat_interleave(6, 2)[:, :, :11], 3, 16))
    refused("narrow lists", Selection(lists, 16, 16), visible=(Span(0, 4),))
    refused("differ by head", Selection(lists, 16, 16, Span(torch.tensor([1, 2]), 4)))
    refused("no gradients", Selection(lists, 16, 16, Span(0, 4)), q.clone().requires_grad_())
    refused("wider than 256", Selection(lists, 16, 16), torch.ones(1, 1, 32, 320))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU it is the first choice")
def test_a_cpu_read_goes_elsewhere_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BACKENDS[0].name == "triton"
    q, lists = torch.ones(1, 1, 32, 16), torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    monkeypatch.setattr(triton_prefill, "run", lambda request: pytest.fail("chosen"))
    attend(q, q, q, Selection(lists, 16, 16))
    monkeypatch.setattr(triton_prefill, "_interpreted", lambda: False)
    with pytest.raises(Refused, match="interpreter alone"):
        attend(q, q, q, Selection(lists, 16, 16), backend="triton")
