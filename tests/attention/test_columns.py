"""Column sums are those of the attention map."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from tests.attention.reads import Read, random_read, tensors
from tests.closeness import assert_close

from foveate.attention import ALL, Geometry, Selection, Span, attend, columns, entropies, merge, triton_prefill
from foveate.errors import BadArgument, Refused
from foveate.methods.policies.lists import mask_lists

MODULE = import_module("foveate.attention.columns")  # its function has taken its name


def whole_map(read: Read, lse: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """All probabilities, [B, H, N, M]."""
    g, group = read.places(), read.heads // read.k.shape[1]
    scores = read.q @ read.k.repeat_interleave(group, 1).mT * read.options.get("scale", read.q.shape[-1] ** -0.5)
    if "softcap" in read.options:
        scores = read.options["softcap"] * (scores / read.options["softcap"]).tanh()
    mask = read.selection.mask(g, read.heads, read.visible)
    map_ = torch.where(mask, (scores - lse.unsqueeze(-1)).exp(), 0.0)
    if valid is not None:
        map_ = map_ * (torch.arange(g.queries) < valid.view(-1, 1, 1)).unsqueeze(-1)
    return map_


def by_map(read: Read, lse: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Column sums of the whole map, [B, Hk, M]."""
    return whole_map(read, lse, valid).unflatten(1, (read.k.shape[1], -1)).sum((2, 3))


@pytest.mark.parametrize("number", range(30))
def test_columns_are_those_of_the_map(seed: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = random_read(seed)
    read.options.pop("bias", None)
    if number % 3 == 0:  # a few queries at a time
        monkeypatch.setattr(MODULE, "at_once", lambda device: 5 * read.q.shape[0] * read.heads * read.k.shape[2])
    lse = read.truth().lse
    valid = torch.randint(0, read.q.shape[2] + 1, (read.q.shape[0],)) if number % 2 else None
    got = columns(read.q, read.k, lse, read.selection, read.geometry, visible=read.visible, valid=valid, **read.options)
    assert got.dtype == torch.float64
    assert_close(got, by_map(read, lse, valid), 1e-10)


@pytest.mark.parametrize("number", range(12))
def test_entropies_are_those_of_the_map(seed: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries, and what each key adds to them: both sum to the same."""
    read = random_read(seed)
    read.options.pop("bias", None)
    if number % 3 == 0:  # a few queries at a time
        monkeypatch.setattr(MODULE, "at_once", lambda device: 5 * read.q.shape[0] * read.heads * read.k.shape[2])
    lse = read.truth().lse
    p = whole_map(read, lse)
    surprise = torch.where(p > 0, -p * p.clamp_min(1e-300).log(), 0.0)
    given = (read.q, read.k, lse, read.selection, read.geometry)
    rows = entropies(*given, visible=read.visible, **read.options)
    assert_close(rows, surprise.sum(-1), 1e-10)
    keys = columns(*given, visible=read.visible, entropy=True, **read.options)
    assert_close(keys, surprise.unflatten(1, (read.k.shape[1], -1)).sum((2, 3)), 1e-10)
    assert_close(keys.sum((1, 2)), rows.sum((1, 2)), 1e-10)


def test_entropy_of_flat_attention_is_the_log_of_the_number_of_keys() -> None:
    q, k = torch.zeros(1, 1, 4, 8, dtype=torch.float64), torch.randn(1, 1, 6, 8, dtype=torch.float64)
    seen = torch.tensor([3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    assert_close(entropies(q, k, seen.log().view(1, 1, 4)), seen.log().view(1, 1, 4), 1e-12)
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)
    nothing = Geometry(1, 2, 3, torch.tensor([[0]]), torch.tensor([[-2]]))
    lse = attend(q, k, k, ALL, nothing).lse
    assert torch.equal(entropies(q, k, lse, ALL, nothing), torch.zeros(1, 1, 2))


def test_mass_is_conserved(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (x.bfloat16() for x in tensors(2, 6, 2, 100, 130, 16))
    lse = attend(q, k, v).lse
    valid = torch.tensor([100, 37])
    got = columns(q, k, lse, valid=valid)
    assert got.shape == (2, 2, 130)
    assert got.dtype == torch.float32
    assert torch.allclose(got.sum(-1), 3.0 * valid.view(2, 1).float(), rtol=1e-4)
    # What only padding queries could have seen received nothing.
    assert (got[1, :, 130 - 100 + 37 :] == 0).all()


def test_parts_add_up_with_the_lse_of_the_whole(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(1, 4, 2, 30, 80, 8)
    near, far = Selection(span=Span(window=9)), Selection(span=Span(beyond=9))
    lse = merge([attend(q, k, v, near), attend(q, k, v, far)]).lse
    whole = columns(q, k, lse)
    assert_close(columns(q, k, lse, near) + columns(q, k, lse, far), whole, 1e-12)
    assert_close(columns(q, k, lse, [near, far]), whole, 1e-12)


def test_lists_of_two_grains_may_be_read_in_any_pieces(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(1, 2, 1, 29, 48, 8)
    one = Selection(torch.tensor([0, 2], dtype=torch.int32).expand(1, 1, 8, 2), 4, 8)
    two = Selection(torch.tensor([1, 5], dtype=torch.int32).expand(1, 2, 5, 2), 6, 8)
    lse = merge([attend(q, k, v, one), attend(q, k, v, two)]).lse
    want = by_map(Read(q, k, v, one), lse) + by_map(Read(q, k, v, two), lse)
    for step in (1, 5, 7, 29):
        monkeypatch.setattr(MODULE, "at_once", lambda device, most=step * 2 * 48: most)
        assert_close(columns(q, k, lse, [one, two]), want, 1e-12)


def test_unseeing_queries_add_nothing() -> None:
    q = torch.ones(1, 1, 2, 4)
    geometry = Geometry(1, 2, 3, torch.tensor([[0]]), torch.tensor([[-2]]))
    got = attend(q, torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), ALL, geometry)
    assert torch.equal(columns(q, torch.ones(1, 1, 3, 4), got.lse, ALL, geometry), torch.zeros(1, 1, 3))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim", "ragged", "options"),
    [
        ((1, 3, 1, 150, 150), 32, False, {}),
        ((2, 4, 2, 70, 190), 80, True, {"softcap": 3.0}),
        ((2, 2, 2, 100, 133), 16, False, {"scale": 0.3}),
        ((1, 2, 1, 9, 200), 24, True, {}),  # the last queries alone: the sums of a window
    ],
)
def test_the_kernel_gives_the_same(
    seed: int, shape: tuple[int, int, int, int, int], dim: int, ragged: bool, options: dict[str, float], each: bool
) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available() or not triton_prefill._interpreted():
        pytest.skip("needs Triton's interpreter")
    torch.manual_seed(seed)
    q, k, v = (x.float() for x in tensors(*shape, dim))
    batch, _, k_heads, queries, keys = shape
    geometry, valid = None, None
    if ragged:
        lengths = torch.randint(keys - 40, keys + 1, (batch, k_heads))
        valid = torch.randint(0, queries + 1, (batch,))
        geometry = Geometry(batch, queries, keys, lengths, lengths - queries)
        k = k.masked_fill(torch.arange(keys).view(1, 1, -1, 1) >= lengths.view(batch, k_heads, 1, 1), torch.nan)
    clean = k.nan_to_num(0.0)
    lse = attend(q, clean, v, ALL, geometry, **options).lse
    want = columns(q.double(), clean.double(), lse.double(), ALL, geometry, valid=valid, each=each, **options)
    got = columns(q, k, lse, ALL, geometry, valid=valid, each=each, backend="triton", **options)
    assert got.dtype == torch.float32
    assert_close(got, want, 2e-6)
    want = columns(
        q.double(), clean.double(), lse.double(), ALL, geometry, valid=valid, each=each, entropy=True, **options
    )
    got = columns(q, k, lse, ALL, geometry, valid=valid, each=each, entropy=True, backend="triton", **options)
    assert_close(got, want, 5e-6)
    if not each:
        want = entropies(q.double(), clean.double(), lse.double(), ALL, geometry, **options)
        assert_close(entropies(q, k, lse, ALL, geometry, backend="triton", **options), want, 5e-6)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim", "k_block", "span", "shared", "ragged", "options"),
    [
        ((1, 3, 1, 150, 150), 32, 1, Span(window=1), True, False, {}),
        ((2, 4, 2, 70, 190), 16, 1, Span(window=1), False, True, {"softcap": 3.0}),
        ((2, 4, 2, 40, 150), 16, 6, None, False, True, {"scale": 0.3}),
    ],
)
def test_one_list_for_all_queries(
    seed: int, shape, dim, k_block, span, shared, ragged, options, each, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are listed, and each query's own beside them; by the kernel too. The rest may hold anything."""
    torch.manual_seed(seed)
    monkeypatch.setattr(MODULE, "at_once", lambda device: 3000)  # a few queries at a time
    q, k, v = tensors(*shape, dim)
    batch, heads, k_heads, queries, keys = shape
    geometry, valid = None, None
    if ragged:
        lengths = torch.randint(keys - 20, keys + 1, (batch, 1))
        first = lengths - queries
        geometry = Geometry(batch, queries, keys, lengths, first, first + torch.arange(queries))
        valid = torch.randint(1, queries + 1, (batch,))
    kept = torch.rand(batch, 1 if shared else k_heads, -(-keys // k_block)) < 0.3
    kept[0, 0, 0] = True
    selection = Selection(mask_lists(kept)[:, :, None], k_block=k_block, span=span)
    lse = attend(q, k, v, selection, geometry, **options).lse
    read = Read(q, k, v, selection, geometry, options=options)
    map_ = whole_map(read, lse, valid)
    unread = ~selection.mask(read.places(), heads).unflatten(1, (k_heads, -1)).any(2).any(2)
    k = k.masked_fill(unread.unsqueeze(-1), torch.nan)
    for entropy in (False, True):
        want = torch.special.entr(map_) if entropy else map_
        want = want.sum(2) if each else want.unflatten(1, (k_heads, -1)).sum((2, 3))
        how = {"valid": valid, "each": each, "entropy": entropy, **options}
        assert_close(columns(q, k, lse, selection, geometry, **how), want, 1e-10)
        if not torch.cuda.is_available() and find_spec("triton") and triton_prefill._interpreted():
            got = columns(q.float(), k.float(), lse.float(), selection, geometry, backend="triton", **how)
            assert_close(got, want, 5e-6)


@pytest.mark.parametrize("many", [1, 512])
@pytest.mark.parametrize("dim", [40, 64])
def test_tiles_of_half_precision(seed: int, many: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide tiles and narrow ones, fetched by descriptor, of queries whose heads lie side by side."""
    pytest.importorskip("triton")
    if torch.cuda.is_available() or not triton_prefill._interpreted():
        pytest.skip("needs Triton's interpreter")
    torch.manual_seed(seed)
    monkeypatch.setattr(import_module("foveate.attention.triton.columns"), "_MANY", many)
    q = torch.randn(2, 150, 4, dim).bfloat16().transpose(1, 2)
    k = torch.randn(2, 2, 300, dim).bfloat16()
    lse = attend(q, k, k).lse
    lse[0, 1, 7] = -torch.inf
    how = {"valid": torch.tensor([150, 97]), "entropy": True, "each": True}
    want = columns(q.double(), k.double(), lse.double(), **how)
    assert_close(columns(q, k, lse, backend="triton", **how), want, 5e-6)


def test_the_kernel_refuses_lists() -> None:
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(BadArgument, match="backend='cuda': choose one of triton, torch"):
        columns(q, q, torch.zeros(1, 1, 2), backend="cuda")
    with pytest.raises(Refused, match="cannot sum these columns"):
        columns(q, q, torch.zeros(1, 1, 2), Selection(span=Span(0, 1)), backend="triton")


def test_bad_shapes_are_named() -> None:
    q, k = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)
    lse = torch.zeros(2, 4, 3)
    with pytest.raises(BadArgument, match=r"lse=\(2, 4\): one number per query"):
        columns(q, k, lse[..., 0])
    with pytest.raises(BadArgument, match=r"k=.*it must fit q"):
        columns(q, k[..., :4], lse)
    with pytest.raises(BadArgument, match=r"valid=.*one number per row"):
        columns(q, k, lse, valid=torch.ones(3))
