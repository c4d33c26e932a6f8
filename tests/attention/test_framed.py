"""Reads whose keys stand elsewhere, against a loop over the definition."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from tests.attention.reads import random_lists, tensors
from tests.closeness import LIMIT, assert_close

from foveate.attention import Frame, Geometry, Selection, Span, framed, grouped
from foveate.attention.angles import Angles

ANGLES = Angles(10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4))


def turned(x: torch.Tensor, delta: int) -> torch.Tensor:
    """One vector turned by whole positions, by complex numbers."""
    half = x.shape[-1] // 2
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), delta * ANGLES.frequencies.double())
    return torch.cat([z.real, z.imag])


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("q_block", "k_block", "shared"), [(None, 1, True), (1, 1, False), (3, 4, True), (2, 5, False)]
)
def test_against_the_definition(seed: int, q_block, k_block, shared, softcap, gaps, monkeypatch) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    monkeypatch.setattr(framed, "at_once", lambda device: 200)  # several pieces
    q, k, v = tensors(2, 3, 1, 7, 23, 8, 6)
    lengths, first = torch.tensor([[23], [19]]), torch.tensor([[16], [13]])
    apart = 2 if gaps else 1  # tokens between were evicted, or none
    places = torch.arange(23).expand(2, 1, -1) * 2 if gaps else None
    geometry = Geometry(2, 7, 23, lengths, first, apart * (first + torch.arange(7)), places)
    blocks = -(-23 // k_block)
    lists = random_lists(rng, (2, 1 if shared else 3, 1 if q_block is None else -(-7 // q_block)), blocks, 4)
    target = torch.randint(0, 50, lists.shape)
    selection = Selection(lists, q_block, k_block, frame=Frame(keys=target))
    visible = (Span(sink=5, window=30),)
    move = lambda x, delta: ANGLES.move(x, delta).to(x.dtype)  # noqa: E731

    def parts() -> Iterator[framed.Piece]:
        return framed.pieces(q, k, selection, geometry, visible, scale=0.3, softcap=softcap, move=move)

    got = framed.attend(q, v, parts())
    seen = selection.mask(geometry, 3, visible)
    scores = torch.full((2, 3, 7, 23), -torch.inf, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(7):
                n, own = 0 if q_block is None else i // q_block, 0 if shared else h
                for block, place in zip(lists[b, own, n].tolist(), target[b, own, n].tolist(), strict=True):
                    for slot in range(block * k_block, min(23, (block + 1) * k_block)):
                        if block >= 0 and seen[b, h, i, slot]:
                            key = turned(k[b, 0, slot], place + slot - block * k_block - apart * slot)
                            score = q[b, h, i] @ key * 0.3
                            scores[b, h, i, slot] = score if softcap is None else softcap * (score / softcap).tanh()
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1)).exp()
    limit = 1e-6  # the embedding turns in float32
    assert_close(got.out, weights @ v, limit)
    assert_close(got.lse, lse, limit)
    got = framed.read(q, k, v, selection, geometry, visible, scale=0.3, softcap=softcap, move=move)
    assert_close(got.out, weights @ v, limit)
    assert_close(got.lse, lse, limit)
    assert_close(framed.probabilities(q, 23, lse, parts()), weights, limit)
    count = torch.tensor([7, 5])
    weights[1, :, 5:] = 0
    assert_close(framed.columns(23, lse, parts(), count), weights.sum((1, 2)).unsqueeze(1), limit)


def test_what_is_not_read_is_not_touched(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(1, 2, 1, 1, 9, 8)
    lists = torch.tensor([0, 3, 8, -1], dtype=torch.int32).view(1, 1, 1, 4)
    selection = Selection(lists, frame=Frame(keys=torch.tensor([0, 1, 2, 0]).view(1, 1, 1, 4)))
    runs = []
    for poison in (0.0, torch.nan):
        for slot in (1, 2, 4, 5, 6, 7):
            k[:, :, slot] = v[:, :, slot] = poison
        parts = framed.pieces(q, k, selection, Geometry(1, 1, 9), (), scale=1.0, softcap=None, move=ANGLES.move)
        runs.append(framed.attend(q, v, parts))
        runs.append(framed.read(q, k, v, selection, Geometry(1, 1, 9), (), scale=1.0, softcap=None, move=ANGLES.move))
    assert torch.equal(runs[0].out, runs[2].out)
    assert torch.equal(runs[1].out, runs[3].out)
    assert runs[2].out.isfinite().all()
    assert runs[3].out.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_that_need_no_mask(seed: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that end with the queries' own keys, lists of past keys, and others, as with kernels that know who is
    last."""
    torch.manual_seed(seed)
    q, k, v = tensors(2, 3, 1, 20, 50, 8, 6)
    blocks = [[0, 5, 9, 30, 31, 32, 33, 34], [1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 4, 6, 8, 10, 12, -1]]
    blocks.append([3, 4, 35, 45, 46, 47, 48, 49])
    lists = torch.tensor(blocks, dtype=torch.int32).view(1, 1, 4, 8).expand(2, -1, -1, -1)
    selection = Selection(lists, 5, frame=Frame(keys=torch.arange(8).expand_as(lists)))
    geometry, plain = Geometry(2, 20, 50), framed.softmax_attention
    seen: list[tuple[bool, bool]] = []

    def attention(q, k, v, *, scale, mask, causal):
        seen.append((mask is not None, causal))
        if causal:  # bottom right
            n, m = q.shape[2], k.shape[2]
            mask = (torch.arange(m) <= torch.arange(n)[:, None] + m - n)[None, None]
        return plain(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(framed, "softmax_attention", attention)
    monkeypatch.setattr(framed, "ends_with_keys", lambda q, v: causal)
    got = framed.read(q, k, v, selection, geometry, (), scale=0.4, softcap=None, move=ANGLES.move)
    parts = framed.pieces(q, k, selection, geometry, (), scale=0.4, softcap=None, move=ANGLES.move)
    want = framed.attend(q, v, parts)
    assert_close(got.out, want.out, LIMIT[torch.float64])
    assert_close(got.lse, want.lse, LIMIT[torch.float64])
    masked, past, own = (True, False), (False, False), (False, True)
    assert seen == ([own, past, masked, own] if causal else [masked, past, masked])


@pytest.mark.parametrize(
    ("per", "shared", "softcap", "dtype"),
    [
        (1, False, None, torch.float64),
        (1, True, 3.0, torch.float32),
        (3, False, None, torch.float32),
        (8, True, None, torch.bfloat16),
    ],
)
def test_many_queries_with_blocks_of_their_own(seed: int, per, shared, softcap, dtype, monkeypatch) -> None:
    """Seen from the blocks: as query by query, for rows of different length, over what may hold NaN where unread."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    monkeypatch.setattr(grouped, "ENTRIES", 3000)  # several runs of queries
    q, k, v = (x.to(dtype) for x in tensors(2, 3, 1, 70, 93, 8, 6))
    lengths, first = torch.tensor([[93], [80]]), torch.tensor([[23], [10]])
    geometry = Geometry(2, 70, 93, lengths, first, first + torch.arange(70))
    lists = random_lists(rng, (2, 1 if shared else 3, -(-70 // per)), 6, 4)
    selection = Selection(lists, per, 16, frame=Frame(keys=torch.randint(0, 50, lists.shape)))
    options = {"scale": 0.3, "softcap": softcap, "move": lambda x, delta: ANGLES.move(x, delta).to(x.dtype)}
    want = framed.attend(q, v, framed.pieces(q, k, selection, geometry, (), **options))
    calls: list[int] = []
    plain = grouped.read
    monkeypatch.setattr(grouped, "read", lambda *a, **o: calls.append(1) or plain(*a, **o))
    unread = ~selection.mask(geometry, 3).any(1).any(1)
    k, v = (x.masked_fill(unread.view(2, 1, 93, 1), torch.nan) for x in (k, v))
    got = framed.read(q, k, v, selection, geometry, (), **options)
    assert calls
    assert got.out.dtype == dtype and got.lse.dtype == want.lse.dtype
    limit = max(LIMIT[dtype], LIMIT[torch.float32])  # the embedding turns in float32
    assert_close(got.out, want.out, limit)
    assert_close(got.lse, want.lse, min(limit, 1e-3))
    assert (got.out[want.lse == -torch.inf] == 0).all()


@pytest.mark.parametrize(("own", "size"), [(1, 1), (6, 5), (6, 4)])
def test_one_query_is_read_by_a_kernel(seed: int, own: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of a whole group, or of each of its heads: what the kernel reads is what the pieces are."""
    pytest.importorskip("triton")
    torch.manual_seed(seed)
    q, k, v = (x.float() for x in tensors(2, 6, 1, 1, 40, 32, 16))
    lengths, first = torch.tensor([[40], [31]]), torch.tensor([[39], [30]])
    geometry = Geometry(2, 1, 40, lengths, first)
    lists = random_lists(random.Random(seed), (2, own, 1), 40 // size, 6)
    places = torch.randint(0, 90, lists.shape)
    selection = Selection(lists, 1, size, frame=Frame(keys=places))
    angles = Angles(10000.0 ** -(torch.arange(16) / 16))

    def move(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return angles.move(x, delta).to(x.dtype)

    want = framed.attend(q, v, framed.pieces(q, k, selection, geometry, (), scale=0.3, softcap=None, move=move))
    asked = []
    monkeypatch.setattr(framed.turned, "serves", lambda x, angles: not asked.append(True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v, lists, places, lengths, first = (x.to(device) for x in (q, k, v, lists, places, lengths, first))
    selection = Selection(lists, 1, size, frame=Frame(keys=places))
    geometry = Geometry(2, 1, 40, lengths, first, device=device)
    got = framed.read(q, k, v, selection, geometry, (), scale=0.3, softcap=None, move=move, angles=angles)
    assert asked
    limit = 1e-5 if torch.cuda.is_available() else LIMIT[torch.float32]
    assert_close(got.out.cpu(), want.out, limit)
    assert_close(got.lse.cpu(), want.lse, limit)
