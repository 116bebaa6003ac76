"""Losses from hidden states, in nats per token: the logits exist for one chunk of tokens at a time.

N tokens, V vocabulary, D hidden (student and teacher may differ). All arithmetic is fp32 over the
full vocabulary, also under autocast.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.measure.predictions import divergence, kl_to, predictions, softmax_mean
from compress.model.modules import Head

CHUNK = 512


@dataclass(frozen=True)
class Teacher:
    """A teacher's final hidden states [N, D] and its head: a distribution for every token."""

    hidden: Tensor
    head: Head

    def loss(self, rows: slice, hidden_ND: Tensor, head: Head) -> Tensor:
        """KL(teacher || student) given the student's hidden states and head."""
        return divergence(self.hidden[rows], self.head, hidden_ND, head)

    def subtract(self, rows: slice, probability_NV: Tensor) -> None:
        """Take the teacher's probabilities off the student's, in place."""
        probability_NV -= log_probabilities(self.hidden[rows], self.head).exp_()


@dataclass(frozen=True)
class Labels:
    """Target tokens [N]: a one-hot teacher."""

    targets: Tensor

    def loss(self, rows: slice, hidden_ND: Tensor, head: Head) -> Tensor:
        """Negative log-likelihood given hidden states and their head."""
        return softmax_mean(hidden_ND, head, rows=False)[0] - head.at(hidden_ND, self.targets[rows])

    def subtract(self, rows: slice, probability_NV: Tensor) -> None:
        """Take 1 off the targets' probabilities, in place."""
        targets_N1 = self.targets[rows, None]
        probability_NV.scatter_add_(
            1, targets_N1, -torch.ones_like(targets_N1, dtype=probability_NV.dtype)
        )


def kl_from_hidden(
    student_hidden_ND: Tensor,
    student_head: Head,
    teacher_hidden_ND: Tensor,
    teacher_head: Head,
    chunk: int = CHUNK,
) -> Tensor:
    """KL(teacher || student) of every token, in nats; no more than ``chunk`` rows of logits live.

    Differentiable in the student's hidden states and head; the teacher is a constant.
    """
    frozen = replace(teacher_head, weight=teacher_head.weight.detach())
    teacher = Teacher(teacher_hidden_ND.detach(), frozen)
    apply: Any = _FromHidden.apply
    kl_N: Tensor = apply(student_hidden_ND, student_head.weight, student_head, teacher, chunk)
    return kl_N


def kl_of_many(students_ND: Iterable[Tensor], teacher_ND: Tensor, head: Head) -> list[Tensor]:
    """KL(teacher || student) of every token, nats, of students with their teacher's head."""
    if (teacher := predictions(teacher_ND, head)) is None:
        return [kl_from_hidden(hidden, head, teacher_ND, head) for hidden in students_ND]
    return [kl_to(teacher, hidden, head) for hidden in students_ND]


def check_finite(
    kl_N: Tensor, model: str, teacher_hidden_ND: Tensor, teacher_head: Head, teacher: str
) -> None:
    """InputError where a KL is not finite; it names the model whose predictions are not."""
    if bool(torch.isfinite(kl_N).all()):
        return
    at_fault = model
    if not bool(torch.isfinite(teacher_head.logits(teacher_hidden_ND)).all()):
        at_fault = teacher
    raise InputError(
        f"{at_fault} predicts NaN or infinite logits on this text: nothing can be measured; its "
        "weights or its config.json must be wrong"
    )


def nll_from_hidden(hidden_ND: Tensor, head: Head, targets_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """Negative log-likelihood of every target token, in nats; differentiable like the KL."""
    apply: Any = _FromHidden.apply
    nll_N: Tensor = apply(hidden_ND, head.weight, head, Labels(targets_N), chunk)
    return nll_N


def log_probabilities(hidden_ND: Tensor, head: Head) -> Tensor:
    """Log-softmax of the logits, fp32 whatever the inputs and the surrounding autocast."""
    return head.logits(hidden_ND).log_softmax(-1)


def require_finite(values: Tensor, what: str) -> Tensor:
    """The values; InputError where they are no numbers to measure with."""
    if not bool(values.isfinite().all()):
        raise InputError(
            f"{what} are not finite on this text (NaN or infinity): the weights or the config are "
            "damaged, or overflow"
        )
    return values


class _FromHidden(torch.autograd.Function):
    """The logits are computed again in the backward pass: memory stays at one chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, head: Head, target: Teacher | Labels,
        chunk: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.head, ctx.target, ctx.chunk = replace(head, weight=weight_VD.detach()), target, chunk
        pieces = []
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            pieces.append(target.loss(rows, hidden_ND[rows], head).float())
        return torch.cat(pieces) if pieces else hidden_ND.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD = ctx.saved_tensors
        head: Head = ctx.head
        gradient_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        gradient_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, len(hidden_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits_NV = head.logits(hidden_ND[rows])
            slope_NV = head.slope(logits_NV)
            # The gradient in the student's logits is softmax(student) - softmax(teacher).
            residual_NV = logits_NV.log_softmax(-1).exp_()
            del logits_NV
            ctx.target.subtract(rows, residual_NV)
            residual_NV *= gradients[0][rows, None]
            residual_NV *= slope_NV
            with torch.autocast(hidden_ND.device.type, enabled=False):
                gradient_ND[rows] = residual_NV @ weight_VD.float()
                if gradient_VD is not None:
                    gradient_VD += residual_NV.T @ hidden_ND[rows].float()
        whole = None if gradient_VD is None else gradient_VD.to(weight_VD.dtype)
        return gradient_ND.to(hidden_ND.dtype), whole, None, None, None
