"""HardKuma gates: their probabilities, their gradients, what closed heads see, and the number that opens."""

from __future__ import annotations

import math

import pytest
import torch
from tests.closeness import assert_close
from tests.heads.test_gates import texts
from tests.heads.test_tap import tokens
from torch import Tensor

from foveate.errors import BadArgument
from foveate.heads.gates import gated, unchanged
from foveate.heads.hardkuma import HandedDown, HardKuma, KumaRecipe, Stretch, learn_open_heads
from foveate.heads.tap import Tap, Tapped, frozen, recomputed
from foveate.models import ModelShape, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.4, 2.0), (3.0, 0.7)])
def test_masses_and_mean_are_those_of_draws(alpha: float, beta: float, seed: int) -> None:
    stretch, a, b = Stretch(), *torch.tensor([alpha, beta], dtype=torch.float64)
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(seed)).double()
    z = stretch.draw(u, a, b)
    closed = 1 - (1 - (0.1 / 1.2) ** alpha) ** beta
    opened = (1 - (1.1 / 1.2) ** alpha) ** beta
    assert float((z == 0).double().mean()) == pytest.approx(closed, abs=5e-3)
    assert float((z == 1).double().mean()) == pytest.approx(opened, abs=5e-3)
    assert float(stretch.opened(a, b)) == pytest.approx(1 - closed, abs=1e-9)
    assert float(stretch.mean(a, b)) == pytest.approx(float(z.mean()), abs=5e-3)


def test_gradients_reach_alpha_and_beta(seed: int) -> None:
    """Wherever a draw is neither 0 nor 1, and by P(z > 0) everywhere."""
    gates = HardKuma(64, 8, 0, seed, CPU, 0.1, Stretch())
    z = gates.draw()
    (grad,) = torch.autograd.grad(z.sum(), gates.logs)
    inside = (z > 0) & (z < 1)
    assert inside.any()
    assert (grad[:, inside].abs() > 0).all()
    assert (grad[:, ~inside] == 0).all()
    (grad,) = torch.autograd.grad(gates.excess(), gates.logs)
    assert (grad.abs() > 0).all()
    assert torch.isfinite(grad).all()


def test_the_multiplier_climbs_while_too_many_are_open() -> None:
    gates = HardKuma(10, 4, 2, 0, CPU, 0.5, Stretch())
    excess = (2 + 8 * (1 - 0.1 / 1.2) - 4) / 10
    assert float(gates.excess().detach()) == pytest.approx(excess)
    gates.settle()
    assert gates.multiplier == pytest.approx(0.5 * excess)
    gates.logs.data[0] = -9.0  # all but closed
    for _ in range(9):
        gates.settle()
    assert gates.multiplier == 0.0
    assert gates.final()[:2].tolist() == [1.0, 1.0]
    assert gates.draw()[:2].tolist() == [1.0, 1.0]


class Fixed(HardKuma):
    """Gates that are drawn as given."""

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor(values, requires_grad=True)
        super().__init__(len(values), 1, 0, 0, CPU, 0.1, Stretch())

    def draw(self) -> Tensor:
        return self.values


def lists_by_loops(layer: Tapped, keep: int, recent: int) -> Tensor:
    """bool [1, Hs, N, N]: the tokens each row of a kv head looks at most, newest ones first of all."""
    stores, n = layer.k.shape[1], layer.k.shape[2]
    group = layer.q.shape[1] // stores
    out = torch.zeros(1, stores, n, n, dtype=torch.bool)
    for head in range(stores):
        for i in range(n):
            mass = torch.stack(
                [(layer.k[0, head, : i + 1] @ layer.q[0, head * group + g, i] * layer.scale).softmax(0)
                 for g in range(group)]
            ).amax(0)  # fmt: skip
            mass[max(0, i + 1 - recent) :] = torch.inf
            out[0, head, i, mass.topk(min(keep, i + 1)).indices] = True
    return out


def test_closed_heads_see_what_came_down(seed: int) -> None:
    """Layer by layer, head index by head index, against loops; and again when layers are run twice."""
    model, ids = tiny("llama", heads=6, kv_heads=2), tokens(seed, 1, 31)
    shape, values = ModelShape.of(model), [1.0, 1.0, 0.9, 0.2, 0.0, 0.3]
    gates, keep, recent = Fixed(values), math.ceil(0.2 * 31), 2
    handed: list[Tensor] = []

    def serve(layer: Tapped) -> Tensor:
        best = lists_by_loops(layer, keep, recent)
        seen = best if not handed else handed[-1]
        z = torch.tensor(values[2 * layer.shape.index :][:2])
        handed.append(torch.where((z > 0.5).view(1, -1, 1, 1), best, seen))
        k, v, mask, z = (x.repeat_interleave(3, dim=d) for x, d in ((layer.k, 1), (layer.v, 1), (seen, 1), (z, 0)))
        scores = layer.q @ k.transpose(-1, -2) * layer.scale
        causal = torch.ones(31, 31).tril().bool()
        whole, part = (scores.masked_fill(~m, -torch.inf).softmax(-1) @ v for m in (causal, mask & causal))
        return z.view(1, -1, 1, 1) * whole + (1 - z.view(1, -1, 1, 1)) * part

    with torch.no_grad(), Tap(model, serve):
        want = model.model(ids).last_hidden_state
    drawn = dict(enumerate(gates.draw().split(2)))
    other = HandedDown(shape, (0, 1, 2), gates, 0.2, recent)
    grads = []
    with frozen(model):
        with gated(model, ids, drawn, other) as hidden:
            assert_close(hidden.detach(), want, 1e-5)
            grads.append(torch.autograd.grad(hidden.square().sum(), gates.values)[0])
        drawn = dict(enumerate(gates.draw().split(2)))
        with recomputed(model), gated(model, ids, drawn, other) as hidden:
            grads.append(torch.autograd.grad(hidden.square().sum(), gates.values)[0])
    assert_close(grads[1], grads[0], 1e-5)
    with torch.no_grad():
        goal, _ = unchanged(model, ids, frozenset())
    assert not torch.allclose(goal, want, atol=1e-3)


def test_as_many_open_as_asked_and_the_needed_one_among_them() -> None:
    """Twelve heads, three of them open: the first layer's two, and the one whose list would be of no use to it."""
    model = tiny("llama", layers=6, heads=4, kv_heads=2)
    for index, layer in enumerate(model.model.layers):
        if index not in (0, 3):
            layer.self_attn.o_proj.weight.data.mul_(0.02)
    head = model.model.layers[3].self_attn.o_proj.weight.data
    head[:, :32] *= 0.02  # kv head 0 of layer 3 says little as well: head 1 is the one
    recipe = KumaRecipe(steps=60, lr=0.3, open=0.25, seen=0.05, climb=1.0)
    learned = learn_open_heads(model, texts(120), recipe, recent=1, seed=3)
    gates = torch.tensor(learned.gates)
    assert int((gates > 0.5).sum()) == 3, gates
    assert gates[0].tolist() == [1.0, 1.0]
    assert gates[3, 1] > 0.5
    assert learned.losses[-1] >= 0


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": 0.0}, {"open": 0.0}, {"seen": 1.5}, {"climb": 0.0}])
def test_bad_recipes(bad: dict) -> None:
    with pytest.raises(BadArgument, match=next(iter(bad))):
        KumaRecipe(**bad)


def test_a_stretch_reaches_beyond_both_ends() -> None:
    with pytest.raises(BadArgument, match="stretch"):
        Stretch(0.0, 1.1)
