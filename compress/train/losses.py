"""What a student is trained on: a sum of terms (``terms_of``).

The default, forward KL alone, is as good as or better than the others in Minitron, Nemotron-H and
Nemotron Nano 2; they are there to be compared with.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from compress.measure.losses import nll_from_hidden
from compress.measure.mean_kl import mean_kl_from_hidden
from compress.model.modules import Head
from compress.train.recipes import Term, TermName

# B rows, T tokens, N all of them, D hidden.


@dataclass(frozen=True)
class Seen:
    """What student and teacher make of rows of tokens [B, T]: final states, and their heads.

    ``channels`` are the teacher's hidden channels that the student has, None for all.
    """

    ids: Tensor
    student: Tensor
    head: Head
    teacher: Tensor
    teacher_head: Head
    channels: Tensor | None = None

    def value(self, term: TermName) -> Tensor:
        """A loss, the mean over tokens: nats, or what hidden states differ by."""
        student_ND, teacher_ND = self.student.flatten(0, 1), self.teacher.flatten(0, 1)
        if term == "ce":
            targets, read_ND = self.ids[:, 1:].flatten(), self.student[:, :-1].flatten(0, 1)
            return nll_from_hidden(read_ND, self.head, targets).mean()
        if term in ("kl", "reverse-kl"):
            heads = self.head, teacher_ND, self.teacher_head
            return mean_kl_from_hidden(student_ND, *heads, reverse=term == "reverse-kl")
        kept: Any = slice(None) if self.channels is None else self.channels.to(teacher_ND.device)
        near_ND, to_ND = student_ND.float(), teacher_ND[:, kept].float()
        if term == "cosine":
            return 1 - cosine_similarity(near_ND, to_ND).mean()
        return (near_ND - to_ND).square().sum() / to_ND.square().sum()

    def total(self, terms: tuple[Term, ...]) -> Tensor:
        """The sum of the terms."""
        return torch.stack([term.weight * self.value(term.name) for term in terms]).sum()
