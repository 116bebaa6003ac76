"""Measured KL: the student that surgery would write, assembled, against the teacher."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.measure.losses import check_finite, kl_from_hidden
from compress.measure.predictions import Predictions, kl_gradient_to, kl_to, predictions
from compress.measure.prefix import SHARE, Incumbent
from compress.model.checkpoint import Checkpoint
from compress.model.modules import Head
from compress.student.assemble import BlockStore
from compress.student.candidate import Candidate
from compress.student.grams import Grams
from compress.sweep.stack import Stack, final_states

# Sequences of a forward pass; between passes a hopeless trial may stop.
BATCH = 4


@dataclass(frozen=True)
class Reference:
    """A teacher's predictions on fixed text: tokens [S, T], final hidden states [S, T, D], head.

    ``predicted`` is what students with this head are measured by, of all tokens [S * T]; None where
    the head is not linear. ``best`` is kept from one candidate to the next.
    """

    store: BlockStore
    tokens: Tensor
    hidden: Tensor
    head: Head
    predicted: Predictions | None
    best: Incumbent = field(repr=False, compare=False)

    @property
    def teacher(self) -> Checkpoint:
        """The teacher on disk."""
        return self.store.teacher

    def part(self, start: int, end: int) -> "Reference":
        """The same on a range of the sequences."""
        rows, length = slice(start, end), self.tokens.shape[1]
        tokens = slice(start * length, end * length)
        return Reference(
            self.store, self.tokens[rows], self.hidden[rows], self.head,
            None if self.predicted is None else self.predicted[tokens], Incumbent(self.best.limit),
        )  # fmt: skip

    def batches(self) -> "Iterator[Reference]":
        """The text a batch of sequences at a time."""
        for start in range(0, len(self.tokens), BATCH):
            yield self.part(start, start + BATCH)


@torch.no_grad()
def reference(
    teacher: Checkpoint, stack: Stack, tokens: Tensor, store: BlockStore | None = None
) -> Reference:
    """Run the teacher's stack once on the text; ``store`` has blocks of its students."""
    hidden = torch.cat(final_states(stack, torch.split(tokens, BATCH)))
    with stack.head() as head:
        predicted = predictions(hidden.flatten(0, 1), head)
    memory = stack.placement.memory
    best = Incumbent(None if memory is None else int(SHARE * memory))
    store = store or BlockStore(teacher, stack)
    return Reference(store, tokens, hidden, head, predicted, best)


@torch.no_grad()
def sequence_kl(stack: Stack, text: Reference, name: str = "the student") -> Iterator[Tensor]:
    """KL(teacher || student) in nats per token of every sequence, a batch [b] at a time.

    Raises:
        InputError: it is not finite; ``name`` is what to call the student.
    """
    for part in text.batches():
        [hidden] = final_states(stack, [part.tokens])
        with stack.head() as head:
            states = hidden.flatten(0, 1), head, part.hidden.flatten(0, 1), part.head
            yield by_sequence(kl_from_hidden(*states), part, name)


def mean_kl(stack: Stack, text: Reference) -> float:
    """Mean KL of a model to the teacher on a text, nats per token."""
    return float(torch.cat(list(sequence_kl(stack, text))).mean())


@torch.no_grad()
def measure(candidate: Candidate, text: Reference, grams: Grams | None = None) -> Iterator[Tensor]:
    """Per-sequence KL of a candidate, a batch at a time; a repaired one needs Gram matrices.

    Starts where it begins to differ from the best candidate measured on the text so far.
    """
    stack, kept = text.store.student(candidate, grams), candidate.keep.get("hidden")
    state_bytes = text.tokens.numel() * candidate.architecture.hidden * text.hidden.itemsize
    walk = text.best.begin(text.store.layer_keys(candidate, grams), state_bytes)
    values = []
    for batch, part in enumerate(text.batches()):
        known = [layer for at, layer in walk.states if at == batch]
        first = max(known, default=0)
        hidden = walk.states[batch, first] if known else stack.embed(part.tokens)
        for number, layer in stack.visits(range(first, stack.layers)):
            walk.keep(batch, number, hidden)
            hidden = stack.run(number, layer, hidden)
        walk.keep(batch, stack.layers, hidden)
        with stack.head() as head:
            states = stack.normed(hidden).flatten(0, 1)
            kl = kl_of_student(states, head, part, kept)
        values.append(by_sequence(kl, part, f"candidate {candidate.id}"))
        yield values[-1]
    text.best.offer(walk, float(torch.cat(values).mean()))


def kl_of_student(
    hidden_ND: Tensor, head: Head, part: Reference, kept: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of every token; ``head`` has the teacher's channels, or those kept."""
    if part.predicted is None:
        return kl_from_hidden(hidden_ND, head, part.hidden.flatten(0, 1), part.head)
    return kl_to(part.predicted.channels(kept), hidden_ND, head)


def kl_gradient(hidden_BTD: Tensor, part: Reference) -> tuple[Tensor, Tensor]:
    """KL of every sequence, nats per token, and the summed KL's gradient at the hidden states.

    The student has the teacher's head.
    """
    hidden_ND = hidden_BTD.detach().flatten(0, 1)
    if part.predicted is not None:
        kl, gradient = kl_gradient_to(part.predicted, hidden_ND, part.head)
    else:
        student = hidden_ND.clone().requires_grad_(True)
        with torch.enable_grad():
            kl = kl_from_hidden(student, part.head, part.hidden.flatten(0, 1), part.head)
            (gradient,) = torch.autograd.grad(kl.sum(), student)
    return kl.detach().view(hidden_BTD.shape[:2]).mean(1).float(), gradient.view_as(hidden_BTD)


def by_sequence(kl_N: Tensor, part: Reference, name: str) -> Tensor:
    """Mean KL of every sequence [b], fp32 on the CPU; InputError where it is not finite."""
    check_finite(kl_N, name, part.hidden.flatten(0, 1), part.head, str(part.teacher.path))
    return kl_N.view(part.tokens.shape).mean(1).float().cpu()
