"""Radial Attention: must-hold tests of its card, and its pattern on a text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching
from torch import Tensor

import foveate
from foveate.methods import Radial
from foveate.methods.policies.decay import band_width, causal_blocks, is_kept, radial_mask

SMALL = {"frame": 8, "block": 4, "dense_layers": 0, "decay": 0.5}
FULL = {"decay": 1e9, "frame": 1024}


def by_hand(frames: int, frame: int, block: int, decay: float, sink: bool) -> Tensor:
    """The paper's rule, token by token."""
    n = frames * frame
    mask = torch.zeros(n, n, dtype=torch.bool)
    for a in range(n):
        for b in range(n):
            apart, row = abs(a // frame - b // frame), abs(a % frame - b % frame)
            group = 0
            while 2**group <= apart:
                group += 1
            level = 1
            while level <= frame:
                level *= 2
            width = frame if apart <= 1 else max(int(level / 2**group * decay), block)
            seen = row <= width
            if apart > 1 and level / 2**group < block:
                seen &= apart % int(block / (level / 2**group)) == 0
            mask[a, b] = seen or (sink and b < frame)
    return mask


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("frames", "frame", "block", "decay"), [(9, 7, 2, 1.0), (12, 8, 4, 0.5), (5, 6, 1, 0.3)])
def test_mask_is_the_papers(frames: int, frame: int, block: int, decay: float, sink: bool) -> None:
    assert torch.equal(radial_mask(frames, frame, block, decay, sink), by_hand(frames, frame, block, decay, sink))


def test_mask_is_symmetric_but_for_the_first_frame() -> None:
    mask = radial_mask(17, 8, 4, 0.7, sink=False)
    assert torch.equal(mask, mask.T)
    seen = radial_mask(17, 8, 4, 0.7)
    assert torch.equal(seen[:, 8:], mask[:, 8:])
    assert seen[:, :8].all()


def test_frames_on_the_diagonal_are_dense() -> None:
    mask = radial_mask(9, 8, 2, 0.2, sink=False)
    for i in range(9):
        for j in (i - 1, i, i + 1):
            if 0 <= j < 9:
                assert mask[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].all()


def test_widths_never_grow_with_distance_and_end_at_a_block() -> None:
    widths = [band_width(apart, 512, 1.0, 16) for apart in range(600)]
    assert widths == sorted(widths, reverse=True)
    assert set(widths[300:]) == {16}
    assert [band_width(d, 512, 1.0, 16) for d in (1, 2, 3, 4, 7, 8)] == [512, 256, 256, 128, 128, 64]
    assert [d for d in range(600) if d > 64 and is_kept(d, 512, 16)][:3] == [66, 68, 70]


def test_a_large_decay_is_dense() -> None:
    assert radial_mask(3, 16, 4, 1e9, sink=False).all()
    assert torch.equal(causal_blocks(9, 32, 4, 1e9, False), torch.ones(9, 9, dtype=torch.bool).tril())


def pairs(frames: int, frame: int, block: int) -> int:
    """How many pairs the mask has, frame distance by frame distance."""
    total = 0
    for apart in range(frames):
        if is_kept(apart, frame, block):
            width = min(band_width(apart, frame, 1.0, block), frame - 1)
            total += (frames - apart) * (2 if apart else 1) * (frame * (2 * width + 1) - width * (width + 1))
    return total


@pytest.mark.parametrize(("frame", "block"), [(64, 1), (512, 1), (512, 16)])
def test_pairs_grow_as_n_log_n(frame: int, block: int) -> None:
    """Twice the frames: 2 (1 + 1 / log2 F) times the pairs, the closer the more frames; dense attention has 4 times."""
    assert pairs(24, 16, 2) == int(radial_mask(24, 16, 2, 1.0, sink=False).sum())
    away = []
    for frames in (32, 64, 128, 256, 512):
        grown = pairs(2 * frames, frame, block) / pairs(frames, frame, block)
        away.append(grown / (2 * (1 + 1 / (frames.bit_length() - 1))))
    assert 1.0 < away[-1] < 1.07
    assert max(away) == away[0] < 1.11
    counts = [int(causal_blocks(n, 512, 64, 1.0, False).sum()) for n in (512, 1024, 2048, 4096)]
    growth = [b / a for a, b in pairwise(counts)]
    assert growth == sorted(growth, reverse=True)
    assert growth[-1] < 2.4


@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_blocks_lose_no_pair_of_the_mask(decay: float) -> None:
    """And are those of a pattern that forgets no shape: another length asked for in between changes nothing."""
    for blocks in (13, 5, 13):
        mask = radial_mask(7, 16, 4, decay).tril()
        tokens = causal_blocks(blocks, 16, 4, decay, True).repeat_interleave(4, 0).repeat_interleave(4, 1)
        n = min(7 * 16, 4 * blocks)
        assert tokens.shape == (4 * blocks, 4 * blocks)
        assert not (mask[:n, :n] & ~tokens[:n, :n]).any()
        coarse = mask[:n, :n].unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).any(3).any(1)
        assert torch.equal(causal_blocks(blocks, 16, 4, decay, True)[: n // 4, : n // 4], coarse)


def test_energy_that_decays_is_mostly_kept() -> None:
    """Attention that falls off by the power of the distance in time and in the frame: far more mass than pairs."""
    n, frame = 512, 16
    time, place = torch.arange(n) // frame, torch.arange(n) % frame
    energy = torch.exp(-0.5 * (time[:, None] - time).abs() - 0.5 * (place[:, None] - place).abs())
    mask = radial_mask(n // frame, frame, 2, 1.0, sink=False)
    kept = float((energy * mask).sum() / energy.sum())
    assert kept > 0.95
    assert float(mask.float().mean()) < 0.45


def run(ids: Tensor, model: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
    with watching() as seen:
        applied(model or llama(), Radial(**{**SMALL, **kwargs}), ids)
    return seen


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("length", [61, 64])
def test_a_prompt_is_dense_attention_under_the_mask(length: int, heads: int, kv_heads: int) -> None:
    model, ids = llama(layers=1, heads=heads, kv_heads=kv_heads), prompt(2, length)
    read = run(ids, model)[0]
    mask = causal_blocks(16, 8, 4, 0.5, True).repeat_interleave(4, 0).repeat_interleave(4, 1)[:length, :length].tril()
    assert 0.2 < float(mask.sum()) / (length * (length + 1) / 2) < 0.95
    (band,) = read["store"].bands
    grids = (x.view(2, kv_heads, length, -1) for x in (band.keys(), band.values()))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in grids)
    logit = (read["q"] @ k.mT * read["how"].scale).masked_fill(~mask, -torch.inf)
    assert_close(read["result"].out, logit.softmax(-1) @ v, 1e-5)


def test_pieces_of_any_size_read_the_same() -> None:
    model, ids = llama(), prompt(1, 61)
    want, _ = applied(model, Radial(**SMALL), ids)
    for size in (1, 3, 8, 16):
        got, _ = applied(model, Radial(**SMALL), ids, chunks=size)
        assert_close(got, want, TOLERANCE)


def test_first_layers_short_prompts_and_decode_are_dense() -> None:
    model, ids = llama(), prompt(1, 61)
    with watching() as seen:
        applied(model, Radial(**{**SMALL, "dense_layers": 2}), ids, prompt(1, 2, seed=1))
    assert [r["parts"].dense for r in seen] == [True, True, False] + [True] * 6
    assert all(r["parts"].dense for r in run(prompt(1, 16)))  # two frames
    want, _ = logits(model, ids)
    got, _ = applied(model, Radial(**{**SMALL, "dense_layers": 3}), ids)
    assert_close(got, want, TOLERANCE)


def test_defaults_are_the_papers() -> None:
    method = Radial()
    assert (method.block, method.decay, method.sink, method.dense_layers) == (128, 1.0, True, 1)


@pytest.mark.parametrize("bad", [{"block": 0}, {"frame": 6}, {"decay": 0.0}, {"dense_layers": -1}, {"budget": 0.5}])
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        Radial(**{**SMALL, **bad})
