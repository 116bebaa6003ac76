"""A teacher's predictions of fixed text, as far as a student with its head is measured by them.

The logits of one linear head are z = s W h, so the cross-entropy of a student to its teacher is

    H(p, q) = log Z(h_q) - sum_v p_v z_v = log Z(h_q) - s h_q . m,    m = sum_v p_v w_v

and KL(p || q) = H(p, q) - H(p). A text needs m and H(p) once; a student then costs only its own
logits and their log-normalizer log Z, and the gradient in h_q is s (sum_v q_v w_v - m).

N tokens, V vocabulary, D hidden (a student's may be some of its teacher's channels).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.model.modules import Head

# Logits in flight: so few stay in a CPU's cache, where they are worked on twice as fast.
LOGITS = 2**21


@dataclass(frozen=True)
class Predictions:
    """Mean head rows m [N, D] in fp32 and entropies H(p) [N] in fp64 of a teacher's tokens."""

    row: Tensor
    entropy: Tensor

    def __getitem__(self, tokens: slice) -> "Predictions":
        """Those of some of the tokens."""
        return Predictions(self.row[tokens], self.entropy[tokens])

    def channels(self, kept: Tensor | None) -> "Predictions":
        """Those that a student sees which keeps these hidden channels; None: all."""
        return self if kept is None else replace(self, row=self.row[:, kept.to(self.row.device)])


def predictions(hidden_ND: Tensor, head: Head) -> Predictions | None:
    """A teacher's, from its final hidden states; None where its head is not linear."""
    if head.softcap is not None:
        return None
    normalizer, row = softmax_mean(hidden_ND, head)
    return Predictions(row, normalizer - expected_logit(row, hidden_ND, head))


def kl_to(teacher: Predictions, hidden_ND: Tensor, head: Head) -> Tensor:
    """KL(teacher || student) of every token, nats, fp64; ``head`` is the teacher's.

    It has the hidden channels that ``teacher`` has.
    """
    normalizer, _ = softmax_mean(hidden_ND, head, rows=False)
    return normalizer - expected_logit(teacher.row, hidden_ND, head) - teacher.entropy


def kl_gradient_to(teacher: Predictions, hidden_ND: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """``kl_to``, and the gradient of the summed KL at the hidden states, [N, D] in fp32."""
    normalizer, row = softmax_mean(hidden_ND, head)
    kl = normalizer - expected_logit(teacher.row, hidden_ND, head) - teacher.entropy
    return kl, (row - teacher.row) * head.scale


def expected_logit(row_ND: Tensor, hidden_ND: Tensor, head: Head) -> Tensor:
    """sum_v p_v z_v of every token, fp64: the logit that its teacher expects."""
    return (row_ND.double() * hidden_ND.double()).sum(-1) * head.scale


def divergence(
    teacher_ND: Tensor, teacher_head: Head, student_ND: Tensor, student_head: Head
) -> Tensor:
    """KL(teacher || student) of every token, nats, fp64, of any two heads of one vocabulary.

    One pass over it, as ``softmax_mean``: sum_v p_v (z_v - z'_v) - log Z + log Z'.
    """
    count = max(len(teacher_ND), 1)
    teacher, student = Sums(teacher_ND), Sums(student_ND)
    gap_N1 = torch.zeros_like(teacher.total)
    heads = (
        torch.split(head.weight, max(LOGITS // count, 1)) for head in (teacher_head, student_head)
    )
    for ours_vD, theirs_vD in zip(*heads, strict=True):
        logits_Nv = replace(teacher_head, weight=ours_vD).logits(teacher_ND)
        others_Nv = replace(student_head, weight=theirs_vD).logits(student_ND)
        gaps_Nv = logits_Nv - others_Nv
        terms_Nv, shrink = teacher.add(logits_Nv)
        student.add(others_Nv)
        gap_N1.mul_(shrink).add_(gaps_Nv.mul_(terms_Nv).sum(-1, keepdim=True))
    gap_N = (gap_N1.double() / teacher.total).squeeze(-1)
    return gap_N - teacher.normalizer + student.normalizer


class Sums:
    """Sums of exp(logit) over the parts of a vocabulary, each relative to the highest so far."""

    def __init__(self, hidden_ND: Tensor) -> None:
        self.highest = torch.full((len(hidden_ND), 1), -torch.inf, device=hidden_ND.device)
        self.total = torch.zeros_like(self.highest)

    def add(self, logits_Nv: Tensor) -> tuple[Tensor, Tensor]:
        """The terms exp(logit - highest) that logits turn into, and how earlier ones shrink."""
        before, self.highest = (
            self.highest,
            torch.maximum(self.highest, logits_Nv.amax(-1, keepdim=True)),
        )
        shrink, terms_Nv = (before - self.highest).exp_(), logits_Nv.sub_(self.highest).exp_()
        self.total.mul_(shrink).add_(terms_Nv.sum(-1, keepdim=True))
        return terms_Nv, shrink

    @property
    def normalizer(self) -> Tensor:
        """Log Z [N] in fp64."""
        # The two parts are exact to 1e-7 each: their sum is not rounded to its own size.
        return (self.highest.double() + self.total.double().log()).squeeze(-1)


def softmax_mean(hidden_ND: Tensor, head: Head, *, rows: bool = True) -> tuple[Tensor, Tensor]:
    """Log Z [N] in fp64, and with ``rows`` the mean head row under the softmax, [N, D] in fp32.

    One pass over the vocabulary, a part at a time, in the manner of online softmax (Milakov and
    Gimelshein 2018, arXiv 1805.02867).
    """
    sums, row_ND = Sums(hidden_ND), torch.zeros_like(hidden_ND, dtype=torch.float32)
    for weight_vD in torch.split(head.weight, max(LOGITS // max(len(hidden_ND), 1), 1)):
        terms_Nv, shrink = sums.add(replace(head, weight=weight_vD).logits(hidden_ND))
        if rows:
            row_ND.mul_(shrink).addmm_(terms_Nv, weight_vD.float())
    return sums.normalizer, row_ND.div_(sums.total)
