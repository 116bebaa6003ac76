"""Blockwise local distillation: every block learns its teacher's block, and one is in memory.

A block of a student reads what its teacher's block reads and is trained towards what that adds to
the residual stream, y, by the normalized error over a batch

    |y_student - y_teacher|^2 / |y_teacher|^2

(BLD of Puzzle, arXiv 2411.19146). Unlike there, only the blocks of one chosen student are trained,
from their cut (and repaired) weights, no library of all alternatives; and a block that does not
come closer on rows held out stays as it was. Where hidden channels are cut, the block reads those
that are kept and is compared in them; its norm is folded as surgery does.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.model.architecture import Block
from compress.model.fill import inside, part_of, place_of
from compress.model.modules import (
    HIDDEN_STATES,
    branch_of,
    mixers_of,
    norm_of,
    post_of,
    readers_of,
    with_hidden,
)
from compress.sweep.stack import Stack
from compress.train.distill import DistillSettings, schedule, train_settings
from compress.train.loop import TrainSettings, batch_at, update
from compress.train.optimizers import optimizer_of

# B rows of a batch, T tokens, D hidden.

# Tokens on which a block must come closer, and at most this share of the rows.
HELD_OUT_TOKENS, HELD_OUT_SHARE = 4096, 1 / 16


@dataclass(frozen=True)
class Pair:
    """A block of the teacher and the student's that is made of it, by their numbers."""

    teacher: int
    student: int


@dataclass(frozen=True)
class Learned:
    """The blocks of one layer: normalized errors on held-out rows before and after, by number.

    ``tensors`` are the weights of the student's blocks that came closer, by their names on disk.
    """

    errors: Mapping[int, tuple[float, float]]
    tensors: Mapping[str, Tensor]


@dataclass
class Seen:
    """What a teacher's block just read, how its mixers were called, and what the block gave."""

    read: Tensor = field(default_factory=lambda: torch.zeros(0))
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    gave: Tensor = field(default_factory=lambda: torch.zeros(0))


def local_distill(
    teacher: Stack,
    student: Stack,
    pairs: Sequence[Pair],
    rows: Tensor,
    settings: DistillSettings,
    directory: Path,
    hidden: Tensor | None = None,
    known: Mapping[int, Learned] | None = None,
) -> Iterator[tuple[int, Learned]]:
    """What the blocks of every teacher's layer with pairs have learned, layer by layer.

    One pass over the teacher's layers with ``rows`` [N, T] in flight, their states in a file in
    ``directory`` that nobody else sees. ``student`` should hold fp32 weights; what it holds is left
    as it is. ``hidden`` are the channels that are kept, all if None. Layers that are ``known`` are
    not trained again. InputError on rows or settings that give no step and no row to hold out.
    """
    batch, steps = schedule(rows, settings)
    held = max(1, min(HELD_OUT_TOKENS // rows.shape[1], int(len(rows) * HELD_OUT_SHARE)))
    if len(rows) < 2:
        raise InputError("local distillation needs two rows of text, one of them to check on")
    # Of the others those that are ever visited; the ones held out are last.
    rows = torch.cat([rows[: len(rows) - held][: steps * batch], rows[-held:]])
    trained = torch.arange(len(rows) - held)[:, None]
    batches = [batch_at(trained, step, batch, settings.seed).flatten() for step in range(steps)]
    checks = list(torch.split(torch.arange(len(rows) - held, len(rows)), batch))
    blocks = teacher.architecture.blocks
    layers = {number: [p for p in pairs if blocks[p.teacher].layer == number]
              for number in sorted({blocks[pair.teacher].layer for pair in pairs})}  # fmt: skip
    if not layers:
        return
    states, after = (in_flight(teacher, rows, directory) for _ in range(2))
    for index in torch.split(torch.arange(len(rows)), batch):
        states[index] = teacher.embed(rows[index]).cpu()
    asked = train_settings(rows, settings)
    for number, layer in teacher.visits(range(max(layers) + 1)):
        flow = Flow(teacher, number, layer, states, after)
        own = layers.get(number, [])
        if number in (known or {}) or not own:
            for index in (*torch.split(trained.flatten(), batch), *checks):
                flow.step(index)
        else:
            yield number, learned(flow, student, own, hidden, batches, checks, asked)
        states, after = after, states


@dataclass(frozen=True)
class Flow:
    """One layer of the teacher with the states [N, T, D] that enter it and that leave it."""

    stack: Stack
    number: int
    layer: nn.Module
    states: Tensor
    after: Tensor

    @torch.no_grad()
    def step(self, index: Tensor) -> None:
        """Run some rows through the layer."""
        place = self.stack.placement
        entering = self.states[index].to(place.device)
        self.after[index] = self.stack.run(self.number, self.layer, entering).cpu()


def in_flight(stack: Stack, rows: Tensor, directory: Path) -> Tensor:
    """Room for the hidden states [N, T, D] of rows: a file without a name, not memory of ours."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = torch.Size((*rows.shape, stack.architecture.hidden))
    file, dtype = directory / "in-flight", stack.placement.dtype
    try:
        with file.open("wb") as room:
            # A full disk is an error here, not a crash at some later write.
            os.posix_fallocate(room.fileno(), 0, shape.numel() * dtype.itemsize)
        found = torch.from_file(str(file), shared=True, size=shape.numel(), dtype=dtype)
    finally:
        file.unlink(missing_ok=True)
    return found.view(shape)


def learned(
    flow: Flow,
    student: Stack,
    pairs: Sequence[Pair],
    hidden: Tensor | None,
    batches: Sequence[Tensor],
    checks: Sequence[Tensor],
    settings: TrainSettings,
) -> Learned:
    """Train the student's blocks of one layer, all of them on the same batches."""
    blocks, model = student.architecture.blocks, student.model
    [layer] = {blocks[pair.student].layer for pair in pairs}
    teacher = flow.stack.architecture.blocks
    errors: dict[int, tuple[float, float]] = {}
    with ExitStack() as stack:
        stack.enter_context(student.layer(layer))
        seen = {
            pair: stack.enter_context(watched(flow.stack.model, teacher[pair.teacher]))
            for pair in pairs
        }
        parts = {pair: nn.ModuleList(branch_of(model, blocks[pair.student])) for pair in pairs}
        optimizers = {}
        for pair, part in parts.items():
            part.requires_grad_(True)
            optimizers[pair] = optimizer_of(
                part, settings.optimizer, settings.learning_rate, settings.weight_decay
            )

        def loss(pair: Pair) -> Tensor:
            return block_error(student, blocks[pair.student], seen[pair], hidden)

        def checked() -> dict[Pair, float]:
            sums = dict.fromkeys(pairs, 0.0)
            for index in checks:
                flow.step(index)
                for pair in pairs:
                    with torch.no_grad():
                        sums[pair] += loss(pair).item() * len(index)
            return {pair: total / sum(map(len, checks)) for pair, total in sums.items()}

        before = checked()
        for step, index in enumerate(batches):
            flow.step(index)
            for pair, part in parts.items():
                update(part, optimizers[pair], loss(pair), step, settings)
        reached = checked()
        for pair in pairs:
            errors[pair.teacher] = before[pair], reached[pair]
            parts[pair].requires_grad_(False)
        better = {pair.student for pair in pairs if reached[pair] < before[pair]}
        tensors = dict(tensors_of(student, layer, better))
    return Learned(errors, tensors)


def tensors_of(student: Stack, layer: int, blocks: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Copies of the weights of some of a layer's blocks, as they are, by their names on disk."""
    for parameter in student.parts[layer]:
        if parameter.block in blocks:
            tensor = inside(student.model, place_of(parameter, student.architecture))[2].detach()
            yield parameter.name, part_of(parameter, tensor).to("cpu", copy=True)


@contextmanager
def watched(model: Any, block: Block) -> Iterator[Seen]:
    """What a block of a model reads and gives, after every forward pass."""
    seen = Seen()

    def reading(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.read = args[0] if args else kwargs[HIDDEN_STATES]

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.args, seen.kwargs = args, kwargs

    def gave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        seen.gave = seen.gave + found if module in others else found

    first, *others = mixers_of(model, block)
    post = post_of(model, block)
    with ExitStack() as stack:
        reader = readers_of(model, block)[0]
        stack.callback(reader.register_forward_pre_hook(reading, with_kwargs=True).remove)
        stack.callback(first.register_forward_pre_hook(called, with_kwargs=True).remove)
        for giving in (first, *others) if post is None else (post,):
            stack.callback(giving.register_forward_hook(gave).remove)
        yield seen


def block_error(student: Stack, block: Block, seen: Seen, hidden: Tensor | None) -> Tensor:
    """The normalized error of a student's block where its teacher's was just seen."""
    device, dtype = student.placement.device, seen.gave.dtype
    kept = slice(None) if hidden is None else hidden.to(device)
    target_BTD = seen.gave[..., kept].float()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        norm, read_BTD = norm_of(student.model, block), seen.read[..., kept].float()
        normed_BTD = read_BTD if norm is None else norm(read_BTD)
        args, given = with_hidden(seen.args, seen.kwargs, lambda _: normed_BTD)
        outputs = [mixer(*args, **given) for mixer in mixers_of(student.model, block)]
        found = (output[0] if isinstance(output, tuple) else output for output in outputs)
        found_BTD = torch.stack(tuple(found)).sum(0)
        if (post := post_of(student.model, block)) is not None:
            found_BTD = post(found_BTD)
    found_BTD = found_BTD.float()
    scale = target_BTD.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    error: Tensor = (found_BTD - target_BTD).square().sum() / scale
    return error
