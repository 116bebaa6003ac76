"""Terms of a loss are what their names say, add up, and what is validated is not trained on."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_distill import SETTINGS, quiet, taught, tokens
from torch.nn.functional import cosine_similarity, cross_entropy

from compress.core.errors import InputError
from compress.measure.mean_kl import mean_kl_from_hidden
from compress.model.build import load_model
from compress.model.modules import Head
from compress.train.distill import distill
from compress.train.losses import Seen
from compress.train.recipes import Term, terms_of


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_terms_are_what_their_names_say() -> None:
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    student, teacher = drawn(2, 5, 3, seed=1), drawn(2, 5, 4, seed=2)
    head, above, kept = drawn(11, 3, seed=3), drawn(11, 4, seed=4), torch.tensor([0, 2, 3])
    seen = Seen(ids, student, Head(head), teacher, Head(above), kept)
    logits = student @ head.T
    p, q = (teacher @ above.T).log_softmax(-1), logits.log_softmax(-1)
    shared = teacher[..., kept]
    expected = {
        "kl": (p.exp() * (p - q)).sum(-1).mean(),
        "reverse-kl": (q.exp() * (q - p)).sum(-1).mean(),
        "ce": cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        "cosine": 1 - cosine_similarity(student, shared, dim=-1).mean(),
        "mse": (student - shared).square().sum() / shared.square().sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(seen.value(name), value)
    total = seen.total(terms_of("kl + 0.5*ce+2 * mse"))
    torch.testing.assert_close(total, expected["kl"] + expected["ce"] / 2 + 2 * expected["mse"])


def test_the_reverse_kl_has_its_own_gradient() -> None:
    hidden, weight = drawn(6, 3, seed=1).double(), drawn(11, 3, seed=3).double()
    teacher, above = drawn(6, 4, seed=2), Head(drawn(11, 4, seed=4))
    both = []
    for ours in (True, False):
        x, w = (each.float().clone().requires_grad_(True) for each in (hidden, weight))
        if ours:
            loss = mean_kl_from_hidden(x, Head(w), teacher, above, 4, reverse=True)
        else:
            p, q = above.logits(teacher).log_softmax(-1), (x @ w.T).log_softmax(-1)
            loss = (q.exp() * (q - p)).sum(-1).mean()
        loss.backward()
        both.append((loss.detach(), x.grad, w.grad))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


def test_a_text_that_is_no_loss_is_one_line() -> None:
    assert terms_of("kl") == (Term("kl"),)
    for text in ("", "kl + nats", "0*kl", "kl*2", "x*kl", "inf*kl"):
        with pytest.raises(InputError, match="is no term; one is kl, reverse-kl"):
            terms_of(text)
    with pytest.raises(InputError, match="a term twice"):
        terms_of("kl + 0.1*kl")


def test_what_is_validated_is_not_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, validate_every=64, loss="kl + 0.1*cosine", patience=9)
    rows, student = tokens(), load_model(tiny_llama)
    other = torch.cat([rows[:-2], rows[-2:].flip(1)])
    figures, trained = [], []

    def progress(done: int, steps: int, found: dict[str, float]) -> None:
        figures.append(found["validation KL"])

    for text in (rows, other):
        student = load_model(tiny_llama)
        distill(taught(tiny_llama, text), student, text, settings, progress=progress)
        trained.append(student.state_dict())
    assert len(figures) == 2 * 5
    assert figures[:5] != figures[5:]
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())
    distill(taught(tiny_llama, rows), student, rows, SETTINGS, progress=quiet)
