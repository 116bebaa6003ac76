"""Distillation: the student learns the teacher's whole distribution, by forward KL if not asked.

Of the teacher only its final hidden states of the text and its head are there: the KL is exact (to
the rounding of the states), and logits exist for one chunk of tokens at a time. Products
are computed as a recipe says (``precision.py``); weights are fp32, or BF16 with an optimizer that
knows how.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.core.errors import InputError
from compress.model.modules import Head, final_hidden, head_of
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.states import StoredStates
from compress.train.loop import CurvePoint, Progress, TrainSettings, batch_at, digest, train
from compress.train.losses import Seen
from compress.train.masters import Roundings
from compress.train.optimizers import bytes_of
from compress.train.precision import Numerics, numerics_of
from compress.train.recipes import OptimizerName, PrecisionName, Term, terms_of
from compress.train.world import world

VALIDATION_TOKENS = 8192
KL = terms_of("kl")
# Tokens whose activations are in memory at a time; a batch is made of so many parts as it takes.
MICRO_TOKENS = 1024
# Numbers kept for the backward pass for each that a matrix product reads or gives: what is between
# products (norms, activations, attention) keeps about as many.
KEPT = 2
# Share that they may take of the memory beside the weights and what trains them; more, and every
# layer is computed again instead.
ACTIVATION_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How long and how hard; rates rise over ``warmup_share`` of the steps, then fall to zero.

    ``start`` and ``patience`` are as in ``TrainSettings``, ``validate_every`` counts tokens, and
    ``loss`` is a text for ``terms_of``. The last rows are validated on, if any are.
    """

    tokens: int
    batch_tokens: int
    learning_rate: float
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0
    optimizer: OptimizerName = "adamw"
    precision: PrecisionName | None = None
    checkpoint_seconds: float = 100.0
    start: str = ""
    loss: str = "kl"
    validate_every: int = 0
    patience: int = 0


@dataclass(frozen=True)
class Teacher:
    """What a student learns from: final hidden states [N, T, D] of rows of text, and their head.

    ``channels`` are those of D that the student has, None for all.
    """

    states: Tensor | StoredStates
    head: Head
    channels: Tensor | None = None


class Lesson(nn.Module):
    """A student before its teacher's head: the forward pass gives the loss.

    ``channels`` are the teacher's hidden channels that the student has, None for all.
    """

    def __init__(
        self, student: PreTrainedModel, head: Head, placement: Placement, numerics: Numerics,
        terms: tuple[Term, ...] = KL, channels: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student, self.head, self.numerics = student, head, numerics
        self.placement, self.terms, self.channels = placement, terms, channels

    def forward(self, ids_BT: Tensor, teacher_BTD: Tensor) -> Tensor:
        """The loss over all positions of rows; not in training, KL to the teacher and nats [2]."""
        device = self.placement.device
        teacher_BTD, ids_BT = teacher_BTD.to(device, self.placement.dtype), ids_BT.to(device)
        with self.numerics.computing(device):
            student_BTD, own = final_hidden(self.student, ids_BT), head_of(self.student)
            seen = Seen(ids_BT, student_BTD, own, teacher_BTD, self.head, self.channels)
            if self.training:
                return seen.total(self.terms)
            return torch.stack([seen.value("kl"), seen.value("ce")])


def distill(
    teacher: Teacher,
    student: PreTrainedModel,
    rows: Tensor,
    settings: DistillSettings,
    placement: Placement = REFERENCE,
    directory: Path | None = None,
    progress: Progress | None = None,
    roundings: Roundings | None = None,
    numerics: Numerics | None = None,
) -> list[CurvePoint]:
    """Train ``student`` in place towards ``teacher`` on ``rows`` [N, T]; the curve, a point a step.

    The loss is the mean over all positions of KL(teacher || student), in nats per token. The
    student goes to the placement and keeps the type of its weights. Afterwards it is in eval mode
    and frozen. Where activations would take too much of the placement's memory, layers are computed
    again in the backward pass, which changes nothing else. With a directory, checkpoints and the
    curve are kept there and an interrupted distillation of the same settings and rows continues,
    on a CPU bit for bit. Several processes take a part of every batch each. With ``roundings``, by
    the student's names, every forward pass has weights as they are stored, and so has the student
    afterwards. ``numerics`` are those of the settings' precision on a student whose linear layers
    are ``quantized`` by them; the placement's where there is none. InputError on ``rows`` or
    settings that give no step, a batch that does not divide among processes, vocabularies that
    differ, or a loss that is not finite.
    """
    batch, steps = schedule(rows, settings)
    ours = world()
    ours.require(batch, settings.optimizer)
    if len(teacher.head.weight) != student.config.vocab_size:
        raise InputError(
            f"the teacher's vocabulary is {len(teacher.head.weight)}, "
            f"the student's {student.config.vocab_size}; distillation needs the same"
        )
    module: torch.nn.Module = student
    module.to(placement.device)
    student.requires_grad_(True)
    student.train(True)
    micro = max(MICRO_TOKENS // rows.shape[1], 1)
    recompute(student, is_tight(student, micro * rows.shape[1], settings, placement, roundings))
    how = numerics or numerics_of(None, False, placement)
    train_on = len(rows) - held_out(rows, settings)
    numbers, held = torch.arange(train_on)[:, None], torch.arange(train_on, len(rows))

    def loss_of(lesson: nn.Module, step: int) -> Iterator[Tensor]:
        how.at((step + 0.5) / steps)
        whole = batch_at(numbers, step, batch, settings.seed).flatten()
        for part in torch.split(ours.share(whole), micro):
            yield lesson(rows[part], teacher.states[part]) * (len(part) / len(whole))

    @torch.no_grad()
    def validate(lesson: nn.Module) -> dict[str, float]:
        lesson.train(False)
        parts = [lesson(rows[part], teacher.states[part]) for part in torch.split(held, micro)]
        lesson.train(True)
        lengths = torch.tensor([len(part) for part in torch.split(held, micro)])
        kl, nats = (torch.stack(parts).cpu() * lengths[:, None] / len(held)).sum(0).tolist()
        return {"validation KL": kl, "validation nats": nats}

    terms = terms_of(settings.loss)
    curve = train(
        Lesson(student, teacher.head, placement, how, terms, teacher.channels),
        loss_of,
        train_settings(rows, settings),
        what="distill",
        directory=directory,
        progress=progress,
        validate=validate,
        world=ours,
        roundings={f"student.{name}": each for name, each in (roundings or {}).items()},
    )
    recompute(student, False)
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


def train_settings(rows: Tensor, settings: DistillSettings) -> TrainSettings:
    """The settings of the loop for a training on these rows."""
    batch, steps = schedule(rows, settings)
    warmup = round(settings.warmup_share * steps)
    return TrainSettings(
        steps=steps,
        batch_tokens=batch * rows.shape[1],
        learning_rate=settings.learning_rate,
        warmup=warmup,
        decay=steps - warmup,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        optimizer=settings.optimizer,
        precision=settings.precision,
        checkpoint_seconds=settings.checkpoint_seconds,
        data=digest(rows),
        start=settings.start,
        loss=settings.loss,
        validate_every=-(-settings.validate_every // (batch * rows.shape[1])),
        patience=settings.patience,
    )


def held_out(rows: Tensor, settings: DistillSettings) -> int:
    """How many of the last rows are validated on: a few thousand tokens, at most an eighth."""
    most = max(VALIDATION_TOKENS // rows.shape[1], 1)
    return min(most, len(rows) // 8) if settings.validate_every else 0


def is_tight(
    student: Any, tokens: int, settings: DistillSettings, placement: Placement,
    roundings: Roundings | None,
) -> bool:  # fmt: skip
    """Whether what a forward pass over so many tokens keeps would take too much of the memory."""
    if placement.memory is None:
        return False
    trained = sum(p.numel() for p in student.parameters()) * bytes_of(settings.optimizer, placement)
    if roundings:
        trained += sum(p.nbytes for p in student.parameters())
    matrices = (weight for weight in student.model.layers.parameters() if weight.ndim > 1)
    numbers = KEPT * tokens * sum(sum(weight.shape[-2:]) for weight in matrices)
    free: float = placement.memory - trained
    return bool(numbers * placement.dtype.itemsize > ACTIVATION_SHARE * free)


def recompute(student: Any, again: bool) -> None:
    """Have a student's layers computed again in backward passes, or no longer."""
    if again:
        # No dropout draws anything; layers take what needs a gradient as an argument.
        how = {"use_reentrant": False, "preserve_rng_state": False}
        student.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    elif student.is_activation_checkpointing:
        student.activation_checkpointing_disable()
        student.disable_input_require_grads()
