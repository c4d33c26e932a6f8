"""Tokens in a fitted basis: rows of bits, what they lose and what they weigh."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.closeness import assert_close, relative_rms
from torch import Tensor

from foveate.cache import Column, PackedColumn, chained
from foveate.cache.column import fitted
from foveate.cache.quantised import Quantised
from foveate.cache.transform import MOST, SCALE, Transform, TransformSide, _joined, _parted, levels, losses, tables
from foveate.errors import Refused
from foveate.heads.transform_coding import FLOOR, basis, held, transform, water_filling


def made(heads: int, dim: int, row: int, seed: int = 0) -> tuple[Transform, Tensor, Tensor]:
    """A transform fitted to normal keys, their covariance and their mean, both per head."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, dim)
    mean = 3 * torch.randn(heads, dim, generator=generator, dtype=torch.float64)
    look = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)
    covariance = mix @ mix.mT
    tensors = held(0, "keys", mean, covariance, look @ look.mT)
    return transform(tensors["0.keys"], tensors["0.keys.numbers"], row), covariance, mean


def drawn(covariance: Tensor, mean: Tensor, heads: Tensor, n: int, seed: int = 1) -> Tensor:
    """Normal tokens [P, n, D] of each pair's head."""
    root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(covariance.shape[-1]))
    x = torch.randn(len(heads), n, covariance.shape[-1], generator=torch.Generator().manual_seed(seed)).double()
    return x @ root[heads].mT + mean[heads].unsqueeze(1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_give_back_fields_of_any_width(data: st.DataObject) -> None:
    heads, dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 8, 13]))
    widths = st.lists(st.integers(0, MOST), min_size=dim, max_size=dim)
    bits = torch.tensor([data.draw(widths) for _ in range(heads)])
    eye = torch.eye(dim).expand(heads, dim, dim)
    code = Transform(torch.zeros(heads, dim), eye, torch.ones(heads, dim), bits)
    assert code.row == -(-(SCALE + int(bits.sum(1).max())) // 8)
    at = torch.tensor(data.draw(st.lists(st.integers(0, heads - 1), min_size=1, max_size=4)))
    widest = torch.cat([torch.full((heads, 1), SCALE), bits], 1)[at].unsqueeze(1)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    n = data.draw(st.integers(1, 5))
    fields = torch.randint(0, 256, (len(at), n, 1 + dim), generator=generator) % (1 << widest)
    place = code.on(fields.device, torch.float32)
    rows = _joined(fields, place, at, code.row)
    assert rows.shape == (len(at), n, code.row)
    assert rows.dtype == torch.uint8
    assert torch.equal(_parted(rows, place, at), fields)


@pytest.mark.parametrize("row", [8, 14, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_one_that_bits_were_chosen_by(row: int, dtype: torch.dtype) -> None:
    """On normal tokens: sum over components of energy times the loss of a normal number at its bits."""
    code, covariance, mean = made(3, 32, row)
    heads = torch.tensor([2, 0, 1, 1])
    x = drawn(covariance, mean, heads, 3000).to(dtype)
    side = TransformSide(code, sink=0, flush=1)
    back = side.unpack(side.pack(x, heads), torch.float32, heads)
    y = ((x.double() - back.double()) @ code.analysis[heads].double()).square().mean(1)
    energy = code.deviation.square()[heads]
    predicted = (energy * torch.tensor(losses())[code.bits[heads]]).sum(1)
    # The best of four scales makes a token fit better, the more so the more bits it has.
    ratio = y.sum(1) / predicted
    assert (ratio < 1.05).all(), ratio
    assert (ratio > 0.5).all(), ratio


def test_the_basis_is_of_the_metric() -> None:
    """Components are uncorrelated, errors in them cost alike, and what queries do not see has the least of them."""
    generator = torch.Generator().manual_seed(3)
    root, look = (torch.randn(2, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    covariance, metric = root @ root.mT, look @ look.mT
    codes, step, deviation = basis(covariance, metric)
    analysis = codes.double() * step.double().unsqueeze(1)
    mixed = analysis.mT @ covariance @ analysis
    assert_close(mixed.diagonal(dim1=1, dim2=2).sqrt(), deviation, 1e-9)
    scaled = metric / metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + FLOOR * torch.eye(16)
    error = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    seen = torch.linalg.inv(analysis)
    want = torch.einsum("hnd,hde,hne->hn", error @ seen, scaled, error @ seen)
    # 8 bits of the basis leave the components nearly orthogonal in the metric.
    assert relative_rms(error.square().sum(-1), want) < 0.1
    spread = mixed / (deviation.unsqueeze(1) * deviation.unsqueeze(2))
    assert (spread - torch.eye(16)).abs().max() < 0.2
    flat = torch.diag_embed(torch.tensor([[1.0, 1e-6]], dtype=torch.float64))
    eye = torch.eye(2, dtype=torch.float64)[None]
    _, _, size = basis(eye, flat)
    assert size[0, 1].square() < 0.02 * size[0, 0].square()


def test_water_filling_is_optimal_and_leaves_small_components_out() -> None:
    energy = torch.tensor([[100.0, 3.0, 1.0, 1e-4]])
    loss = losses()
    for total in range(8):
        (bits,) = water_filling(energy, total)
        assert int(bits.sum()) == total
        best = min(
            sum(float(e) * loss[b] for e, b in zip(energy[0], split, strict=True))
            for split in torch.cartesian_prod(*[torch.arange(9)] * 4).tolist()
            if sum(split) == total
        )
        assert sum(float(e) * loss[b] for e, b in zip(energy[0], bits, strict=True)) == pytest.approx(best)
    assert water_filling(energy, 7)[0, 3] == 0
    assert (water_filling(energy, 99) == MOST).all()


def test_levels_are_those_of_lloyd_and_max() -> None:
    """Against the table of Max (1960): levels of 1 to 3 bits, losses of 1 to 4."""
    for bits, want in ((1, [0.7980]), (2, [0.4528, 1.510]), (3, [0.2451, 0.7560, 1.344, 2.152])):
        assert levels(bits)[1 << (bits - 1) :].tolist() == pytest.approx(want, abs=2e-3)
    assert losses()[:5] == pytest.approx((1, 0.3634, 0.1175, 0.03454, 0.009497), abs=5e-5)
    borders, flat = tables()
    assert (borders.diff() > 0).all()
    assert len(flat) == 511
    assert all(a - b > b - c for a, b, c in zip(losses(), losses()[1:], losses()[2:], strict=False))


def test_first_tokens_are_exact_wherever_they_lie() -> None:
    code, covariance, mean = made(2, 16, 7)
    heads = torch.tensor([0, 1])
    x = drawn(covariance, mean, heads, 9).to(torch.bfloat16)
    x[:, 0] = 0  # like the value of a first token
    x[:, 7] = x[:, 1]
    side = TransformSide(code, sink=3, flush=1)
    learned = fitted(side, x, torch.tensor([9, 9]), None, heads)
    assert [t.dtype for t in learned] == [torch.int16, torch.bfloat16]
    back = side.unpack(side.pack(x, *learned), torch.bfloat16, *learned)
    for place in (0, 1, 2, 7):
        assert torch.equal(back[:, place], x[:, place])
    assert not torch.equal(back[:, 3:7], x[:, 3:7])
    # Cropped to nothing and written anew, a slot holds what it was given.
    other = drawn(covariance, mean, heads, 2, seed=5).to(torch.bfloat16)
    assert relative_rms(side.unpack(side.pack(other, *learned), torch.bfloat16, *learned).float(), other.float()) > 1e-3


def test_loud_and_silent_tokens_have_a_scale() -> None:
    code, covariance, mean = made(1, 32, 20)
    heads = torch.tensor([0])
    x = drawn(covariance, mean, heads, 200)
    shape = (x - mean[0]).float()
    side = TransformSide(code, sink=0, flush=1)
    errors = {}
    for factor in (0.1, 1.0, 5.0):
        y = (shape * factor + mean[0]).float()
        back = side.unpack(side.pack(y, heads), torch.float32, heads)
        errors[factor] = relative_rms(back - mean[0], y - mean[0])
    assert max(errors.values()) < 1.3 * min(errors.values()), errors
    zero = side.unpack(side.pack(mean[:, None].float(), heads), torch.float32, heads)
    assert relative_rms(zero, mean[:, None].float()) < 0.05


def test_a_column_counts_rows_first_tokens_and_tail() -> None:
    code, covariance, mean = made(2, 16, 7)
    heads = torch.tensor([0, 1, 0, 1])
    x = drawn(covariance, mean, heads, 37).to(torch.bfloat16)
    side = TransformSide(code, sink=2, flush=8)
    learned = fitted(side, x, torch.full((4,), 37), None, heads)
    column = PackedColumn(Column(x.clone()), side, torch.bfloat16, learned)
    column.settle(torch.full((4,), 37).numpy())
    assert column.packed.tolist() == [32] * 4
    assert column.body[0].numel() == 4 * 32 * 7
    tail = column.tail.data.numel() * 2
    assert column.nbytes == 4 * 32 * 7 + tail + 4 * 2 + 4 * 2 * 16 * 2
    got = column.read(37)
    assert torch.equal(got[:, 32:], x[:, 32:])
    assert torch.equal(got[:, :2], x[:, :2])
    alone = side.unpack(
        side.pack(x[1:2, :32], heads[1:2], learned[1][1:2]), torch.bfloat16, heads[1:2], learned[1][1:2]
    )
    assert torch.equal(got[1:2, :32], alone)


def test_it_packs_nothing_that_another_format_leaves() -> None:
    code, _, _ = made(1, 16, 7)
    side = TransformSide(code, sink=2, flush=8)
    with pytest.raises(Refused, match="whole tokens"):
        chained(Quantised(4, 4, False, 0, 1), side)
