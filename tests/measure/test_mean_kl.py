"""The mean KL of a step is the mean of the tokens' KL, and its gradient theirs."""

from typing import Any

import pytest
import torch
from test_losses import HEADS, D, N, case, kl_of
from torch import Tensor

from compress.measure.mean_kl import mean_kl_from_hidden
from compress.model.modules import Head


def mean_of(tensors: tuple[Tensor, ...], heads: Any = HEADS[0], chunk: int = 4) -> Tensor:
    student, head, teacher, teacher_head = tensors
    ours, theirs = Head(head, *heads[0]), Head(teacher_head, *heads[1])
    return mean_kl_from_hidden(student, ours, teacher, theirs, chunk)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunk", [4, 512])
def test_it_is_the_mean_with_its_gradient(heads: Any, chunk: int) -> None:
    tensors = case()
    found, expected = mean_of(tensors, heads, chunk), kl_of(*tensors, heads=heads).mean()
    torch.testing.assert_close(found, expected)
    for one, two in zip(*(torch.autograd.grad(3 * kl, tensors[:2]) for kl in (found, expected)),
                        strict=True):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_bf16_models_have_bf16_gradients_of_fp32_arithmetic() -> None:
    tensors = case(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = mean_of(tensors), kl_of(*tensors).mean()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for one, two in zip(*(torch.autograd.grad(kl, tensors[:2]) for kl in (found, expected)),
                        strict=True):  # fmt: skip
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, two, rtol=0.02, atol=1e-3)


def test_a_model_is_at_no_distance_from_itself_with_no_gradient() -> None:
    student, head, _, _ = case()
    kl = mean_of((student, head, student, head))
    assert kl.abs() < 1e-6
    for gradient in torch.autograd.grad(kl, (student, head)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_what_needs_no_gradient_gets_none() -> None:
    student, head, teacher, teacher_head = case()
    hidden = student.detach()
    assert not mean_of((hidden, head.detach(), teacher, teacher_head)).requires_grad
    [gradient] = torch.autograd.grad(
        mean_of((student, head.detach(), teacher, teacher_head)), student
    )
    assert gradient.shape == (N, D)
