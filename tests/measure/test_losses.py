"""KL and NLL from hidden states are the plain formulas, with their gradients, in bounded memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from compress.measure.losses import kl_from_hidden, nll_from_hidden
from compress.model.modules import Head

N, V, D, TEACHER_D = 13, 40, 8, 12
# (scale, softcap) of the student's head and of its teacher's.
PLAIN = (1.0, None), (1.0, None)
HEADS = [PLAIN, ((0.5, None), (2.0, None)), ((1.0, 2.0), (1.0, None)), ((0.5, 2.0), (0.5, 2.0))]


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, head = torch.randn(N, D), torch.randn(V, D)
    teacher, teacher_head = torch.randn(N, TEACHER_D), torch.randn(V, TEACHER_D)
    student, head = student.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return student, head, teacher.to(dtype), teacher_head.to(dtype)


def kl_of(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, chunk: int = 512,
    heads: Any = PLAIN,
) -> Tensor:  # fmt: skip
    ours, theirs = Head(head, *heads[0]), Head(teacher_head, *heads[1])
    return kl_from_hidden(student, ours, teacher, theirs, chunk)


def naive_logits(hidden: Tensor, head: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = hidden @ head.T * scale
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def naive_kl(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, heads: Any = PLAIN
) -> Tensor:
    ours = naive_logits(student, head, *heads[0]).log_softmax(-1)
    theirs = naive_logits(teacher, teacher_head, *heads[1]).log_softmax(-1)
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, len(loss))
    return torch.autograd.grad((loss * weights).sum(), leaves)


@pytest.mark.parametrize("heads", HEADS[:1] + HEADS[3:])
def test_a_model_is_at_no_distance_from_itself(heads: Any) -> None:
    student, head, _, _ = case()
    kl = kl_of(student, head, student, head, heads=heads)
    assert kl.abs().max() < 1e-6
    for gradient in torch.autograd.grad(kl.sum(), (student, head)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_kl_is_never_negative_and_in_nats() -> None:
    student, head, teacher, teacher_head = case()
    assert (kl_of(student, head, teacher, teacher_head) > 0).all()
    # A certain teacher against an even student over V tokens: log V nats.
    sure = torch.zeros(V, 1)
    sure[3] = 100.0
    kl = kl_of(torch.zeros(1, D), head, torch.ones(1, 1), sure)
    torch.testing.assert_close(kl, torch.tensor([V]).float().log())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunk", [1, 5, N, 512])
def test_kl_and_its_gradient_are_the_plain_formula(chunk: int, heads: Any) -> None:
    student, head, teacher, teacher_head = case()
    ours = kl_of(student, head, teacher, teacher_head, chunk, heads)
    plain = naive_kl(student, head, teacher, teacher_head, heads)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, student, head), gradients(plain, student, head))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunk", [4, 512])
def test_nll_and_its_gradient_are_cross_entropy(chunk: int, heads: Any) -> None:
    hidden, head, _, _ = case()
    targets = torch.randint(V, (N,))
    ours = nll_from_hidden(hidden, Head(head, *heads[0]), targets, chunk)
    plain = cross_entropy(naive_logits(hidden, head, *heads[0]), targets, reduction="none")
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, hidden, head), gradients(plain, hidden, head))


def test_a_frozen_head_gets_no_gradient_and_the_teacher_never_does() -> None:
    student, head, teacher, teacher_head = case()
    frozen = head.detach()
    kl_of(student, frozen, teacher.requires_grad_(), teacher_head).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert frozen.grad is None


def test_arithmetic_is_fp32_for_bf16_inputs_and_under_autocast() -> None:
    student, head, teacher, teacher_head = case(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = kl_of(student, head, teacher, teacher_head)
        grad = torch.autograd.grad(ours.sum(), student)[0]
    floats = [tensor.float() for tensor in (student, head, teacher, teacher_head)]
    assert ours.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours, naive_kl(*floats))


def test_no_tokens_are_no_losses() -> None:
    _, head, _, teacher_head = case()
    empty, teacher = torch.zeros(0, D), torch.zeros(0, TEACHER_D)
    assert kl_of(empty, head, teacher, teacher_head).shape == (0,)
