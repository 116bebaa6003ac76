"""How the KL changes around a student: the slope of every decision, in one backward pass.

Scores are taken at the teacher, where the KL is flat and decisions only add up; at a student that
has lost a third of its teacher neither holds. Here the same gates are read on the gated teacher
that computes the student, for units that are gone too (``masks``).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats.kv import with_kv_format
from compress.formats.table import Format
from compress.measure.kl import BATCH, Reference, kl_gradient
from compress.model.checkpoint import Checkpoint
from compress.model.modules import Head, attention_of
from compress.scores.contributions import Contributions
from compress.scores.gated import Gated
from compress.scores.gradients import gate_gradients
from compress.scores.taps import Taps
from compress.student.candidate import Candidate, block_keep, expert_keep
from compress.student.grams import Grams
from compress.student.repair import kept_columns, kept_rows, refitted_weight
from compress.student.rounded_teacher import RoundedTeacher
from compress.student.units import projections
from compress.sweep.stack import Stack


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
    stack: Stack,
    candidate: Candidate,
    text: Reference,
    formats: Sequence[Format],
    grams: Grams | None = None,
) -> Tangent:
    """The tangent at a candidate of the teacher ``stack``, on a text.

    A candidate with repaired blocks needs the teacher's ``grams``. Costs two forward passes and a
    backward one. Formats round the masked teacher's weights, not the cut's: scales may differ
    slightly.
    """
    gated = gated_teacher(stack, candidate, text.teacher, grams, text.store.rounded)
    kls: list[Tensor] = []

    def upstream(batch: int, hidden: Tensor, head: Head) -> list[Tensor]:
        kl, gradient = kl_gradient(hidden, text.part(batch * BATCH, (batch + 1) * BATCH))
        kls.append(kl.cpu())
        return [gradient]

    batches = torch.split(text.tokens, BATCH)
    survivors, blocks = candidate.keep["blocks"].tolist(), stack.architecture.blocks
    with ExitStack() as changed:
        for number, kv_format in candidate.architecture.kv_formats.items():
            attention = attention_of(stack.model, blocks[survivors[number]])
            changed.enter_context(with_kv_format(attention, kv_format))
        rows = gate_gradients(gated, Taps(gated), batches, formats, upstream)
    slope = {key: torch.cat([each[key][0] for each in rows]) for key in rows[0]}
    return Tangent(slope, torch.cat(kls), text.tokens.shape[1])


def turn(text: Reference, number: int, parts: int = 4) -> Reference:
    """The part of a text that the tangent of this number is taken on, one part after another.

    Cheap tangents here and there say more than few on all of the text.
    """
    count = len(text.tokens)
    parts = min(parts, count)
    start = number % parts
    return text.part(start * count // parts, (start + 1) * count // parts)


def gated_teacher(
    stack: Stack,
    candidate: Candidate,
    teacher: Checkpoint,
    grams: Grams | None,
    rounded: RoundedTeacher | None = None,
) -> Gated:
    """The teacher that computes a candidate, its formats as in ``Gated``."""
    survivors = candidate.keep["blocks"].tolist()
    blocks = zip(survivors, candidate.architecture.blocks, strict=True)
    current = {number: block.formats for number, block in blocks}

    def refit(number: int, weights: Mapping[str, Tensor]) -> None:
        """Put repaired columns into a block's output projections; dead ones stay."""
        assert grams is not None, "a repaired candidate needs its teacher's Grams"
        block = teacher.architecture.blocks[number]
        keep = block_keep(candidate.keep, block)
        for projection in projections(teacher.architecture, block):
            own = expert_keep(keep, block, projection.expert)
            if own is None:
                continue
            weight = weights[projection.module]
            rows = kept_rows(teacher.architecture, projection, block, own).to(weight.device)
            columns = kept_columns(projection, block, own).to(weight.device)
            student = refitted_weight(teacher, grams, block, projection, own)
            weight[rows[:, None], columns] = student.to(weight.device, weight.dtype)

    return Gated(stack, candidate.keep, current, candidate.repaired, refit, rounded)
