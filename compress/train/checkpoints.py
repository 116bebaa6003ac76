"""Checkpoints of a training: whole tensors in a file each, whoever trains in how many parts.

The last ``KEPT`` stay. What recognizes the training and its losses so far are in the header of the
file: it is a checkpoint or is not. Where the newest is broken, the one before it counts.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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


def save(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    curve: Sequence[Mapping[str, float]],
    identity: str,
    world: World,
) -> None:
    """Write the checkpoint that a curve of so many points has come to, and the curve."""
    tensors = {f"model.{name}": tensor for name, tensor in tensors_of(model).items()}
    for name, parameter in model.named_parameters():
        for key, tensor in state_of(optimizer, parameter).items():
            tensors[f"{name}/{key}"] = tensor
    specs = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    losses = json.dumps([point["loss"] for point in curve])
    file = directory / FILES.replace("*", f"{len(curve):07}")
    about = {"identity": identity, "losses": losses}
    writer = tensor_writer(file, specs, about) if world.leads else nullcontext(ignore)
    with writer as write:
        for name, tensor in tensors.items():
            write(name, whole(tensor))
    if world.leads:
        write_text(directory / CURVE, "".join(json.dumps(point) + "\n" for point in curve))
        forget(directory, KEPT)


def ignore(name: str, tensor: Tensor) -> None:
    """What a process that does not lead writes."""


def resume(
    directory: Path, model: nn.Module, optimizer: Optimizer, identity: str, world: World
) -> list[float]:
    """Load the newest checkpoint that is whole into model and optimizer; the losses so far.

    None where there is no checkpoint, or one of another training. InputError where all are broken.
    """
    if (name := world.told(newest(directory, identity) if world.leads else None)) is None:
        return []
    opened: Any = safe_open
    with opened(directory / name, framework="pt") as file:
        losses: list[float] = json.loads(file.metadata()["losses"])
        fill(model, {key: file.get_tensor(f"model.{key}") for key in tensors_of(model)})
        names = file.keys()
        for key, parameter in model.named_parameters():
            own = [name for name in names if name.startswith(f"{key}/")]
            state = {name.removeprefix(f"{key}/"): file.get_tensor(name) for name in own}
            spread = {part: sharded_as(tensor, parameter) for part, tensor in state.items()}
            restore(optimizer, parameter, spread)
    return losses


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


def forget(directory: Path, keep: int = 0) -> None:
    """Delete all checkpoints but the last so many, and what a kill left of one; the curve stays."""
    kept = set(sorted(directory.glob(FILES))[-keep:] if keep else ())
    for file in set(directory.glob("training-*")) - kept:
        file.unlink()
