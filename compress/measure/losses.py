"""Losses from hidden states, in nats per token: the logits exist for one chunk of tokens at a time.

N tokens, V vocabulary, D hidden (student and teacher may differ). All arithmetic is fp32 over the
full vocabulary, also under autocast.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

CHUNK = 512


def kl_from_hidden(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_ND: Tensor,
    teacher_head_VD: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """KL(teacher || student) of every token, in nats; no more than ``chunk`` rows of logits live.

    Differentiable in the student's hidden states and head; the teacher is a constant.
    """
    apply: Any = _KlFromHidden.apply
    teacher = (teacher_hidden_ND.detach(), teacher_head_VD.detach())
    kl_N: Tensor = apply(student_hidden_ND, student_head_VD, *teacher, chunk)
    return kl_N


def nll_from_hidden(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Negative log-likelihood of every target token, in nats; differentiable like the KL."""
    apply: Any = _NllFromHidden.apply
    nll_N: Tensor = apply(hidden_ND, head_VD, targets_N, chunk)
    return nll_N


def log_probabilities(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    """Log-softmax of the logits, fp32 whatever the inputs and the surrounding autocast."""
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return (hidden_ND.float() @ head_VD.float().T).log_softmax(-1)


def pull_back(
    residual_NV: Tensor, hidden_ND: Tensor, head_VD: Tensor, head_gradient_VD: Tensor | None
) -> Tensor:
    """Gradient of the hidden states given that of the logits; the head's is added in place."""
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if head_gradient_VD is not None:
            head_gradient_VD += residual_NV.T @ hidden_ND.float()
        return residual_NV @ head_VD.float()


class _KlFromHidden(torch.autograd.Function):
    """The logits are computed again in the backward pass: memory stays at one chunk."""

    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor,
        chunk: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(student_ND, head_VD, teacher_ND, teacher_head_VD)
        ctx.chunk = chunk
        pieces = []
        for start in range(0, len(student_ND), chunk):
            rows = slice(start, start + chunk)
            teacher_NV = log_probabilities(teacher_ND[rows], teacher_head_VD)
            student_NV = log_probabilities(student_ND[rows], head_VD)
            pieces.append((teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1))
        return torch.cat(pieces) if pieces else student_ND.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student_ND, head_VD, teacher_ND, teacher_head_VD = ctx.saved_tensors
        hidden_ND = torch.zeros_like(student_ND, dtype=torch.float32)
        head_gradient_VD = (
            torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, len(student_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            # The gradient of KL in the student's logits is softmax(student) - softmax(teacher).
            residual_NV = log_probabilities(student_ND[rows], head_VD).exp_()
            residual_NV -= log_probabilities(teacher_ND[rows], teacher_head_VD).exp_()
            residual_NV *= gradients[0][rows, None]
            hidden_ND[rows] = pull_back(residual_NV, student_ND[rows], head_VD, head_gradient_VD)
        head = None if head_gradient_VD is None else head_gradient_VD.to(head_VD.dtype)
        return hidden_ND.to(student_ND.dtype), head, None, None, None


class _NllFromHidden(torch.autograd.Function):
    """As above, with a one-hot teacher."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden_ND, head_VD, targets_N)
        ctx.chunk = chunk
        pieces = []
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            log_NV = log_probabilities(hidden_ND[rows], head_VD)
            pieces.append(nll_loss(log_NV, targets_N[rows], reduction="none"))
        return torch.cat(pieces) if pieces else hidden_ND.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, targets_N = ctx.saved_tensors
        gradient_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        head_gradient_VD = (
            torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, len(hidden_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            residual_NV = log_probabilities(hidden_ND[rows], head_VD).exp_()
            residual_NV[torch.arange(len(residual_NV)), targets_N[rows]] -= 1.0
            residual_NV *= gradients[0][rows, None]
            gradient_ND[rows] = pull_back(residual_NV, hidden_ND[rows], head_VD, head_gradient_VD)
        head = None if head_gradient_VD is None else head_gradient_VD.to(head_VD.dtype)
        return gradient_ND.to(hidden_ND.dtype), head, None, None
