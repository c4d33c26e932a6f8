"""Steps that recall blocks, in Triton's interpreter or on a GPU: the choice, the read, and what is noted of it."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on, spoiled
from tests.attention.test_triton_decode_votes import speeds, turn
from tests.closeness import assert_close

from foveate.attention import recalled
from foveate.attention.angles import Angles
from foveate.attention.recalled import Borders, Share
from foveate.errors import BadArgument
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.recall import cosines, normalised_entropy, taken

pytest.importorskip("triton")

CASES = [
    (torch.float32, 32, 16, False, 1, None, Borders(5, 13, 8)),
    (torch.bfloat16, 80, 40, False, 3, 3.0, Borders(0, 40, 32)),
    (torch.float32, 48, 12, False, 8, None, Borders(37, 9, 4)),  # a part of the channels is rotated
    (torch.bfloat16, 48, 8, True, 1, 3.0, Borders(16, 16, 64)),  # and here they are the last ones
]
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
ROWS = (131, 70)


def raw(x: torch.Tensor, at: torch.Tensor, pairs: int, last: bool) -> torch.Tensor:
    """x [..., n, D], whose rows stand at `at` [n], without position, in float64."""
    return turn(x, -at.double().unsqueeze(-1) * speeds(pairs).double(), last)


@pytest.mark.parametrize(("dtype", "dim", "pairs", "last", "group", "softcap", "at"), CASES)
def test_a_read_is_that_of_turned_keys(seed: int, dtype, dim, pairs, last, group, softcap, at) -> None:
    """And the newest slots gain what they weighed among themselves."""
    torch.manual_seed(seed)
    lengths = torch.tensor(ROWS, dtype=torch.int32).repeat_interleave(2)
    q = made(dtype, 2, 2 * group, 1, dim)
    k, v = (spoiled(made(dtype, 4, 140, width), lengths) for width in (dim, 24))
    chosen, mass = torch.full((2, 7), -1, dtype=torch.int32), torch.rand(2, 136)
    gained, want, lses = torch.zeros(2, 136, dtype=torch.float64), [], []
    for row, length in enumerate(ROWS):
        ready = int(at.ready(torch.tensor(length - 1)))
        some = torch.randperm(ready)[: min(5, ready)].sort().values
        chosen[row, : len(some)] = some
        edge = min(max(0, length - at.local), at.init + ready * at.block)
        near = torch.arange(edge, length)
        blocks = (at.init + some[:, None] * at.block + torch.arange(at.block)).flatten()
        far = torch.cat([torch.arange(min(at.init, max(0, length - at.local))), blocks])
        for head in range(2 * group):
            keys, values = k[2 * row + head // group], v[2 * row + head // group].double()
            own = q[row, head].double()
            away = (
                turn(own, (at.local - length + 1) * speeds(pairs).double(), last) @ raw(keys[far], far, pairs, last).T
            )
            scores = torch.cat([away, own @ keys[near].double().T], dim=1)[0] * 0.3
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            want.append(scores.softmax(0) @ values[torch.cat([far, near])])
            lses.append(scores.logsumexp(0))
            gained[row, near] += scores[len(far) :].softmax(0)
    given = on(q, k, v, lengths, chosen)
    part, seen = recalled.read(*given, Angles(speeds(pairs), last), at, scale=0.3, softcap=softcap)
    assert_close(part.out.cpu().flatten(0, 2), torch.stack(want), LIMIT[dtype])
    assert_close(part.lse.cpu().flatten(), torch.stack(lses), LIMIT[dtype])
    entropy = torch.tensor([0.25, -1.0])
    past, means = torch.tensor([[-1.0, 0.5, 0.75], [-1.0, 0.1, 0.1]]), torch.zeros(2, 5)
    state = on(mass.clone(), past, means)
    recalled.settle(seen, given[3], *on(entropy), *state, at, 3)
    after, past, means = (x.cpu() for x in state)
    assert_close(after - mass, gained, LIMIT[dtype])
    assert past.tolist() == [[0.5, 0.75, 0.25], [-1.0, pytest.approx(0.1), pytest.approx(0.1)]]
    assert means.tolist() == [[0, 0, 0, 0.5, 0], [0, 0, 0, -1, 0]]


@pytest.mark.parametrize(("dtype", "dim", "pairs", "last", "group", "softcap", "at"), CASES)
def test_the_choice_is_that_of_separate_passes(seed: int, dtype, dim, pairs, last, group, softcap, at) -> None:
    torch.manual_seed(seed)
    lengths = torch.tensor(ROWS, dtype=torch.int32)
    ready = at.ready(lengths.long() - 1)
    q, known = made(dtype, 2, 2 * group, 1, dim), torch.randn(2, 2, 35, dim)
    known = known.masked_fill((torch.arange(35) >= ready[:, None])[:, None, :, None], torch.nan)
    delta = (at.local - lengths + 1).double().view(2, 1, 1, 1) * speeds(pairs).double()
    probes = turn(q, delta, last).to(dtype).float()
    scores = cosines(probes, known.nan_to_num(0.0))
    scores = scores.masked_fill(torch.arange(35) >= ready[:, None, None], -torch.inf)
    means = torch.rand(2, 6)
    angles, used = Angles(speeds(pairs), last), lengths.repeat_interleave(2)
    for number, left, some in ((0, None, means), (4, torch.tensor([31, 7]), means), (5, torch.tensor([9, 2]), -means)):
        share = Share(number, 40, 2, 14)
        before = torch.full((2, 1), 40) if left is None else left[:, None]
        take = taken(before, some, number, 6, 2, 14)
        want = top_lists(scores[:, 0], 14, torch.minimum(take[:, 0], ready))
        given = on(q, known, used)
        known_left, state = None if left is None else on(left)[0], on(some)[0]
        lists, entropy, after = (x.cpu() for x in recalled.recall(*given, angles, at, share, known_left, state))
        assert torch.equal(lists, want)
        assert torch.equal(after, (before - take)[:, 0])
        share_of = torch.where(ready > 1, normalised_entropy(scores[:, 0]), -1.0)
        assert_close(entropy, share_of, 1e-3 if dtype == torch.bfloat16 else 1e-5)


def test_what_does_not_fit_is_named() -> None:
    q, known, lengths = on(torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 3, 16), torch.ones(1, dtype=torch.int32))
    at, share, means, angles = Borders(1, 2, 4), Share(0, 4, 1, 4), *on(torch.zeros(1, 2)), Angles(speeds(8))
    with pytest.raises(BadArgument, match="one query per row"):
        recalled.recall(q.expand(-1, -1, 2, -1), known, lengths, angles, at, share, None, means)
    with pytest.raises(BadArgument, match="float32 with adjacent"):
        recalled.recall(q, known.half(), lengths, angles, at, share, None, means)
    with pytest.raises(BadArgument, match="layers"):
        recalled.recall(q, known, lengths, angles, at, share._replace(number=2), None, means)
    k, chosen = on(torch.zeros(1, 9, 16), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(BadArgument, match="all of one dtype"):
        recalled.read(q, k.half(), k, lengths, chosen, angles, at, scale=1.0, softcap=None)
    with pytest.raises(BadArgument, match=r"int32 \[B, K\]"):
        recalled.read(q, k, k, lengths, chosen.long(), angles, at, scale=1.0, softcap=None)
