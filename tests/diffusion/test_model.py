"""The masked-diffusion model sees in both directions, and its loss and its sampler are what they say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.closeness import LIMIT, assert_close
from tests.diffusion.toy import HALF, copies, trained
from torch import Tensor

import foveate
from foveate.attention import Geometry, Selection, attend
from foveate.diffusion import DiffusionShape, MaskedDiffusion, denoise, masked_loss


def plain(model: MaskedDiffusion, ids: Tensor) -> Tensor:
    """The model written out: rotation by complex numbers, softmax over all keys."""
    shape, x = model.shape, model.embed(ids)
    half = shape.head_dim // 2
    speed = shape.theta ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones(1).double(), torch.arange(ids.shape[1]).double()[:, None] * speed)
    for block in model.blocks:
        h = block.before(x)
        made = (p(h) for p in (block.q_proj, block.k_proj, block.v_proj))
        q, k, v = (t.unflatten(2, (-1, shape.head_dim)).transpose(1, 2) for t in made)
        q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
        q, k = (torch.cat([t.real, t.imag], -1) for t in (q, k))
        k, v = (t.repeat_interleave(shape.heads // t.shape[1], 1) for t in (k, v))
        out = (q @ k.mT / math.sqrt(shape.head_dim)).softmax(-1) @ v
        x = x + block.o_proj(out.transpose(1, 2).flatten(2))
        h = block.between(x)
        x = x + block.down(F.silu(block.gate(h)) * block.up(h))
    return model.head(model.norm(x))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 1)])
def test_every_token_sees_every_other(heads: int, kv_heads: int) -> None:
    model = MaskedDiffusion(DiffusionShape(vocab_size=11, heads=heads, kv_heads=kv_heads, head_dim=6), seed=3).double()
    ids = torch.randint(0, 12, (3, 37), generator=torch.Generator().manual_seed(0))
    # Angles are made in float32, as for any model, which is all that keeps the two apart.
    assert_close(model(ids).detach(), plain(model, ids).detach(), 2e-6)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 12
    assert (model(other)[:, 0] - model(ids)[:, 0]).abs().amax() > 1e-4


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [None, 5])
def test_attend_serves_both_directions(kv_heads: int, block: int | None) -> None:
    """A first query behind the last key lifts causality, for dense reads and for lists, and gradients go through."""
    generator = torch.Generator().manual_seed(kv_heads)
    q, k, v = (torch.randn(2, h, 23, 8, generator=generator, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    geometry = Geometry(2, 23, 23, first=torch.full((1, 1), 23))
    selection = foveate.attention.ALL
    mask = torch.ones(2, 4, 23, 23, dtype=torch.bool)
    if block is not None:
        lists = torch.stack([torch.randperm(5, generator=generator)[:3].sort().values for _ in range(2 * 4 * 5)])
        lists = lists.view(2, 4, 5, 3).int()
        selection = Selection(lists=lists, q_block=block, k_block=block)
        inside = (lists[..., None] == torch.arange(5)).any(3)
        mask = inside.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :23, :23]
    assert torch.equal(selection.mask(geometry, 4), mask)
    for x in (q, k, v):
        x.requires_grad_()
    wide = [x.repeat_interleave(4 // kv_heads, 1) for x in (k, v)]
    want = (q @ wide[0].mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ wide[1]
    got = attend(q, k, v, selection, geometry).out
    assert_close(got.detach(), want.detach(), LIMIT[torch.float64])
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (got, want)), strict=True):
        assert_close(a, b, 10 * LIMIT[torch.float64])


def test_loss_is_a_mean_per_answer_token() -> None:
    """Where all logits are equal each token costs log(vocabulary), however many are hidden; prompts cost nothing."""
    model = MaskedDiffusion(DiffusionShape(vocab_size=7, layers=1, heads=1))
    model.head.weight.data.zero_()
    ids = torch.randint(0, 7, (4000, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = masked_loss(model, ids, 4, torch.Generator().manual_seed(1))
    assert abs(float(loss) / math.log(7) - 1) < 0.05
    for prompt in (-1, 12):
        with pytest.raises(foveate.BadArgument, match="prompt"):
            masked_loss(model, ids, prompt, torch.Generator())


def test_only_hidden_answer_tokens_are_hidden_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MaskedDiffusion(DiffusionShape(vocab_size=7, layers=1, heads=1))
    given: list[Tensor] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids: (given.append(ids), forward(ids))[1])
    ids = torch.randint(0, 7, (500, 12), generator=torch.Generator().manual_seed(0))
    masked_loss(model, ids, 5, torch.Generator().manual_seed(1))
    hidden = given[0] == model.shape.mask_id
    assert not hidden[:, :5].any()
    assert torch.equal(given[0][~hidden], ids[~hidden])
    share = hidden[:, 5:].float().mean(1)
    assert abs(share.mean() - 0.5) < 0.05  # levels are spread evenly from none to all
    assert (share == 0).any()
    assert (share == 1).any()


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_each_step_shows_the_surest(steps: int) -> None:
    model = MaskedDiffusion(DiffusionShape(vocab_size=9), seed=5).eval()
    prompt = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([prompt, torch.full((3, 7), 9)], 1)
    counts = {1: [7], 4: [2, 2, 2, 1], 7: [1] * 7}[steps]
    with torch.no_grad():
        for count in counts:
            probs = model(ids).softmax(-1)
            for row in range(3):
                masked = [i for i in range(12) if ids[row, i] == 9]
                for i in sorted(masked, key=lambda i, r=row: -float(probs[r, i].max()))[:count]:
                    ids[row, i] = probs[row, i].argmax()
    assert torch.equal(denoise(model, prompt, 7, steps), ids)


def test_generation_is_seeded_and_keeps_the_prompt() -> None:
    model = MaskedDiffusion(DiffusionShape(vocab_size=50), seed=5).eval()
    prompt = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    once, again, other = (denoise(model, prompt, 8, 4, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(once[:, :5], prompt)
    assert int(once.max()) < 50
    assert denoise(model, prompt[:, :0], 8, 4).shape == (2, 8)


def test_weights_follow_the_seed_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (MaskedDiffusion(DiffusionShape(vocab_size=5), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.embed.weight, two.embed.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_learns_to_copy() -> None:
    model = trained(80)
    ids = copies(64, torch.Generator().manual_seed(9))
    got = denoise(model, ids[:, :HALF], HALF, 8)
    assert (got == ids).double().mean() > 0.99


@pytest.mark.parametrize(
    "bad", [{"vocab_size": 0}, {"layers": 0}, {"heads": 0}, {"kv_heads": 3}, {"kv_heads": 0}, {"head_dim": 5}]
)
def test_bad_shapes(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        DiffusionShape(**{"vocab_size": 5} | bad)


@pytest.mark.parametrize("bad", [{"length": 0}, {"steps": 0}, {"steps": 9}, {"temperature": -0.1}])
def test_bad_generations(bad: dict) -> None:
    model = MaskedDiffusion(DiffusionShape(vocab_size=5))
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        denoise(model, torch.zeros(1, 2, dtype=torch.long), **{"length": 8, "steps": 4} | bad)
