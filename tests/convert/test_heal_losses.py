"""The losses of healing: chunks add up to the plain formulas, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import relative_rms
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.convert.healing.distillation import LogitLoss, chunk_for, hidden_loss, logit_loss, next_tokens

TOKENS, WIDTH, VOCABULARY = 37, 12, 53


class Head(nn.Module):
    """Logits with everything that a head can have: a bias, and a cap. Notes how many tokens it was asked for."""

    def __init__(self, seed: int, width: int, capped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.capped = nn.Linear(width, VOCABULARY), capped
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        logits = 3 * self.linear(x)
        return 4 * torch.tanh(logits / 4) if self.capped else logits


def plain(student: Tensor, teacher: Tensor, targets: Tensor, loss: LogitLoss) -> tuple[Tensor, Tensor]:
    """The formulas on whole logits, in the words of torch."""
    log_q, log_p = ((x / loss.temperature).log_softmax(-1) for x in (student, teacher))
    pair = (log_p, log_q) if loss.reverse else (log_q, log_p)
    kl = F.kl_div(*pair, reduction="batchmean", log_target=True) * loss.temperature**2
    return kl, F.cross_entropy(student, targets, ignore_index=-100)


def inputs(seed: int, dtype: torch.dtype, capped: bool = False) -> tuple[Tensor, Tensor, Tensor, Head, Head]:
    torch.manual_seed(seed)
    student, teacher = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, 2 * WIDTH)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[[4, 36]] = -100
    heads = Head(seed + 1, WIDTH, capped).to(dtype), Head(seed + 2, 2 * WIDTH).to(dtype)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), targets, *heads


LOSSES = {
    "kl": LogitLoss(),
    "hot": LogitLoss(0.7, 0.0, 2.5),
    "reverse": LogitLoss(1.3, 0.0, 0.8, True),
    "ce": LogitLoss(0.0, 1.0),
    "both": LogitLoss(0.4, 0.6, 2.0),
    "both, reverse": LogitLoss(0.4, 0.6, 1.0, True),
}


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_chunks_are_the_plain_formula(loss: LogitLoss, chunk: int, seed: int) -> None:
    """Value, parts and gradients of hidden states, matrix and bias, times the slope of what comes after."""
    student, teacher, targets, head, other = inputs(seed, torch.float64, capped=True)
    wanted = [student, *head.parameters()]
    kl, ce = plain(head(student), other(teacher).detach(), targets, loss)
    want = loss.kl * kl + loss.ce * ce
    slopes = torch.autograd.grad(3 * want, wanted)
    head.asked.clear()
    got, parts = logit_loss(student, teacher, targets, (head, other), list(head.parameters()), loss, chunk)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for part, weight, value in zip(parts, (loss.kl, loss.ce), (kl, ce), strict=True):
        torch.testing.assert_close(part, value if weight else torch.zeros_like(value), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(3 * got, wanted), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert max(head.asked) <= chunk
    assert max(other.asked[1:]) <= chunk


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_less_precision(loss: LogitLoss, dtype: torch.dtype, seed: int) -> None:
    """No farther from fp64 than the plain formula in fp32 on logits of the same precision is, with some room."""
    exact = inputs(seed, torch.float64)
    student, teacher, targets, head, other = inputs(seed, dtype)
    for one, two in zip((exact[0], exact[1], *exact[3].parameters(), *exact[4].parameters()),
                        (student, teacher, *head.parameters(), *other.parameters()), strict=True):  # fmt: skip
        one.data.copy_(two.data)
    kl, ce = plain(exact[3](exact[0]), exact[4](exact[1]), targets, loss)
    want = torch.autograd.grad(loss.kl * kl + loss.ce * ce, [exact[0], *exact[3].parameters()])
    kl, ce = plain(head(student).float(), other(teacher).float(), targets, loss)
    usual = torch.autograd.grad(loss.kl * kl + loss.ce * ce, [student, *head.parameters()])
    value, _ = logit_loss(student, teacher, targets, (head, other), list(head.parameters()), loss, 8)
    assert value.dtype == torch.float32
    got = torch.autograd.grad(value, [student, *head.parameters()])
    for mine, theirs, right in zip(got, usual, want, strict=True):
        assert mine.dtype == dtype
        assert relative_rms(mine.double(), right) <= 2 * relative_rms(theirs.double(), right) + 1e-6


def test_under_autocast(seed: int) -> None:
    """A weight that autocast keeps a copy of gets the gradients of all chunks."""
    student, teacher, targets, head, other = inputs(seed, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        kl, _ = plain(head(student).float(), other(teacher).float().detach(), targets, LogitLoss())
        want = torch.autograd.grad(kl, [student, *head.parameters()])
        got, _ = logit_loss(student, teacher, targets, (head, other), list(head.parameters()), LogitLoss(), 5)
        for mine, theirs in zip(torch.autograd.grad(got, [student, *head.parameters()]), want, strict=True):
            assert relative_rms(mine, theirs) < 1e-2


def test_a_loss_is_of_a_token(seed: int) -> None:
    """Twice the text, the same loss: nothing grows with length or batch."""
    student, teacher, targets, head, other = inputs(seed, torch.float64)
    for loss in LOSSES.values():
        once, _ = logit_loss(student, teacher, targets, (head, other), (), loss, 8)
        pair = (each.repeat(2, *(1,) * (each.ndim - 1)) for each in (student, teacher, targets))
        twice, _ = logit_loss(*pair, (head, other), (), loss, 8)
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=0)


def test_what_is_not_trained_gets_no_gradient(seed: int) -> None:
    student, teacher, targets, head, other = inputs(seed, torch.float64)
    head.requires_grad_(False)
    loss, _ = logit_loss(student, teacher, targets, (head, other), list(head.parameters()), LogitLoss(1, 1), 8)
    loss.backward()
    assert student.grad is not None
    assert all(each.grad is None for each in (*head.parameters(), *other.parameters()))
    head.requires_grad_(True)
    frozen, _ = logit_loss(
        student.detach(), teacher, targets, (head, other), list(head.parameters()), LogitLoss(1, 1), 8
    )
    frozen.backward()
    assert all(each.grad is not None for each in head.parameters())
    with torch.no_grad():
        still, _ = logit_loss(student, teacher, targets, (head, other), list(head.parameters()), LogitLoss(1, 1), 8)
    assert not still.requires_grad
    torch.testing.assert_close(still, loss.detach())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(seed: int) -> None:
    student, _, targets, head, _ = inputs(seed, torch.float64)
    for loss in (LogitLoss(), LogitLoss(reverse=True)):
        value, _ = logit_loss(student, student.detach(), targets, (head, head), (), loss, 8)
        (slope,) = torch.autograd.grad(value, student)
        assert abs(float(value.detach())) < 1e-14
        assert slope.abs().max() < 1e-14


def test_targets_and_chunks() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert next_tokens(ids).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert chunk_for(49152, torch.device("cpu")) * 49152 * 4 <= 1 << 25
    assert chunk_for(10**9, torch.device("cpu")) == 16


def test_hidden_states(seed: int) -> None:
    """Relative to each token's own length; equal states give a gradient of zero, not none."""
    torch.manual_seed(seed)
    ours = [torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    theirs = [torch.randn(2, 5, 7, dtype=torch.float64) for _ in range(3)]
    each = [(a - b).norm(dim=-1) ** 2 / b.norm(dim=-1) ** 2 for a, b in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(hidden_loss(ours, theirs), torch.stack(each).mean(), rtol=1e-12, atol=0)
    loud = [torch.cat([x[:, :1] * 1000, x[:, 1:]], dim=1) for x in ours]
    louder = [torch.cat([x[:, :1] * 1000, x[:, 1:]], dim=1) for x in theirs]
    torch.testing.assert_close(hidden_loss(loud, louder), hidden_loss(ours, theirs), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(hidden_loss(ours[:1], [ours[0].detach()]), ours[0])
    assert slope.abs().max() == 0
