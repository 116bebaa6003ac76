"""How the KL changes around a student: the slope of every decision, in one backward pass.

Scores are taken at the teacher, where the KL is flat and decisions only add up; at a student that
has lost a third of its teacher neither holds. Here the same gates are read on the gated teacher
that computes the student, for units that are gone too (``masks``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats.kv import set_kv_format
from compress.formats.table import Format
from compress.measure.kl import BATCH, Reference
from compress.measure.losses import kl_from_hidden
from compress.model.checkpoint import Checkpoint
from compress.model.modules import final_hidden, weights_of
from compress.scores.contributions import Contributions
from compress.scores.taps import Taps
from compress.student.candidate import Candidate, block_keep, expert_keep
from compress.student.grams import Grams
from compress.student.repair import kept_columns, refitted_weight
from compress.student.units import projections


@dataclass(frozen=True)
class Tangent:
    """Derivatives at a student, of sequences of ``length`` tokens.

    ``slope`` [sequences, *units] is that of the summed KL(teacher || student), ``kl`` [sequences]
    the KL itself in nats per token.
    """

    slope: Contributions
    kl: Tensor
    length: int


def tangent(
    model: object,
    candidate: Candidate,
    text: Reference,
    formats: Sequence[Format],
    grams: Grams | None = None,
) -> Tangent:
    """The tangent at a candidate of the teacher ``model``, on a text.

    A candidate with repaired blocks needs the teacher's ``grams``. Costs a forward and a backward
    pass. Formats round the masked teacher's weights, not the cut's: scales may differ slightly.
    """
    architecture = text.teacher.architecture
    survivors = candidate.keep["blocks"].tolist()
    current = {
        number: block.format
        for number, block in zip(survivors, candidate.architecture.blocks, strict=True)
    }
    slopes: dict[str, list[Tensor]] = {}
    kls = []
    set_kv_format(model, candidate.architecture.kv_format)
    with refitted(model, candidate, text.teacher, grams):
        taps = Taps(model, architecture, formats, candidate.keep, current)
        for start in range(0, len(text.tokens), BATCH):
            part = text.part(start, start + BATCH)
            with taps.attached(len(part.tokens)), torch.enable_grad():
                hidden = final_hidden(model, part.tokens)
                kl, gradient = kl_gradient(hidden.detach(), part)
                for key, rows in taps.backward(hidden, gradient, again=False).items():
                    slopes.setdefault(key, []).append(rows)
            kls.append(kl)
    set_kv_format(model, "bf16")
    slope = {key: torch.cat(rows) for key, rows in slopes.items()}
    return Tangent(slope, torch.cat(kls), text.tokens.shape[1])


def turn(text: Reference, number: int, parts: int = 4) -> Reference:
    """The part of a text that the tangent of this number is taken on, one part after another.

    Cheap tangents here and there say more than few on all of the text.
    """
    count = len(text.tokens)
    parts = min(parts, count)
    start = number % parts
    return text.part(start * count // parts, (start + 1) * count // parts)


@contextmanager
def refitted(
    model: object, candidate: Candidate, teacher: Checkpoint, grams: Grams | None
) -> Iterator[None]:
    """The teacher's output projections with the student's repaired columns; dead ones stay."""
    before: list[tuple[Tensor, Tensor]] = []
    for number in sorted(candidate.repaired):
        assert grams is not None, "a repaired candidate needs its teacher's Grams"
        block = teacher.architecture.blocks[number]
        keep = block_keep(candidate.keep, block)
        weights = weights_of(model, teacher.architecture, block)
        for projection in projections(teacher.architecture, block):
            own = expert_keep(keep, block, projection.expert)
            if own is None:
                continue
            weight, _ = weights[projection.module]
            rows = keep.get("hidden", torch.arange(len(weight)))
            before.append((weight, weight.clone()))
            student = refitted_weight(teacher, grams, block, projection, own)
            weight[rows[:, None], kept_columns(projection, block, own)] = student.to(weight.dtype)
    try:
        yield
    finally:
        for weight, original in before:
            weight.copy_(original)


def kl_gradient(hidden_BTD: Tensor, part: Reference) -> tuple[Tensor, Tensor]:
    """KL of every sequence, nats per token, and the summed KL's gradient at the hidden states."""
    student = hidden_BTD.clone().requires_grad_(True)
    kl = kl_from_hidden(
        student.flatten(0, 1), part.head, part.hidden.flatten(0, 1), part.head
    ).view(hidden_BTD.shape[:2])
    (gradient,) = torch.autograd.grad(kl.sum(), student)
    return kl.detach().mean(1), gradient
