"""Measured KL: the student that surgery would write, assembled, against the teacher."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.measure.losses import check_finite, kl_from_hidden
from compress.measure.predictions import Predictions, kl_gradient_to, kl_to, predictions
from compress.measure.prefix import SHARE, Incumbent
from compress.model.checkpoint import Checkpoint
from compress.model.families import folds_head
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
    parts = list(text.batches())
    found = final_states(stack, [part.tokens for part in parts])
    with stack.head() as head:
        for part, hidden in zip(parts, found, strict=True):
            states = hidden.flatten(0, 1), head, part.hidden.flatten(0, 1), part.head
            yield by_sequence(kl_from_hidden(*states), part, name)


def mean_kl(stack: Stack, text: Reference) -> float:
    """Mean KL of a model to the teacher on a text, nats per token."""
    return float(torch.cat(list(sequence_kl(stack, text))).mean())


@torch.no_grad()
def measure(candidate: Candidate, text: Reference, grams: Grams | None = None) -> Iterator[Tensor]:
    """Per-sequence KL of a candidate, a batch at a time; a repaired one needs Gram matrices.

    Starts where it begins to differ from the best candidate measured on the text so far. Where the
    student's layers do not stay in memory, all batches after the first are one sweep.
    """
    stack, kept = text.store.student(candidate, grams), candidate.keep.get("hidden")
    state_bytes = text.tokens.numel() * candidate.architecture.hidden * text.hidden.itemsize
    walk = text.best.begin(text.store.layer_keys(candidate, grams), state_bytes)
    parts, values = list(text.batches()), list[Tensor]()
    own = bool(candidate.architecture.outside_formats)
    first = max((layer for _, layer in walk.states), default=0)
    for batches in sweeps(stack, len(parts)):
        hidden = {
            at: walk.states[at, first] if first else stack.embed(parts[at].tokens) for at in batches
        }
        for number, layer in stack.visits(range(first, stack.layers)):
            for at, states in hidden.items():
                walk.keep(at, number, states)
                hidden[at] = stack.run(number, layer, states)
        found = []
        with stack.head() as head:
            for at, states in hidden.items():
                walk.keep(at, stack.layers, states)
                states_ND = stack.normed(states).flatten(0, 1)
                kl = kl_of_student(states_ND, head, parts[at], kept, own=own)
                found.append(by_sequence(kl, parts[at], f"candidate {candidate.id}"))
        values += found
        yield from found
    text.best.offer(walk, float(torch.cat(values).mean()))


def sweeps(stack: Stack, batches: int) -> list[range]:
    """The batches of each sweep: one where the layers stay, else the first and all others."""
    if stack.stays.issuperset(stack.parts):
        return [range(at, at + 1) for at in range(batches)]
    return [range(min(1, batches)), range(1, batches)]


def kl_of_student(
    hidden_ND: Tensor,
    head: Head,
    part: Reference,
    kept: Tensor | None = None,
    *,
    own: bool = False,
) -> Tensor:
    """KL(teacher || student) of every token.

    ``head`` is the teacher's, or of ``kept`` channels, or one of the student's ``own``.
    """
    scaled = kept is not None and folds_head(part.teacher.architecture)
    if part.predicted is None or scaled or own:
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
