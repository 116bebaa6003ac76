"""Measured KL: the student that surgery would write, built in memory, against the teacher."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.measure.losses import check_finite, kl_from_hidden
from compress.model.checkpoint import Checkpoint
from compress.model.modules import Head, final_hidden, head_of
from compress.student.assemble import student_model
from compress.student.candidate import Candidate
from compress.student.grams import Grams
from compress.student.surgery import student_tensors

# Sequences of a forward pass; between passes a hopeless trial may stop.
BATCH = 4


@dataclass(frozen=True)
class Reference:
    """A teacher's predictions on fixed text: tokens [S, T], final hidden states [S, T, D], head."""

    teacher: Checkpoint
    tokens: Tensor
    hidden: Tensor
    head: Head

    def part(self, start: int, end: int) -> "Reference":
        """The same on a range of the sequences."""
        rows = slice(start, end)
        return Reference(self.teacher, self.tokens[rows], self.hidden[rows], self.head)


@torch.no_grad()
def reference(teacher: Checkpoint, model: Any, tokens: Tensor) -> Reference:
    """Run the teacher's model once on the text."""
    hidden = [final_hidden(model, rows) for rows in torch.split(tokens, BATCH)]
    return Reference(teacher, tokens, torch.cat(hidden), head_of(model))


@torch.no_grad()
def sequence_kl(model: Any, text: Reference, name: str = "the student") -> Iterator[Tensor]:
    """KL(teacher || student) in nats per token of every sequence, a batch [b] at a time.

    Raises:
        InputError: it is not finite; ``name`` is what to call the student.
    """
    for start in range(0, len(text.tokens), BATCH):
        rows = slice(start, start + BATCH)
        hidden = final_hidden(model, text.tokens[rows])
        teacher = text.hidden[rows].flatten(0, 1)
        kl = kl_from_hidden(hidden.flatten(0, 1), head_of(model), teacher, text.head)
        check_finite(kl, name, teacher, text.head, str(text.teacher.path))
        yield kl.reshape(hidden.shape[:2]).mean(1)


def mean_kl(model: Any, text: Reference) -> float:
    """Mean KL of a model to the teacher on a text, nats per token."""
    return float(torch.cat(list(sequence_kl(model, text))).mean())


def measure(candidate: Candidate, text: Reference, grams: Grams | None = None) -> Iterator[Tensor]:
    """Per-sequence KL of a candidate, a batch at a time; a repaired one needs Gram matrices."""
    tensors = student_tensors(text.teacher, candidate, grams)
    model = student_model(text.teacher, candidate.architecture, tensors)
    yield from sequence_kl(model, text, f"candidate {candidate.id}")
