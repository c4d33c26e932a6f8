"""Compiled loops against what they stand for: to the number where all products are exact, so that equals are many."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.methods.policies import neighbours, query_graphs
from foveate.methods.policies.native import jit, native
from foveate.methods.policies.neighbours import Found, walk, walk_abreast
from foveate.methods.policies.query_graphs import query_graph

SEEDS = st.integers(0, 2**32 - 1)


def test_loops_are_compiled_here() -> None:
    """Else nothing below would be."""
    assert native("walk") is not None and native("graphs") is not None


# -- search ------------------------------------------------------------------------------------------------------------


def graph(g: torch.Generator, batch: int, stores: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Any links, some of them none, some more than once; entries likewise, and none in some stores."""
    edges = torch.randint(-1, count, (batch, stores, count, width), generator=g, dtype=torch.int32)
    entries = torch.randint(-1, count, (batch, stores, 8), generator=g, dtype=torch.int32)
    return edges, entries.masked_fill(torch.rand(batch, stores, 1, generator=g) < 0.2, -1)


def same(one: Found, other: Found) -> None:
    """The same sets of keys, each once."""
    width = max(one.keys.shape[-1], other.keys.shape[-1])
    found = [
        torch.nn.functional.pad(x.keys, (0, width - x.keys.shape[-1]), value=-1).sort(-1).values for x in (one, other)
    ]
    assert torch.equal(*found)
    assert not ((found[0][..., 1:] == found[0][..., :-1]) & (found[0][..., 1:] >= 0)).any()
    assert torch.equal(one.scanned, other.scanned)


@given(
    seed=SEEDS,
    shape=st.tuples(*(st.integers(1, most) for most in (3, 3, 3, 3, 9))),
    count=st.integers(1, 90),
    width=st.integers(1, 9),
    k=st.integers(1, 100),
    beam=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0, 1, 9]),
)
def test_the_compiled_search_finds_what_the_other_does(
    seed: int, shape: tuple[int, ...], count: int, width: int, k: int, beam: int, dtype: torch.dtype, spread: int
) -> None:
    """Keys of whole numbers, of which many are equal; parts of larger tensors; also more keys asked for than there are.
    The other search compares in either of its ways."""
    batch, stores, group, queries, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-spread, spread + 1, (batch, stores * group, queries, dim), generator=g).to(dtype)
    room = torch.randint(-9, 10, (batch, stores, count + 5, dim), generator=g).to(dtype)
    edges, entries = graph(g, batch, stores, count, width)
    wider = torch.cat([edges, edges], dim=2)
    found = walk(q, room[:, :, :count], wider[:, :, :count], entries, k, beam)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "WHOLE", seed % 2 * 1000)
        same(found, walk_abreast(q, room[:, :, :count].contiguous(), edges, entries, k, beam))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 24, 67, 192])
def test_products_are_close(dim: int, dtype: torch.dtype) -> None:
    """With a beam over all keys the best are those of the exact products, next to which others may be as good."""
    g = torch.Generator().manual_seed(dim)
    q, keys = torch.randn(1, 4, 3, dim, generator=g), torch.randn(1, 2, 301, dim, generator=g).to(dtype)
    ring = ((torch.arange(301) + 1) % 301).to(torch.int32).expand(1, 2, 301)[..., None]
    found = walk(q, keys, ring, torch.zeros(1, 2, 8, dtype=torch.int32), 40, 301)
    assert (found.scanned == 301).all()
    score = (q.view(1, 2, 6, dim).double() @ keys.double().transpose(2, 3)).view(4, 3, 301)
    got = score.gather(2, found.keys[0]).sort(-1, descending=True).values
    want = score.topk(40, dim=-1).values
    assert not got.isnan().any()
    assert (got - want).square().mean().sqrt() <= 1e-6 * want.square().mean().sqrt()


def test_scores_that_are_no_numbers_are_not_found() -> None:
    q, keys = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 20, 4)
    keys[0, 0, 3], keys[0, 0, 5], q[0, 0, 1] = torch.nan, -torch.inf, torch.nan
    edges = torch.arange(20, dtype=torch.int32).expand(1, 1, 20, 20)
    found = walk(q, keys, edges, torch.zeros(1, 1, 8, dtype=torch.int32), 30, 5)
    assert sorted(found.keys[0, 0, 0].tolist()) == [-1, -1, *sorted(set(range(20)) - {3, 5})]
    assert set(found.keys[0, 0, 1].tolist()) == {-1}


# -- graphs ------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, rows=st.integers(1, 9), count=st.integers(1, 700), share=st.floats(0, 1), spread=st.integers(0, 500))
def test_the_largest_are_found(seed: int, rows: int, count: int, share: float, spread: int) -> None:
    """With equals, numbers below 0 and infinite ones; the very largest first."""
    rng = np.random.default_rng(seed)
    score = rng.integers(-spread, spread // 3 + 1, (rows, count)).astype(np.float32) / 7
    score[rng.random((rows, count)) < 0.1] = rng.choice([-np.inf, np.inf, 1e-30, -1e30])
    k = max(1, round(share * count))
    best = np.empty((rows, k), dtype=np.int64)
    native("graphs").largest(score + np.float32(0), best)
    order = np.argsort(-score, axis=1, kind="stable")[:, :k]
    assert np.array_equal(best[:, 0], order[:, 0])
    assert np.array_equal(np.sort(best, axis=1), np.sort(order, axis=1))


@given(
    seed=SEEDS,
    half=st.integers(1, 60),
    queries=st.integers(1, 80),
    dim=st.integers(1, 6),
    knn=st.integers(2, 40),
    degree=st.integers(2, 40),
)
def test_compiled_graphs_are_the_same(seed: int, half: int, queries: int, dim: int, knn: int, degree: int) -> None:
    """Keys whose mean is 0, so that all distances between them are exact; no product is a 0 with a sign."""
    g = torch.Generator().manual_seed(seed)
    keys = 2 * torch.randint(-3, 3, (half, dim), generator=g).float() + 1
    keys = torch.cat([keys, -keys])[torch.randperm(2 * half, generator=g)]
    asked = 2 * torch.randint(-3, 3, (queries, dim), generator=g).float() + 1
    knn = min(knn, max(2, 2 * half - 1))
    made = query_graph(keys, asked, knn, degree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_graphs, "native", lambda noun: None)
        want = query_graph(keys, asked, knn, degree)
    assert torch.equal(made["entries"], want["entries"])
    assert torch.equal(made["edges"], want["edges"])


@pytest.mark.parametrize(("count", "dim"), [(1, 8), (2, 8), (5, 16), (333, 24), (1200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_graphs_of_any_keys(count: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for near equals, which either way may order."""
    g = torch.Generator().manual_seed(count)
    keys, asked = torch.randn(count, dim, generator=g).to(dtype) + 3, torch.randn(901, dim, generator=g).to(dtype)
    made = query_graph(keys, asked, 16, 20)
    monkeypatch.setattr(query_graphs, "native", lambda noun: None)
    want = query_graph(keys, asked, 16, 20)
    assert {name: (x.dtype, x.shape) for name, x in made.items()} == {n: (x.dtype, x.shape) for n, x in want.items()}
    assert torch.equal(made["entries"], want["entries"])
    assert (made["edges"] == want["edges"]).all(1).float().mean() > 0.99


# -- numba -------------------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["numba"] = None
import torch
from foveate.methods.policies.native import native
from foveate.methods.policies.neighbours import walk
from foveate.methods.policies.query_graphs import query_graph
g = torch.Generator().manual_seed(0)
keys, asked = torch.randn(70, 8, generator=g), torch.randn(50, 8, generator=g)
table = query_graph(keys, asked, 6, 8)
found = walk(asked[None, None], keys[None, None], table["edges"][None, None], table["entries"][None, None], 5, 70)
assert torch.equal(found.keys[0, 0].sort(1).values, (asked @ keys.T).topk(5, dim=1).indices.sort(1).values)
assert native("walk") is None and native("graphs") is None
"""


def test_numba_need_not_be_there() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_numba_is_only_asked_for_where_it_is_used() -> None:
    code = "import sys, foveate.methods, foveate.methods.policies.neighbours; assert 'numba' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_loops_work_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.dispatcher import Dispatcher

    def nowhere(self: Dispatcher) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(Dispatcher, "enable_caching", nowhere)
    assert jit()(lambda x: x + 1)(2) == 3
