"""Distillation: the student learns the teacher's whole distribution, forward KL and nothing else.

Teacher and student run in one process; logits exist for one chunk of tokens at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.core.errors import InputError
from compress.measure.losses import kl_from_hidden
from compress.model.modules import final_hidden, head_of
from compress.train.loop import CurvePoint, Progress, TrainSettings, batch_at, digest, train

# Tokens whose activations are in memory at a time; a batch is made of so many parts as it takes.
MICRO_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How long and how hard; rates rise over ``warmup_share`` of the steps, then fall to zero."""

    tokens: int
    batch_tokens: int
    learning_rate: float
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    rows: Tensor,
    settings: DistillSettings,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> list[CurvePoint]:
    """Train ``student`` in place towards ``teacher`` on ``rows`` [N, T]; the curve, a point a step.

    The loss is the mean over all positions of KL(teacher || student), in nats per token. The
    student is trained in fp32 (cast here if it is not). Afterwards it is in eval mode and frozen.
    With a directory, checkpoints and the curve are kept there and an interrupted distillation of
    the same settings and rows continues bit for bit. InputError on ``rows`` or settings that give
    no step, vocabularies that differ, or a loss that is not finite.
    """
    batch, steps = schedule(rows, settings)
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"the teacher's vocabulary is {teacher.config.vocab_size}, "
            f"the student's {student.config.vocab_size}; distillation needs the same"
        )
    teacher.train(False)
    module: torch.nn.Module = student
    module.to(torch.float32)
    student.requires_grad_(True)
    student.train(True)
    warmup = round(settings.warmup_share * steps)

    def loss_of(step: int) -> Iterator[Tensor]:
        whole = batch_at(rows, step, batch, settings.seed)
        for part in torch.split(whole, max(MICRO_TOKENS // rows.shape[1], 1)):
            share = part.shape[0] / whole.shape[0]
            yield kl(teacher, student, part) * share

    curve = train(
        student,
        loss_of,
        TrainSettings(
            steps=steps,
            batch_tokens=batch * rows.shape[1],
            learning_rate=settings.learning_rate,
            warmup=warmup,
            decay=steps - warmup,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            checkpoint_every=settings.checkpoint_every,
            data=digest(rows),
        ),
        what="distill",
        directory=directory,
        progress=progress,
    )
    student.train(False)
    student.requires_grad_(False)
    return curve


def schedule(rows: Tensor, settings: DistillSettings) -> tuple[int, int]:
    """Rows in a batch and number of steps; at least ``tokens`` tokens are seen."""
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"distillation needs rows of tokens, got a shape of {list(rows.shape)}")
    if settings.tokens < 1:
        raise InputError(f"distillation over {settings.tokens} tokens is no distillation")
    batch = max(settings.batch_tokens // rows.shape[1], 1)
    return batch, -(-settings.tokens // (batch * rows.shape[1]))


def kl(teacher: PreTrainedModel, student: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Mean KL(teacher || student) over all positions of a batch, nats per token."""
    ids_BT = ids_BT.to(student.device)
    with torch.no_grad():
        teacher_BTD = final_hidden(teacher, ids_BT)
    student_BTD = final_hidden(student, ids_BT)
    student_ND, teacher_ND = student_BTD.flatten(0, 1), teacher_BTD.flatten(0, 1)
    return kl_from_hidden(student_ND, head_of(student), teacher_ND, head_of(teacher)).mean()
