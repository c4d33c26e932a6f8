"""Losses that a student learns from its teacher by. Logits of the whole vocabulary exist for a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]
"""From last hidden states [T, d] to logits [T, V]."""

_BYTES = {"cuda": 1 << 28, "cpu": 1 << 25}
_NONE = -100
"""Target of a token that nothing follows."""


@dataclass(frozen=True)
class LogitLoss:
    """What is compared of two models' logits.

    Args:
        kl: weight of the divergence, mean per token, times temperature².
        ce: weight of the cross entropy with the text's next tokens, mean per token that has one.
        temperature: by which logits are divided before the divergence.
        reverse: KL(student ‖ teacher) in place of KL(teacher ‖ student).
    """

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
    reverse: bool = False


def chunk_for(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are made at once: about 256 MiB of fp32 logits on an accelerator, 32 MiB elsewhere."""
    return max(16, _BYTES.get(device.type, _BYTES["cuda"]) // (4 * vocabulary))


def next_tokens(ids: Tensor) -> Tensor:
    """Targets [B, N] of token ids [B, N]: what follows each, and -100 for the last."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), _NONE)], dim=1)


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    heads: tuple[Head, Head],
    parameters: Sequence[Tensor],
    loss: LogitLoss,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The weighted loss, with gradients, and its parts, without.

    Gradients of the student's hidden states and of its head are made chunk by chunk along with the loss, so that
    neither the logits nor anything of their size outlives its chunk, and nothing is computed twice.

    Args:
        student: the student's last hidden states [T, d].
        teacher: the teacher's [T, d'].
        targets: the token that follows each [T], int64; -100 where there is none.
        heads: of student and teacher, over one vocabulary; only the first is differentiated.
        parameters: those of the student's head.
        chunk: tokens at a time.

    Returns:
        loss: scalar, fp32 (float64 of float64).
        parts: [2]: the divergence times temperature², and the cross entropy, each a mean; 0 where its weight is 0.
    """
    if not torch.is_grad_enabled():
        student, parameters = student.detach(), ()
    total, parts = _Chunked.apply(student, teacher, targets, heads, loss, chunk, *parameters)  # type: ignore[misc]
    return total, parts


class _Chunked(torch.autograd.Function):
    """`forward` makes the gradients for a slope of 1; `backward` scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor,
        heads: tuple[Head, Head],
        loss: LogitLoss,
        chunk: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = [each for each in parameters if each.requires_grad]
        needed = student.requires_grad or bool(wanted)
        wide = _wide(student)
        grad = torch.empty_like(student) if student.requires_grad else None
        grads = [torch.zeros_like(each, dtype=_wide(each)) for each in wanted]
        sums = torch.zeros(2, dtype=wide, device=student.device)
        count = (targets != _NONE).sum().clamp(min=1).to(wide)
        weights = (loss.kl / len(student), loss.ce / count) if needed else None
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            piece = student[rows].detach().requires_grad_(grad is not None)
            with torch.set_grad_enabled(needed):
                logits = heads[0](piece)
            found, slope = compared(logits.detach(), heads[1](teacher[rows]), targets[rows], loss, weights)
            sums += found
            if slope is None:
                continue
            made = list(torch.autograd.grad(logits, [*([] if grad is None else [piece]), *wanted], slope))
            if grad is not None:
                grad[rows] = made.pop(0)
            for whole, part in zip(grads, made, strict=True):
                whole += part
        ctx.grad, ctx.grads = grad, grads
        ctx.parameters = [(each.requires_grad, each.dtype) for each in parameters]
        parts = sums / torch.stack([torch.full_like(count, len(student)), count])
        ctx.mark_non_differentiable(parts)
        return loss.kl * parts[0] + loss.ce * parts[1], parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, unused: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        made = iter(ctx.grads)
        given = [next(made).mul_(outer).to(dtype) if needed else None for needed, dtype in ctx.parameters]
        grad = None if ctx.grad is None else ctx.grad.mul_(outer.to(ctx.grad.dtype))
        ctx.grad = ctx.grads = None
        return grad, None, None, None, None, None, *given


def compared(
    student: Tensor, teacher: Tensor, targets: Tensor, loss: LogitLoss, weights: tuple[Any, Any] | None
) -> tuple[Tensor, Tensor | None]:
    """Sums over tokens of divergence (times temperature²) and cross entropy [2], and the slope of the logits [T, V].

    weights: of one token in the loss, for each of the two; None: no slope is wanted. With p the teacher's distribution
    at temperature t and q the student's, the slope of t² KL(p ‖ q) is t (q - p), that of t² KL(q ‖ p) is
    t q (log q/p - KL(q ‖ p)), and that of the cross entropy is q - 1 at the target, at temperature 1.
    """
    wide, hot = _wide(student), loss.temperature
    logits = student.to(wide)
    sums = torch.zeros(2, dtype=wide, device=student.device)
    slope = None
    log_q = (logits / hot if hot != 1 else logits).log_softmax(-1)
    if loss.kl:
        log_p = (teacher.to(wide) / hot if hot != 1 else teacher.to(wide)).log_softmax(-1)
        gap = log_q - log_p
        if loss.reverse:
            q = log_q.exp()
            each = (q * gap).sum(-1, keepdim=True)
            sums[0] = each.sum() * hot**2
            if weights is not None:
                slope = gap.sub_(each).mul_(q).mul_(hot * weights[0])
        else:
            p = log_p.exp_()
            sums[0] = -(p * gap).sum() * hot**2
            if weights is not None:
                slope = log_q.exp().sub_(p).mul_(hot * weights[0])
    if loss.ce:
        log_q = log_q if hot == 1 else logits.log_softmax(-1)
        there = (targets != _NONE).to(wide).unsqueeze(-1)
        place = targets.clamp(min=0).unsqueeze(-1)
        sums[1] = -(log_q.gather(-1, place) * there).sum()
        if weights is not None:
            step = there * weights[1]
            ours = log_q.exp_().mul_(step).scatter_add_(-1, place, -step)
            slope = ours if slope is None else slope.add_(ours)
    return sums, None if slope is None else slope.to(student.dtype)


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states [.., d] over the teacher's squared length, mean over tokens and layers.

    Each token counts alike, also the few whose states are hundreds of times longer than the others'.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours.to(_wide(ours)), theirs.to(_wide(theirs))
        lengths = theirs.square().sum(-1).clamp(min=torch.finfo(theirs.dtype).tiny)
        losses.append(((ours - theirs).square().sum(-1) / lengths).mean())
    return torch.stack(losses).mean()


def _wide(x: Tensor) -> torch.dtype:
    """The type that sums are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
