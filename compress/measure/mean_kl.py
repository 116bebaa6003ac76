"""The mean KL of a training step, and its gradient with it: logits are computed once.

What a loss does with logits twice, in a forward and in a backward pass, is done for one chunk of
tokens while its logits are there, as fused linear losses do (Liger Kernel, arXiv 2410.10989): the
gradient of a mean is known before anybody asks for it. Two products with the head less of six, and
no temporaries but one chunk's.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.model.modules import Head

# N tokens, V vocabulary, D hidden.

CHUNK = 512


def mean_kl_from_hidden(
    student_ND: Tensor,
    student_head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    chunk: int = CHUNK,
    *,
    reverse: bool = False,
) -> Tensor:
    """Mean of KL(teacher || student) over the tokens, in nats: that of ``kl_from_hidden``.

    With ``reverse`` of KL(student || teacher).
    Differentiable once, in the student's hidden states and head; the teacher is a constant.
    """
    frozen = replace(teacher_head, weight=teacher_head.weight.detach())
    apply: Any = _MeanKl.apply
    found: Tensor = apply(
        student_ND, student_head.weight, student_head, teacher_ND.detach(), frozen, chunk, reverse
    )
    return found


class _MeanKl(torch.autograd.Function):
    """Keeps gradients [N, D] and [V, D] from the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, head: Head, teacher_ND: Tensor,
        teacher_head: Head, chunk: int, reverse: bool,
    ) -> Tensor:  # fmt: skip
        head = replace(head, weight=weight_VD.detach())
        wanted = any(ctx.needs_input_grad[:2])
        gradient_ND = torch.empty_like(hidden_ND, dtype=torch.float32) if wanted else None
        gradient_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        total = hidden_ND.new_zeros((), dtype=torch.float64)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), chunk):
                rows = slice(start, start + chunk)
                logits_NV = head.logits(hidden_ND[rows])
                slope_NV = head.slope(logits_NV)
                student_NV = logits_NV.log_softmax(-1)
                del logits_NV
                teacher_NV = teacher_head.logits(teacher_ND[rows]).log_softmax(-1)
                whole, residual_NV = (reverse_kl if reverse else forward_kl)(student_NV, teacher_NV)
                total += whole
                if gradient_ND is None:
                    continue
                residual_NV.mul_(slope_NV)
                gradient_ND[rows] = residual_NV @ weight_VD.float()
                if gradient_VD is not None:
                    gradient_VD.addmm_(residual_NV.T, hidden_ND[rows].float())
        ctx.save_for_backward(gradient_ND, gradient_VD)
        ctx.types = hidden_ND.dtype, weight_VD.dtype, len(hidden_ND)
        return (total / len(hidden_ND)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient_ND, gradient_VD = ctx.saved_tensors
        hidden_type, weight_type, count = ctx.types
        share = gradients[0] / count
        whole = None if gradient_VD is None else gradient_VD.mul_(share).to(weight_type)
        return gradient_ND.mul_(share).to(hidden_type), whole, None, None, None, None, None


def forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) of log-probabilities, which are consumed, and its gradient.

    The gradient in the student's logits is softmax(student) - softmax(teacher).
    """
    probability_NV = teacher_NV.exp()
    whole = torch.vdot(probability_NV.view(-1), teacher_NV.sub_(student_NV).view(-1))
    return whole, student_NV.exp_().sub_(probability_NV)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of KL(student || teacher) of log-probabilities, which are consumed, and its gradient.

    With gaps g = log q - log p the gradient in the student's logits is q (g - sum q g).
    """
    gap_NV = torch.sub(student_NV, teacher_NV, out=teacher_NV)
    probability_NV = student_NV.exp_()
    kl_N1 = (probability_NV * gap_NV).sum(-1, keepdim=True)
    return kl_N1.sum(), gap_NV.sub_(kl_N1).mul_(probability_NV)
