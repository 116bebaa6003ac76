"""KL and NLL from hidden states are the plain formulas, with their gradients, in bounded memory."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from compress.measure.losses import kl_from_hidden, nll_from_hidden

N, V, D, TEACHER_D = 13, 40, 8, 12


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, head = torch.randn(N, D), torch.randn(V, D)
    teacher, teacher_head = torch.randn(N, TEACHER_D), torch.randn(V, TEACHER_D)
    student, head = student.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return student, head, teacher.to(dtype), teacher_head.to(dtype)


def naive_kl(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    ours = (student @ head.T).log_softmax(-1)
    theirs = (teacher @ teacher_head.T).log_softmax(-1)
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, len(loss))
    return torch.autograd.grad((loss * weights).sum(), leaves)


def test_a_model_is_at_no_distance_from_itself() -> None:
    student, head, _, _ = case()
    kl = kl_from_hidden(student, head, student, head)
    assert kl.abs().max() < 1e-6
    for gradient in torch.autograd.grad(kl.sum(), (student, head)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_kl_is_never_negative_and_in_nats() -> None:
    student, head, teacher, teacher_head = case()
    assert (kl_from_hidden(student, head, teacher, teacher_head) > 0).all()
    # A certain teacher against an even student over V tokens: log V nats.
    sure = torch.zeros(V, 1)
    sure[3] = 100.0
    kl = kl_from_hidden(torch.zeros(1, D), head, torch.ones(1, 1), sure)
    torch.testing.assert_close(kl, torch.tensor([V]).float().log())


@pytest.mark.parametrize("chunk", [1, 5, N, 512])
def test_kl_and_its_gradient_are_the_plain_formula_whatever_the_chunk(chunk: int) -> None:
    student, head, teacher, teacher_head = case()
    ours = kl_from_hidden(student, head, teacher, teacher_head, chunk)
    plain = naive_kl(student, head, teacher, teacher_head)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, student, head), gradients(plain, student, head))


@pytest.mark.parametrize("chunk", [4, 512])
def test_nll_and_its_gradient_are_cross_entropy(chunk: int) -> None:
    hidden, head, _, _ = case()
    targets = torch.randint(V, (N,))
    ours = nll_from_hidden(hidden, head, targets, chunk)
    plain = cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, hidden, head), gradients(plain, hidden, head))


def test_a_frozen_head_gets_no_gradient_and_the_teacher_never_does() -> None:
    student, head, teacher, teacher_head = case()
    frozen = head.detach()
    kl_from_hidden(student, frozen, teacher.requires_grad_(), teacher_head).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert frozen.grad is None


def test_arithmetic_is_fp32_for_bf16_inputs_and_under_autocast() -> None:
    student, head, teacher, teacher_head = case(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = kl_from_hidden(student, head, teacher, teacher_head)
        grad = torch.autograd.grad(ours.sum(), student)[0]
    floats = [tensor.float() for tensor in (student, head, teacher, teacher_head)]
    assert ours.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours, naive_kl(*floats))


def test_no_tokens_are_no_losses() -> None:
    _, head, _, teacher_head = case()
    empty, teacher = torch.zeros(0, D), torch.zeros(0, TEACHER_D)
    assert kl_from_hidden(empty, head, teacher, teacher_head).shape == (0,)
