"""KL by a teacher's mean head rows is the plain formula, with its gradient."""

import pytest
import torch
from torch import Tensor

from compress.measure import predictions as module
from compress.measure.predictions import kl_gradient_to, kl_to, predictions
from compress.model.modules import Head

N, V, D = 24, 200, 32


def case(distance: float, scale: float = 1.0) -> tuple[Tensor, Tensor, Head]:
    generator = torch.Generator().manual_seed(1)
    teacher, other = (torch.randn(N, D, generator=generator) for _ in range(2))
    head = Head(torch.randn(V, D, generator=generator), scale)
    return teacher, teacher + distance * other, head


def direct(teacher: Tensor, student: Tensor, head: Head) -> Tensor:
    logs = [
        (h.double() @ head.weight.double().T * head.scale).log_softmax(-1)
        for h in (teacher, student)
    ]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


@pytest.mark.parametrize("numbers", [1, 1000, 2**21])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("distance", [0, 1e-3, 0.03, 1.0, 10.0])
def test_kl_is_that_of_the_direct_formula_also_where_it_is_tiny(
    distance: float, scale: float, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS", numbers)
    teacher, student, head = case(distance, scale)
    known = predictions(teacher, head)
    assert known is not None
    found, expected = kl_to(known, student, head), direct(teacher, student, head)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert float((found - expected).mean().abs()) < 2e-6 + 1e-6 * float(expected.mean())


def test_the_gradient_is_that_of_the_direct_formula() -> None:
    teacher, student, head = case(0.3, 0.5)
    known = predictions(teacher, head)
    assert known is not None
    leaf = student.double().requires_grad_()
    (expected,) = torch.autograd.grad(direct(teacher, leaf, head).sum(), leaf)
    kl, found = kl_gradient_to(known, student, head)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(kl, kl_to(known, student, head))


def test_a_student_of_fewer_channels_has_those_of_the_head() -> None:
    teacher, student, head = case(0.3)
    kept = torch.arange(0, D, 2)
    known = predictions(teacher, head)
    assert known is not None
    found = kl_to(known.channels(kept), student[:, kept], Head(head.weight[:, kept]))
    gone = torch.ones(D).index_fill_(0, kept, 0).bool()
    expected = direct(teacher, student.masked_fill(gone, 0), head)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_head_with_a_softcap_has_no_such_predictions() -> None:
    teacher, _, head = case(0.3)
    assert predictions(teacher, Head(head.weight, 1.0, 30.0)) is None
