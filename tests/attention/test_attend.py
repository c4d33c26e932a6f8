"""`attend` against the reference, on every backend."""

from __future__ import annotations

import random

import pytest
import torch
from tests.attention.reads import Read, random_lists, random_read, tensors
from tests.closeness import LIMIT, assert_close

from foveate.attention import ALL, Geometry, Selection, Span, attend
from foveate.attention.backends import BACKENDS
from foveate.errors import BadArgument, Refused

ANY = [None, "sdpa", "gather", "flex"]


def check(read: Read, dtype: torch.dtype, backend: str | None, limit: float | None = None) -> None:
    limit = LIMIT[dtype] if limit is None else limit
    want = read.truth(dtype)
    got = read.attend(dtype, backend=backend)
    assert got.out.dtype == dtype
    assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got.out, want.out, limit)
    # lse is float32 whatever the inputs; half-precision kernels round the scores' inputs only.
    assert_close(got.lse, want.lse, min(limit, 1e-3))


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("number", range(24))
def test_random_reads(seed: int, number: int, backend: str | None) -> None:
    check(random_read(seed), torch.float64, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("number", range(5))
def test_random_reads_in_lower_precision(seed: int, number: int, backend: str | None, dtype: torch.dtype) -> None:
    check(random_read(seed), dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("queries", "past"), [(1, 0), (1, 62), (7, 0), (63, 0), (130, 0), (7, 123), (130, 1)])
def test_dense(seed: int, queries: int, past: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    check(Read(*tensors(2, 2 * group, 2, queries, queries + past, 32)), dtype, None)


@pytest.mark.parametrize("backend", ["sdpa", "gather"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scores_many_times_over_one_kernel_block(seed: int, backend: str, softcap: float | None) -> None:
    """Windows that leave whole inner blocks of a kernel empty, and reads cut into many pieces."""
    torch.manual_seed(seed)
    read = Read(*tensors(1, 4, 2, 700, 1500, 16), Selection(span=Span(3, 40)), options={"softcap": softcap})
    check(read, torch.float32, backend)
    lists = random_lists(random.Random(seed), (1, 4, 11), 94, 30)
    read = Read(read.q, read.k, read.v, Selection(lists, 64, 16), options={"softcap": softcap})
    check(read, torch.float32, backend)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize(
    ("k_heads", "v_heads", "k_map", "v_map"),
    [
        (2, 6, None, None),  # DiffQKV: fewer heads of K than of V
        (3, 1, None, None),
        (3, 2, (0, 1, 2, 0, 1, 2), None),  # DHA: heads shared out of order
        (4, 3, (3, 3, 0, 1, 1, 0), (2, 2, 1, 0, 0, 1)),
        (6, 6, (5, 4, 3, 2, 1, 0), (5, 4, 3, 2, 1, 0)),
        (2, 1, (0, 0, 0, 0, 0, 0), None),
    ],
)
def test_heads_are_shared_in_any_way(
    seed: int,
    k_heads: int,
    v_heads: int,
    k_map: tuple[int, ...] | None,
    v_map: tuple[int, ...] | None,
    backend: str | None,
) -> None:
    torch.manual_seed(seed)
    q, k, _ = tensors(2, 6, k_heads, 7, 40, 16)
    v = torch.randn(2, v_heads, 40, 24, dtype=torch.float64)
    # Whatever is given per store head follows the heads of K.
    lengths = torch.randint(20, 41, (2, k_heads))
    geometry = Geometry(2, 7, 40, lengths, lengths - 7, torch.arange(40, 47).expand(2, -1))
    span = Span(torch.randint(0, 4, (k_heads,)), torch.randint(9, 30, (k_heads,)))
    for selection in (ALL, Selection(random_lists(random.Random(seed), (2, 6, 3), 10, 4), 3, 4, span)):
        read = Read(q, k, v, selection, geometry, (span,), {"k_map": k_map, "v_map": v_map})
        check(read, torch.float64, backend)
        if backend is not None:
            continue
        # The same, one query head at a time, with its own heads of K and V picked by hand.
        for h in range(6):
            store = k_map[h] if k_map else h // (6 // k_heads)
            value = v_map[h] if v_map else h // (6 // v_heads)
            own = Geometry(2, 7, 40, lengths[:, store, None], (lengths - 7)[:, store, None], geometry.q_positions)
            mine = selection.lists if selection.lists is None else selection.lists[:, h : h + 1]
            near = None if selection.lists is None else span.for_head(store)
            chosen = Selection(mine, selection.q_block, selection.k_block, near) if mine is not None else ALL
            one = attend(
                q[:, h : h + 1], k[:, store, None], v[:, value, None], chosen, own, visible=(span.for_head(store),)
            )
            assert_close(read.attend().out[:, h], one.out[:, 0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 65), (33, 33), (5, 64)])
@pytest.mark.parametrize("selection", [ALL, Selection(span=Span(2, 11))], ids=["dense", "span"])
def test_v_may_be_the_beginning_of_k(
    seed: int, queries: int, keys: int, selection: Selection, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    q, k, _ = tensors(2, 8, 1, queries, keys, 48)
    k = k.to(dtype)
    view = k[..., :32]
    for backend in ("sdpa", "gather"):
        got = attend(q.to(dtype), k, view, selection, backend=backend)
        assert_close(got.out, Read(q.to(dtype), k, view, selection).truth().out, LIMIT[dtype])
        assert torch.equal(got.out, attend(q.to(dtype), k, view.clone(), selection, backend=backend).out)


def test_strides_do_not_matter(seed: int) -> None:
    """Keys in a longer buffer, queries and keys with heads inside, as caches and models hand them over."""
    torch.manual_seed(seed)
    q, k, v = (x.float() for x in tensors(2, 6, 2, 5, 40, 16))
    long = torch.full((2, 2, 64, 16), torch.nan)
    long[:, :, :40] = k
    inner = torch.full((2, 40, 2, 20), torch.nan)
    inner[..., :16] = v.transpose(1, 2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    k_view, v_view = long[:, :, :40], inner.transpose(1, 2)[..., :16]
    spread = v.transpose(2, 3).contiguous().transpose(2, 3)
    lists = Selection(torch.tensor([[0, 2, 9]], dtype=torch.int32).expand(2, 1, 1, 3), None, 4)
    for selection in (ALL, Selection(span=Span(1, 6)), lists):
        for backend in ("sdpa", "gather"):
            want = attend(q, k, v, selection, backend=backend)
            got = attend(turned, k_view, v_view, selection, backend=backend)
            assert_close(got.out, want.out, 1e-6)
            assert_close(attend(q, k_view, spread, selection, backend=backend).out, want.out, 1e-6)


@pytest.mark.parametrize("backend", ANY)
def test_empty_rows_are_zero(seed: int, backend: str | None) -> None:
    torch.manual_seed(seed)
    q, k, v = (x.float() for x in tensors(2, 4, 2, 3, 20, 16))
    lengths = torch.tensor([[20], [0]])
    got = attend(q, k, v, ALL, Geometry(2, 3, 20, lengths, torch.tensor([[17], [-3]])), backend=backend)
    assert torch.equal(got.out[1], torch.zeros(4, 3, 16))
    assert (got.lse[1] == -torch.inf).all()
    assert got.lse[0].isfinite().all()


def test_no_queries_keys_or_rows_is_no_crash() -> None:
    for batch, queries, keys in ((0, 3, 5), (2, 0, 5), (2, 0, 0)):
        got = attend(torch.zeros(batch, 4, queries, 8), torch.zeros(batch, 2, keys, 8), torch.zeros(batch, 2, keys, 6))
        assert got.out.shape == (batch, 4, queries, 6)
        assert got.lse.shape == (batch, 4, queries)
    first = torch.zeros(2, 1, dtype=torch.long)
    got = attend(
        torch.ones(2, 4, 3, 8), torch.ones(2, 2, 0, 8), torch.ones(2, 2, 0, 8), ALL, Geometry(2, 3, 0, first, first)
    )
    assert torch.equal(got.out, torch.zeros(2, 4, 3, 8))
    assert (got.lse == -torch.inf).all()


def test_dense_is_the_kernel_itself(seed: int) -> None:
    """Nothing is added to PyTorch's kernel on the dense path: the same bits."""
    torch.manual_seed(seed)
    q, k, v = (x.bfloat16() for x in tensors(2, 6, 2, 70, 70, 64))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(attend(q, k, v, lse=False).out, want)
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    assert torch.equal(attend(q[:, :, -1:], k, v, lse=False).out, want)


def chosen(*args: object, **options: object) -> str:
    """The backend that serves a call."""
    ran: list[str] = []
    kept = [(backend, backend.run) for backend in BACKENDS]
    try:
        for backend, run in kept:
            backend.run = lambda request, run=run, name=backend.name: (ran.append(name), run(request))[1]  # type: ignore[method-assign]
        attend(*args, **options)  # type: ignore[arg-type]
    finally:
        for backend, run in kept:
            backend.run = run  # type: ignore[method-assign]
    assert len(ran) == 1
    return ran[0]


def test_the_backend_fits_the_read() -> None:
    q, k, v = torch.ones(1, 4, 600, 8), torch.ones(1, 2, 600, 8), torch.ones(1, 2, 600, 8)
    lists = torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    lists[..., 1] = 5
    assert chosen(q, k, v) == "sdpa"
    assert chosen(q, k, v, Selection(lists, None, 8)) == "gather"
    assert chosen(q, k, v, Selection(span=Span(4, 32))) == "gather"
    assert chosen(q, k, v, Selection(span=Span(4, 550))) == "sdpa"
    assert chosen(q[:, :, -1:], k, v, Selection(span=Span(4, 32))) == "gather"
    # A window that nothing is beyond, and lists beside everything, are dense.
    assert chosen(q, k, v, Selection(span=Span(0, 600))) == "sdpa"
    assert chosen(q, k, v, Selection(lists, None, 8, Span())) == "sdpa"
    assert chosen(q, k, v, Selection(lists, None, 8), backend="sdpa") == "sdpa"
    assert chosen(q, k, v, backend="gather") == "gather"


def test_refusals_give_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.ones(1, 1, 3, 8)
    with pytest.raises(BadArgument, match=r"backend='cudnn': choose one of triton, decode, flex, gather, sdpa"):
        attend(q, q, q, backend="cudnn")
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "can_run", lambda request, name=backend.name: (False, f"{name} is asleep"))
    reasons = "; ".join(f"{backend.name}: {backend.name} is asleep" for backend in BACKENDS)
    with pytest.raises(Refused, match=reasons):
        attend(q, q, q)
    with pytest.raises(Refused, match=r"\(gather: gather is asleep\)"):
        attend(q, q, q, backend="gather")


def test_flex_is_not_chosen_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.ones(1, 1, 3, 8)
    for backend in BACKENDS:
        if backend.name != "flex":
            monkeypatch.setattr(backend, "can_run", lambda request: (False, "no"))
    with pytest.raises(Refused, match="flex: on cpu it runs uncompiled and computes every score"):
        attend(q, q, q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 4, 3)}, r"q=\(2, 4, 3\): it must have four axes"),
        ({"k": torch.ones(2, 2, 5, 9)}, r"k=\(2, 2, 5, 9\): batch and head size must be those of q"),
        ({"k": torch.ones(2, 3, 5, 8)}, r"k='3 heads': it must divide the 4 query heads, or give k_map"),
        ({"v": torch.ones(2, 2, 6, 8)}, r"v=\(2, 2, 6, 8\): batch and tokens must be those of k"),
        ({"v": torch.ones(2, 2, 5, 8).bfloat16()}, "bring all three together"),
        ({"k_map": (0, 1, 2, 0)}, r"k_map=\(0, 1, 2, 0\): give 4 heads .* in 0..1"),
        ({"v_map": (0, 1)}, r"v_map=\(0, 1\): give 4 heads"),
        ({"softcap": 0.0}, "softcap=0.0: it must be above 0"),
        ({"bias": torch.ones(2, 4, 3, 4)}, "bias=.*must broadcast"),
        ({"bias": torch.ones(2, 4, 3, 5).bool()}, "bias=.*give a float tensor"),
        ({"geometry": Geometry(2, 3, 6)}, r"geometry=\(2, 3, 6\): q and k have batch, queries, keys = \(2, 3, 5\)"),
        ({"q": torch.ones(2, 4, 7, 8)}, "7 queries need at least as many keys, k has 5"),
        ({"selection": Selection(torch.zeros(2, 3, 1, 2).int())}, r"selection.lists=\(2, 3, 1, 2\)"),
        ({"selection": Selection(torch.zeros(2, 1, 1, 2).int(), q_block=2)}, "with 3 queries, q_block 2"),
        ({"selection": Selection(torch.zeros(2, 1, 1, 2))}, "block numbers are int32"),
        ({"selection": Selection(torch.full((2, 1, 1, 2), 3).int(), k_block=2)}, "5 keys have 3 blocks of 2"),
        ({"selection": Selection(torch.zeros(2, 1, 1, 2).int(), k_block=0)}, "blocks hold at least one token"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    args: dict[str, object] = {"q": torch.ones(2, 4, 3, 8), "k": torch.ones(2, 2, 5, 8), "v": torch.ones(2, 2, 5, 8)}
    attend(**args)  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match=message):
        attend(**(args | change))  # type: ignore[arg-type]
