"""`attend` on a GPU against the reference in float64 on the CPU."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tests.attention.reads import Read, random_lists, random_read, tensors
from tests.closeness import LIMIT, assert_close

from foveate.attention import ALL, Geometry, Selection, Span, attend, columns
from foveate.attention.backends import choose
from foveate.attention.request import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
HALF = [torch.float32, torch.bfloat16]


def on_gpu(read: Read, dtype: torch.dtype) -> Read:
    def move(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.cuda()

    def span(x: Span) -> Span:
        return Span(*(i.cuda() if isinstance(i, torch.Tensor) else i for i in (x.sink, x.window, x.beyond)))

    g, s = read.places(), read.selection
    geometry = replace(
        g,
        lengths=move(g.lengths),
        first=move(g.first),
        q_positions=move(g.q_positions),
        k_positions=move(g.k_positions),
        device=torch.device("cuda"),
    )
    selection = replace(s, lists=move(s.lists), span=None if s.span is None else span(s.span))
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in read.options.items()}
    q, k, v = (x.to("cuda", dtype) for x in (read.q, read.k, read.v))
    return Read(q, k, v, selection, geometry, tuple(span(x) for x in read.visible), options)


def check(read: Read, dtype: torch.dtype, backend: str | None) -> None:
    want = read.truth(dtype)
    # Float32 matrix products of a GPU are summed in another order and over fewer accumulators.
    limit = max(LIMIT[dtype], 1e-5)
    got = on_gpu(read, dtype).attend(backend=backend)
    assert_close(got.out.cpu(), want.out, limit)
    assert_close(got.lse.cpu(), want.lse, min(limit, 1e-3))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", ["sdpa", "gather"])
@pytest.mark.parametrize("number", range(20))
def test_random_reads(seed: int, number: int, backend: str, dtype: torch.dtype) -> None:
    check(random_read(seed), dtype, backend)


@pytest.mark.parametrize("dtype", [*HALF, torch.float16])
@pytest.mark.parametrize(("queries", "past"), [(1, 0), (1, 300), (7, 123), (130, 0), (130, 77), (1000, 24)])
@pytest.mark.parametrize(("heads", "k_heads", "k_dim", "v_dim"), [(6, 2, 64, 64), (8, 1, 128, 128), (4, 4, 96, 64)])
def test_dense(
    seed: int, queries: int, past: int, heads: int, k_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    check(Read(*tensors(2, heads, k_heads, queries, queries + past, k_dim, v_dim)), dtype, None)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (128, 32), (100, 5)])
def test_long_lists_are_skipped_through(seed: int, blocks: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(2, 6, 2, 500, 777, 64)
    q_block, k_block = blocks
    shape = (2, 6, -(-500 // q_block))
    lists = random_lists(random.Random(seed), shape, -(-777 // k_block), 9)
    lengths = torch.tensor([[777, 700], [650, 777]])
    for geometry in (None, Geometry(2, 500, 777, lengths, lengths - 500)):
        read = Read(q, k, v, Selection(lists, q_block, k_block), geometry)
        moved = on_gpu(read, dtype)
        request = normal(
            moved.q, moved.k, moved.v, moved.selection, moved.places(), (), None, None, 1.0, None, None, True, False
        )
        assert choose(request).name == "triton"
        for backend in (None, "flex"):
            check(read, dtype, backend)


@pytest.mark.parametrize("span", [Span(4, 100), Span(torch.tensor([0, 9]), torch.tensor([50, 300])), Span(beyond=70)])
def test_flex_takes_spans_softcap_and_bias(seed: int, span: Span) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(1, 4, 2, 300, 420, 32)
    check(Read(q, k, v, Selection(span=span)), torch.bfloat16, "flex")
    options = {"softcap": 5.0, "bias": torch.randn(1, 4, 1, 420, dtype=torch.float64)}
    check(Read(q, k, v, Selection(span=span), options=options), torch.float32, "flex")


@pytest.mark.parametrize("case", ["dense", "ragged", "lists", "ragged lists", "span", "beginning of k"])
def test_a_decode_step_never_waits_for_the_gpu(seed: int, case: str) -> None:
    torch.manual_seed(seed)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2, 8, 2, 1, 100, 64))
    lengths = torch.tensor([[100, 90], [70, 80]], device="cuda")
    ragged = Geometry(2, 1, 100, lengths, lengths - 1, torch.tensor([[99], [99]], device="cuda"), None, q.device)
    lists = Selection(torch.tensor([0, 2, 5], dtype=torch.int32, device="cuda").expand(2, 2, 1, 3), None, 16)
    selection, geometry, values = {
        "dense": (ALL, None, v),
        "ragged": (ALL, ragged, v),
        "lists": (lists, None, v),
        "ragged lists": (lists, ragged, v),
        "span": (Selection(span=Span(4, 20)), ragged, v),
        "beginning of k": (lists, ragged, k[..., :32]),
    }[case]
    attend(q, k, values, selection, geometry)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, values, selection, geometry)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_columns(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (x.float() for x in tensors(2, 6, 2, 130, 200, 32))
    lse = attend(q, k, v).lse
    want = columns(q.double(), k.double(), lse.double())
    assert_close(columns(q.cuda(), k.cuda(), lse.cuda()).cpu(), want, 1e-5)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_long_prompts(seed: int, heads: tuple[int, int]) -> None:
    """From some length on another library's kernel reads all causal pairs."""
    torch.manual_seed(seed)
    n = 8192
    q, k, v = (
        torch.randn(1, count, n, 64, device="cuda", dtype=torch.bfloat16) for count in (heads[0], *[heads[1]] * 2)
    )
    got = attend(q, k, v, lse=False).out
    rows = torch.cat([torch.arange(3), torch.randint(3, n, (40,)), torch.tensor([n - 1])]).cuda()
    wide = [x.double().repeat_interleave(heads[0] // x.shape[1], dim=1) for x in (q, k, v)]
    scores = wide[0][:, :, rows] @ wide[1].transpose(-1, -2) * 64**-0.5
    scores = scores.masked_fill(torch.arange(n, device="cuda") > rows[:, None], -torch.inf)
    assert_close(got[:, :, rows].double().cpu(), (scores.softmax(-1) @ wide[2]).cpu(), LIMIT[torch.bfloat16])
