"""SparseD: must-hold tests of its cards."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tests.closeness import assert_close
from tests.diffusion.toy import HALF, copies, trained
from torch import Tensor

import foveate
from foveate.attention import ALL, Geometry, Selection
from foveate.diffusion import DiffusionShape, MaskedDiffusion, Moment, SparseD, block_means, denoise


@dataclass
class Watched:
    """A method and what it said: by step, the selection of each layer."""

    method: SparseD
    said: dict[int, list[Selection]] = field(default_factory=dict)
    given: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def select(self, q: Tensor, k: Tensor, at: Moment, mine: dict[str, Tensor]) -> Selection:
        answer = self.method.select(q, k, at, mine)
        self.said.setdefault(at.step, []).append(answer)
        self.given.setdefault(at.step, []).append((q, k))
        return answer


def noisy(heads: int = 4, kv_heads: int = 2, layers: int = 2) -> MaskedDiffusion:
    """A model without training whose attention is peaked."""
    model = MaskedDiffusion(DiffusionShape(vocab_size=20, heads=heads, kv_heads=kv_heads, layers=layers), seed=4)
    for block in model.blocks:
        block.q_proj.weight.data.mul_(6)
    return model.eval()


def prompts(batch: int, length: int) -> Tensor:
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def slow_lists(q: Tensor, k: Tensor, prompt: int, block: int, ratio: float, divisor: float) -> list[list[list[set]]]:
    """The rule, one list after the other: per row, head and query block the chosen key blocks."""
    found = []
    border, blocks = prompt // block, -(-k.shape[2] // block)
    for row in range(q.shape[0]):
        found.append([])
        for head in range(q.shape[1]):
            found[-1].append([])
            keys = k[row, head // (q.shape[1] // k.shape[1])].double()
            for start in range(0, q.shape[2], block):
                chosen = set()
                for first, last, since in ((0, border, 0), (border, blocks, border * block)):
                    logits = q[row, head, start : start + block].double() @ keys[since:].T / divisor
                    probs = logits.softmax(-1)
                    mean = {}
                    for b in range(first, last):
                        mean[b] = float(probs[:, b * block - since : (b + 1) * block - since].mean())
                    count = min(last - first, int((last - first) * ratio) + 1)
                    chosen |= set(sorted(mean, key=mean.__getitem__, reverse=True)[:count])
                found[-1][-1].append(chosen)
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize(("length", "prompt"), [(48, 24), (51, 22), (37, 0), (43, 41), (30, 30)])
def test_lists_equal_the_rule_written_out(heads: int, kv_heads: int, length: int, prompt: int) -> None:
    """Each part by its own softmax and count, heads apart, a short last block by the mean of what it has."""
    generator = torch.Generator().manual_seed(length)
    q, k = (3 * torch.randn(2, h, length, 6, generator=generator) for h in (heads, kv_heads))
    lists = SparseD(block=4, ratio=0.3).lists(q, k, prompt)
    border, blocks = prompt // 4, -(-length // 4)
    counts = [min(n, int(n * 0.3) + 1) if n else 0 for n in (border, blocks - border)]
    assert lists.shape == (2, heads, blocks, sum(counts))
    assert (lists.diff(dim=-1) > 0).all()
    assert ((lists < border).sum(-1) == counts[0]).all()
    assert ((lists >= border).sum(-1) == counts[1]).all()
    got = [[[set(x) for x in head] for head in row] for row in lists.tolist()]
    assert got == slow_lists(q, k, prompt, 4, 0.3, 6**0.5)


def test_logits_are_scaled_by_the_head_size() -> None:
    """Not by the number of heads, as in one release: means of probabilities rank otherwise then."""
    q, k = (3 * torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    got = [[[set(x) for x in head] for head in row] for row in SparseD(block=4).lists(q, k, 32).tolist()]
    assert got == slow_lists(q, k, 32, 4, 0.3, 32**0.5)
    assert got != slow_lists(q, k, 32, 4, 0.3, 2**0.5)


def test_a_prompt_that_draws_no_attention_keeps_its_share() -> None:
    """And one that draws all of it leaves the generated blocks theirs."""
    q = torch.ones(1, 1, 32, 4)
    for loud in (slice(0, 16), slice(16, 32)):
        k = torch.randn(1, 1, 32, 4, generator=torch.Generator().manual_seed(0))
        k[:, :, loud] += 100
        lists = SparseD(block=4, ratio=0.3).lists(q, k, 16)
        assert ((lists < 4).sum(-1) == 2).all()
        assert ((lists >= 4).sum(-1) == 2).all()


def test_block_means_are_means_of_probabilities() -> None:
    q, k = (torch.randn(2, h, 21, 6, generator=torch.Generator().manual_seed(h)) for h in (4, 2))
    means = block_means(q, k, 5)
    assert means.shape == (2, 4, 5, 5)
    sizes = torch.tensor([5.0, 5, 5, 5, 1])
    assert_close((means * sizes).sum(-1), torch.ones(2, 4, 5), 1e-6)
    probs = (q @ k.repeat_interleave(2, 1).mT / 6**0.5).softmax(-1)
    assert_close(means[:, :, 4, 4], probs[:, :, 20, 20], 1e-6)
    assert_close(means[:, :, 1, 2], probs[:, :, 5:10, 10:15].mean((2, 3)), 1e-6)


@pytest.mark.parametrize("method", [SparseD(ratio=1.0, block=4), SparseD(skip=1.0, block=4), SparseD(block=128)])
def test_everything_read_is_dense(method: SparseD) -> None:
    """To the bit: all blocks, all steps, or one block of all."""
    model, prompt = noisy(), prompts(3, 22)
    want = denoise(model, prompt, 21, 10, temperature=1.0)
    assert torch.equal(denoise(model, prompt, 21, 10, temperature=1.0, method=method), want)
    few = denoise(model, prompt, 21, 10, temperature=1.0, method=SparseD(block=4, ratio=0.0, skip=0.0))
    assert not torch.equal(few, want)


def test_full_lists_are_dense_attention() -> None:
    model, ids = noisy(), prompts(2, 43)
    every = torch.arange(11, dtype=torch.int32).expand(2, 4, 11, 11).contiguous()
    with torch.no_grad():
        got = model(ids, lambda layer, q, k: Selection(lists=every, q_block=4, k_block=4))
        assert_close(got, model(ids), 2e-6)


@pytest.mark.parametrize(
    ("steps", "skip", "first"), [(10, 0.2, 4), (10, 0.0, 2), (7, 0.5, 5), (20, 0.3, 8), (3, 1.0, 3)]
)
def test_dense_at_first_then_lists_that_stay(steps: int, skip: float, first: int) -> None:
    """Made from what the last dense step of this layer saw, and the same at each later step."""
    model, watched = noisy(layers=3), Watched(SparseD(block=4, skip=skip))
    denoise(model, prompts(2, 22), 23, steps, method=watched)
    assert sorted(watched.said) == list(range(steps))
    for step, said in watched.said.items():
        assert len(said) == 3
        for layer, selection in enumerate(said):
            if step < first:
                assert selection is ALL
                continue
            want = watched.method.lists(*watched.given[first - 1][layer], prompt=22)
            assert selection.lists is not None
            assert torch.equal(selection.lists, want)
            assert (selection.q_block, selection.k_block, selection.span) == (4, 4, None)
    if first < steps:
        lists = [x.lists for x in watched.said[steps - 1]]
        assert not torch.equal(lists[0], lists[1])
        assert not torch.equal(lists[1][:, 0], lists[1][:, 1])


def test_a_generation_knows_nothing_of_the_last_one() -> None:
    model, method = noisy(), SparseD(block=4)
    alone = denoise(model, prompts(1, 20), 20, 10, method=method)
    denoise(model, prompts(1, 27), 13, 6, method=method)
    assert torch.equal(denoise(model, prompts(1, 20), 20, 10, method=method), alone)


def test_rows_do_not_meet() -> None:
    model, prompt = noisy(), prompts(3, 22)
    together = denoise(model, prompt, 21, 10, method=SparseD(block=4))
    alone = torch.cat([denoise(model, row[None], 21, 10, method=SparseD(block=4)) for row in prompt])
    assert torch.equal(together, alone)


def test_later_tokens_are_read_too() -> None:
    """No causal mask: blocks behind a query's own are on its list, and what stands there reaches its output."""
    model, watched = noisy(), Watched(SparseD(block=4, skip=0.0))
    denoise(model, prompts(1, 20), 20, 10, method=watched)
    lists = watched.said[9][0].lists
    own = torch.arange(10).view(1, 1, -1, 1)
    assert (lists > own).any()
    geometry = Geometry(1, 40, 40, first=torch.full((1, 1), 40))
    pairs = watched.said[9][0].pairs(geometry, 4)
    assert (pairs == 40 * 4 * (2 + 2)).all()  # of 5 blocks each: int(5 * 0.3) + 1


@dataclass(frozen=True, kw_only=True)
class Opposite(SparseD):
    """Reads as many blocks, those that queries turned around look at."""

    def lists(self, q: Tensor, k: Tensor, prompt: int) -> Tensor:
        return super().lists(-q, k, prompt)


def test_a_trained_model_keeps_what_it_can() -> None:
    """At the paper's settings, where about a third of all pairs is read, and with all steps sparse that can be."""
    model, ids = trained(120), copies(64, torch.Generator().manual_seed(9))

    def right(method: SparseD | None) -> float:
        got = denoise(model, ids[:, :HALF], HALF, 12, method=method)
        return float((got == ids)[:, HALF:].double().mean())

    dense = right(None)
    assert dense > 0.999
    assert right(SparseD(block=3)) > dense - 0.01
    assert right(SparseD(block=3, skip=0.0)) > dense - 0.02
    assert right(Opposite(block=3)) < 0.7


def test_defaults_are_the_papers() -> None:
    method = SparseD()
    assert (method.ratio, method.skip, method.block) == (0.3, 0.2, 128)


@pytest.mark.parametrize("bad", [{"ratio": -0.1}, {"ratio": 1.1}, {"skip": -0.1}, {"skip": 1.5}, {"block": 0}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        SparseD(**bad)
