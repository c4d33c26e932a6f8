"""Routers: exactly k, the gradients of straight-through gates, and losses on cases worked by hand."""

import math

import pytest
import torch
from torch import nn

from foveate.errors import BadArgument, FoveateError
from foveate.layers.routing import (
    Routed,
    Routing,
    TwoStageRouter,
    balance_loss,
    norm_scores,
    routing_losses,
    straight_through,
    top_k,
    z_loss,
)


def test_top_k_takes_exactly_k_even_of_equal_scores():
    scores = torch.randn(3, 5, 7)
    assert (top_k(scores, 3).sum(-1) == 3).all()
    assert (top_k(torch.zeros(4, 7), 2).sum(-1) == 2).all()
    assert torch.equal(top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2), torch.tensor([[False, True, True]]))
    for k in (0, 8):
        with pytest.raises(BadArgument, match="1 to 7"):
            top_k(scores, k)


def test_straight_through_is_hard_forward_and_soft_backward():
    logits = torch.randn(11, 5, requires_grad=True)
    soft = logits.softmax(-1)
    hard = top_k(soft, 2)
    gate = straight_through(hard, soft)
    assert torch.equal(gate, hard.float())
    weight = torch.randn(11, 5)
    (got,) = torch.autograd.grad((gate * weight).sum(), logits, retain_graph=True)
    (want,) = torch.autograd.grad((soft * weight).sum(), logits)
    torch.testing.assert_close(got, want)
    assert got.abs().min() > 0


def test_balance_loss_of_an_even_router_is_k_over_the_experts():
    experts, k = 8, 3
    probabilities = torch.full((experts, experts), 1 / experts)
    chosen = torch.stack([torch.arange(experts).roll(i) < k for i in range(experts)])
    assert balance_loss(probabilities, chosen).item() == pytest.approx(k / experts)
    assert experts * balance_loss(probabilities, chosen).item() == pytest.approx(k)


def test_balance_and_z_loss_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    chosen = torch.tensor([[True, False, False], [True, False, False]])
    assert balance_loss(probabilities, chosen).item() == pytest.approx(0.6)
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


@pytest.mark.parametrize(("shared", "routed", "k"), [(4, 4, 4), (3, 5, 2), (1, 6, 3), (0, 7, 5)])
def test_equal_scores_give_every_working_head_the_gate_one(shared, routed, k):
    router = TwoStageRouter(16, shared, routed)
    within, among, _ = router(torch.randn(2, 9, 16), k)
    torch.testing.assert_close(within, torch.ones(2, 9, shared))
    assert (among.count_nonzero(dim=-1) == k).all()
    torch.testing.assert_close(among[among > 0], torch.ones(2 * 9 * k))
    assert (router.within is None) == (shared <= 1)


def test_two_stage_gates_follow_the_formula():
    router = TwoStageRouter(16, 3, 5)
    for linear in (router.parts, router.within, router.among):
        nn.init.normal_(linear.weight, std=0.5)
    x = torch.randn(7, 16)
    within, among, logits = router(x, 2)
    for t in range(7):
        a1, a2 = (x[t] @ router.parts.weight.T).softmax(-1)
        s = (x[t] @ router.within.weight.T).softmax(-1)
        r = (x[t] @ router.among.weight.T).softmax(-1)
        best = r.topk(2).indices
        torch.testing.assert_close(within[t], 2 * a1 * 3 * s)
        want = torch.zeros(5)
        want[best] = 2 * a2 * 2 * r[best] / r[best].sum()
        torch.testing.assert_close(among[t], want)
        torch.testing.assert_close(logits[t], x[t] @ router.among.weight.T)


def test_norm_scores_are_lengths_over_their_deviation():
    q = torch.randn(2, 5, 6, 8)
    got = norm_scores(q)
    lengths = q.square().sum(-1).sqrt()
    torch.testing.assert_close(got, lengths / lengths.std(-1, keepdim=True))
    torch.testing.assert_close(norm_scores(3 * q), got)
    assert norm_scores(q[:, :, :1]).isfinite().all()


class _Even(Routed):
    def forward(self, x):
        soft = x.softmax(-1)
        chosen = top_k(soft, 1)
        self.note(Routing(soft, chosen, soft, chosen, x))


def test_losses_are_of_one_forward_and_asked_once():
    model = nn.ModuleList([_Even(), _Even()])
    x = torch.randn(9, 4, requires_grad=True)
    for layer in model:
        layer(x)
    once = routing_losses(model)
    soft = x.softmax(-1)
    torch.testing.assert_close(once.balance, 2 * 4 * balance_loss(soft, top_k(soft, 1)))
    torch.testing.assert_close(once.z, 2 * z_loss(x))
    assert torch.autograd.grad(once.balance, x)[0].abs().sum() > 0
    with pytest.raises(FoveateError, match="no forward"):
        routing_losses(model)
    with torch.no_grad():
        model[0](x)
    with pytest.raises(FoveateError, match="no forward"):
        model[0].balance_loss()
    with pytest.raises(FoveateError, match="routes"):
        routing_losses(nn.Linear(2, 2))
