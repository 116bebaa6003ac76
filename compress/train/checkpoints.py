"""Checkpoints of a training: whole tensors in a file each, whoever trains in how many parts.

The last ``KEPT`` stay. What recognizes the training and its losses so far are in the header of the
file: it is a checkpoint or is not. Where the newest is broken, the one before it counts.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.core.files import write_text
from compress.core.terminal import note
from compress.model.tensor_files import tensor_writer
from compress.train.optimizers import Optimizer, restore, state_of
from compress.train.world import World, sharded_as, tensors_of, whole

CURVE = "curve.jsonl"
FILES = "training-*.safetensors"
KEPT = 2


@dataclass
class History:
    """What a training has come to: the loss of every step, NaN where it was skipped.

    ``validations`` are steps and what was measured after them; less is better.
    """

    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """How many of the last steps in a row were skipped."""
        found = itertools.takewhile(math.isnan, reversed(self.losses))
        return sum(1 for _ in found)

    @property
    def best(self) -> int | None:
        """The step after which validation was best, the first of equals; None without any."""
        return min(self.validations, key=lambda one: one[1])[0] if self.validations else None

    def turned(self, patience: int) -> bool:
        """Whether the last ``patience`` validations were all worse than the best."""
        steps = [step for step, _ in self.validations]
        return patience > 0 and self.best in steps[: -patience or None]


def save(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    history: History,
    curve: Sequence[Mapping[str, float]],
    identity: str,
    world: World,
) -> None:
    """Write the curve, and the checkpoint that a history has come to."""
    tensors = {f"model.{name}": tensor for name, tensor in tensors_of(model).items()}
    for name, parameter in model.named_parameters():
        for key, tensor in state_of(optimizer, parameter).items():
            tensors[f"{name}/{key}"] = tensor
    specs = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    file = directory / file_of(len(history.losses))
    about = {"identity": identity, "history": json.dumps(asdict(history))}
    if world.leads:  # first: what is killed before it has a checkpoint writes its curve again
        write_text(directory / CURVE, "".join(json.dumps(point) + "\n" for point in curve))
    writer = tensor_writer(file, specs, about) if world.leads else nullcontext(ignore)
    with writer as write:
        for name, tensor in tensors.items():
            write(name, whole(tensor))
    if world.leads:
        forget(directory, KEPT, history.best)


def file_of(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return FILES.replace("*", f"{step:07}")


def ignore(name: str, tensor: Tensor) -> None:
    """What a process that does not lead writes."""


def resume(
    directory: Path, model: nn.Module, optimizer: Optimizer, identity: str, world: World
) -> History:
    """Load the newest checkpoint that is whole into model and optimizer; the history so far.

    An empty one where there is no checkpoint, or one of another training. InputError where all are
    broken.
    """
    if (name := world.told(newest(directory, identity) if world.leads else None)) is None:
        return History()
    opened: Any = safe_open
    with opened(directory / name, framework="pt") as file:
        history = History(**json.loads(file.metadata()["history"]))
        fill(model, {key: file.get_tensor(f"model.{key}") for key in tensors_of(model)})
        names = file.keys()
        for key, parameter in model.named_parameters():
            own = [name for name in names if name.startswith(f"{key}/")]
            state = {name.removeprefix(f"{key}/"): file.get_tensor(name) for name in own}
            spread = {part: sharded_as(tensor, parameter) for part, tensor in state.items()}
            restore(optimizer, parameter, spread)
    return history


def load_weights(directory: Path, step: int, model: nn.Module) -> None:
    """Give a model the weights and buffers of the checkpoint after so many steps."""
    opened: Any = safe_open
    with opened(directory / file_of(step), framework="pt") as file:
        fill(model, {key: file.get_tensor(f"model.{key}") for key in tensors_of(model)})


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model, sharded or not, these weights and buffers."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(sharded_as(tensors[name], tensor))


def newest(directory: Path, identity: str) -> str | None:
    """The file of the newest whole checkpoint, if it is of this training."""
    opened: Any = safe_open
    broken = ""
    for path in sorted(directory.glob(FILES), reverse=True):
        try:
            with opened(path, framework="pt") as file:
                about = file.metadata()
        except (OSError, SafetensorError) as error:
            broken = f"the checkpoint {path} is broken ({error})"
            note(f"{broken}; the one before it counts")
            continue
        if about["identity"] == identity:
            return path.name
        forget(directory)
        return None
    if broken:
        raise InputError(f"{broken}, and there is no other; delete it to start over")
    return None


def forget(directory: Path, keep: int = 0, best: int | None = None) -> None:
    """Delete all checkpoints but the last so many, and what a kill left of one; the curve stays.

    So does the one after ``best`` steps.
    """
    kept = set(sorted(directory.glob(FILES))[-keep:] if keep else ())
    if best is not None:
        kept.add(directory / file_of(best))
    for file in set(directory.glob("training-*")) - kept:
        file.unlink()
