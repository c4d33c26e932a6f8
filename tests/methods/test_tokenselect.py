"""TokenSelect: must-hold tests of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded
from tests.contract.runs import prompt as announced
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching
from tests.rotation import turn

import foveate
from foveate.attention import decoding
from foveate.methods import TokenSelect
from foveate.methods.policies.ballot import Ballot, head_votes
from foveate.models import tiny

SMALL = {"budget": 24, "init": 3, "local": 6, "chunk": 16}


def distinct(rows: int, count: int) -> torch.Tensor:
    """Ids without repetition: in the first layer equal tokens have equal keys, and votes would tie."""
    return torch.stack(
        [torch.randperm(245, generator=torch.Generator().manual_seed(row))[:count] + 5 for row in range(rows)]
    )


class Truth:
    """The algorithm on one row and layer, written as the card says it: raw keys, compacted copies."""

    def __init__(
        self, model: Any, read: dict[str, Any], method: TokenSelect, k: int, length: int, row: int = 0
    ) -> None:
        band = read["store"].bands[0]
        kv = read["store"].spec.heads
        self.model, self.method, self.k, self.scale = model, method, k, read["how"].scale
        q = read["q"][row]
        keys, values = (x.unflatten(0, (-1, kv))[row, :, :length] for x in (band.keys(), band.values()))
        self.first = length - q.shape[1]
        self.q = turn(model, q, -torch.arange(self.first, length))
        group = q.shape[0] // kv
        # kv head of query head h is h // group
        self.keys = turn(model, keys, -torch.arange(length)).repeat_interleave(group, 0)
        self.values = values.double().repeat_interleave(group, 0)

    def votes(self, begin: int, end: int, edge: int) -> torch.Tensor:
        """Votes for the tokens init..edge-1 by the queries begin..end-1."""
        place = self.method.local + torch.arange(end - begin)
        voter = turn(self.model, self.q[:, begin - self.first : end - self.first], place).mean(1)
        logit = torch.einsum("hd,hmd->hm", voter, self.keys[:, self.method.init : edge])
        return (logit * (self.scale if self.method.scaled else 1.0)).softmax(-1).sum(0)

    def block(self, begin: int, end: int, chosen: list[int] | None = None) -> tuple[list[int], torch.Tensor]:
        """Tokens chosen, and the outputs [H, n, D] of queries begin..end-1."""
        m = self.method
        edge = max(m.init, begin - m.local + 1)
        if chosen is None and edge > m.init:
            votes = self.votes(begin, end, edge)
            chosen = sorted((votes.bfloat16().argsort(descending=True, stable=True)[: self.k] + m.init).tolist())
        outs = []
        for p in range(begin, end):
            read = sorted({*range(min(m.init, p + 1)), *(chosen or []), *range(edge, p + 1)})
            place = torch.arange(len(read)) if m.reposition else torch.tensor(read)
            query = turn(self.model, self.q[:, p - self.first : p - self.first + 1], place[-1:])
            logit = query @ turn(self.model, self.keys[:, read], place).transpose(-1, -2) * self.scale
            outs.append(logit.softmax(-1) @ self.values[:, read])
        return chosen or [], torch.cat(outs, dim=1)


def chosen_of(read: dict[str, Any], init: int, local: int = 5, block: int = 0, row: int = 0) -> list[int]:
    """What won the vote of a block of a prompt from slot 0 on, or of a step."""
    listed = read["parts"].lists[row, 0, block]
    start = block * read["parts"].q_block if read["q"].shape[2] > 1 else int(listed.max())
    return listed[(listed >= init) & (listed < max(init, start - local + 1))].tolist()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"reposition": False}])
def test_layer_equals_the_algorithm_on_raw_keys(heads: int, kv_heads: int, options: dict) -> None:
    """Prompt blocks and a decode step, outputs and all, by a compacted copy with positions 0, 1, 2, ..."""
    model = llama(layers=1, heads=heads, kv_heads=kv_heads)
    method = TokenSelect(k=7, init=3, local=5, chunk=16, **options)
    with watching() as seen:
        applied(model, method, *distinct(1, 42).split([41, 1], dim=1))
    whole, step = seen
    truth = Truth(model, whole, method, 7, 41)
    for number, begin in enumerate(range(0, 41, 16)):
        end = min(41, begin + 16)
        tokens, out = truth.block(begin, end)
        assert chosen_of(whole, 3, block=number) == tokens
        assert_close(whole["result"].out[0, :, begin:end], out, TOLERANCE)
    tokens, out = Truth(model, step, method, 7, 42).block(41, 42)
    assert chosen_of(step, 3) == tokens
    assert len(tokens) == 7
    assert_close(step["result"].out[0], out, TOLERANCE)


def test_kv_heads_by_division_not_by_remainder() -> None:
    """A vote that takes kv head h % Hkv, as a released kernel does, chooses others."""
    model = llama(layers=1, heads=6, kv_heads=2)
    method = TokenSelect(k=7, init=3, local=5, chunk=64)
    with watching() as seen:
        applied(model, method, *distinct(1, 62).split([61, 1], dim=1))
    truth = Truth(model, seen[-1], method, 7, 62)
    assert chosen_of(seen[-1], 3) == truth.block(61, 62)[0]
    truth.keys = truth.keys[::3].repeat(3, 1, 1)
    assert chosen_of(seen[-1], 3) != truth.block(61, 62)[0]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_votes_add_up_to_the_heads(scale: float) -> None:
    voters, keys = torch.randn(2, 3, 6, 16), torch.randn(2, 2, 33, 16)
    between = torch.zeros(2, 3, 33, dtype=torch.bool)
    between[0, :2, 4:20] = True
    votes = head_votes(voters, keys, between, scale)
    assert_close(votes.sum(-1), torch.tensor([[6.0, 6.0, 0.0], [0.0, 0.0, 0.0]]), 1e-6)
    assert not votes[~between].any()
    # the order of heads within and of groups among each other does not matter
    order = torch.tensor([5, 3, 4, 1, 0, 2])
    assert_close(head_votes(voters[:, :, order], keys[:, [1, 0]], between, scale), votes, 1e-6)


def test_votes_are_those_of_exact_scores(seed: int) -> None:
    """Scores as large as unscaled ones are, which bfloat16 (a released kernel's) would shift by whole votes."""
    g = torch.Generator().manual_seed(seed)
    voters, keys = 4 * torch.randn(1, 2, 6, 16, generator=g), torch.randn(1, 2, 40, 16, generator=g)
    want = torch.stack(
        [sum((keys[0, h // 3].double() @ voters[0, t, h].double()).softmax(0) for h in range(6)) for t in range(2)]
    )
    assert_close(head_votes(voters, keys, torch.ones(1, 2, 40, dtype=torch.bool))[0], want, 1e-5)


def test_pooled_votes_are_the_largest_around(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    original = Ballot._pooled
    monkeypatch.setattr(Ballot, "_pooled", lambda self, votes: found.append(votes) or original(self, votes))
    applied(llama(layers=1), TokenSelect(k=7, init=3, local=5, chunk=16, kernel=3), *distinct(1, 42).split([41, 1], 1))
    for votes in found:
        there = votes > -torch.inf
        near = torch.nn.functional.pad(votes, (1, 1), value=-torch.inf).unfold(-1, 3, 1).amax(-1)
        ballot = Ballot(None, None, 3, 1.0, 3)  # type: ignore[arg-type]
        assert torch.equal(original(ballot, votes), near.masked_fill(~there, -torch.inf))


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_room_for_all_is_dense(family: str) -> None:
    model, ids, steps = tiny(family, heads=6, kv_heads=2), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for options in ({"k": 48}, {"budget": 1.0}, {"init": 3, "local": 5, "k": 40}):
        got, _ = applied(model, TokenSelect(**options), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_positions_without_gaps_are_those_of_the_text() -> None:
    """A short row beside a long one is read by the same lists and frames, with nothing left out."""
    model = llama()
    rows = [prompt(1, 12)[0], prompt(1, 61, seed=2)[0]]
    ids, mask = left_padded(rows)
    want, _ = logits(model, rows[0][None])
    with foveate.apply(model, TokenSelect(k=7, init=3, local=5, chunk=16)) as handle, watching() as seen:
        got = announced(model, handle.cache(), ids, mask)
    assert all(read["parts"].frame.keys is not None for read in seen)
    assert_close(got[:1, -1:], want, TOLERANCE)


def test_no_distance_exceeds_what_is_read() -> None:
    with watching() as seen:
        applied(llama(), TokenSelect(k=7, init=3, local=5, chunk=16), prompt(1, 121), prompt(1, 3, seed=1))
    for read in seen[-9:]:
        own, frame = int(read["parts"].lists.max()), read["parts"].frame
        assert frame.query is None
        assert frame.keys[0, 0, 0].tolist() == list(range(own + 1 - (3 + 7 + 5), own + 1))


@pytest.mark.parametrize(("theta", "votes"), [(-1.0, 1), (1.5, 6)])
def test_a_vote_stands_while_the_query_does(theta: float, votes: int, monkeypatch) -> None:
    made: list[int] = []
    original = Ballot.__call__

    def counted(self: Ballot, voters: torch.Tensor, *args: Any) -> torch.Tensor:
        made.append(len(voters))
        return original(self, voters, *args)

    model = llama(layers=1)
    with foveate.apply(model, TokenSelect(k=7, init=3, local=5, theta=theta)) as handle, torch.no_grad():
        cache = handle.cache()
        model(prompt(1, 61), past_key_values=cache)
        monkeypatch.setattr(Ballot, "__call__", counted)
        with watching() as seen:
            for i in range(6):
                model(prompt(1, 1, seed=i), past_key_values=cache)
        assert len(made) == votes
        if votes == 1:
            assert len({tuple(chosen_of(read, 3)) for read in seen}) == 1
        made.clear()
        cache.expect(5)  # another turn is another request
        model(prompt(1, 5), past_key_values=cache)
        made.clear()
        model(prompt(1, 1), past_key_values=cache)
        assert len(made) == 1


def test_the_vote_that_stands_is_the_last_one_made() -> None:
    """Rows decide for themselves, and similarity is measured to the query that voted, not to the one before."""
    model, method = llama(layers=1), TokenSelect(k=7, init=3, local=5, theta=0.05)
    with watching() as seen:
        applied(model, method, *distinct(3, 73).split([61, 12], dim=1))
    stood = 0
    for row in range(3):
        last, tokens = None, []
        for step, read in enumerate(seen[1:]):
            truth = Truth(model, read, method, 7, 62 + step, row)
            query = turn(model, truth.q, torch.tensor([5])).flatten()
            if last is None or torch.cosine_similarity(query, last, dim=0) < 0.05:
                last = query
                tokens = truth.block(61 + step, 62 + step)[0]
            else:
                stood += 1
            assert chosen_of(read, 3, row=row) == tokens
    assert 0 < stood < 33


@pytest.mark.parametrize(("theta", "kernel"), [(0.05, 1), (1.5, 3)])
def test_kernels_read_the_same(theta: float, kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but in Triton's interpreter: votes, what they leave behind, and keys that are turned when read."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    model, method = llama(layers=1), TokenSelect(k=7, init=3, local=5, chunk=16, theta=theta, kernel=kernel)
    ids, runs = distinct(2, 69).split([63, 6], dim=1), []
    for able in (False, True):
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False, able=able: (able, ""))
        with watching() as seen:
            got, _ = applied(model, method, *ids)
        runs.append((got, [read["parts"] for read in seen]))
    assert_close(runs[1][0], runs[0][0], TOLERANCE)
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(one.lists, other.lists)
        assert torch.equal(one.frame.keys, other.frame.keys)


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(), "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(TokenSelect(init=3, local=6), budget=0.04).check(200)
    assert error.value.floor == pytest.approx(10 / 200)


@pytest.mark.parametrize(
    "bad", [{"init": -1}, {"local": 0}, {"k": 0}, {"chunk": 0}, {"kernel": 2}, {"budget": 0.0}], ids=str
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        TokenSelect(**bad)


def test_defaults_are_the_released_ones() -> None:
    method = TokenSelect()
    assert (method.init, method.local, method.k, method.chunk, method.theta) == (128, 512, 2048, 512, 0.9)
    assert (method.kernel, method.scaled, method.reposition) == (1, False, True)
