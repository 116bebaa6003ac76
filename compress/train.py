"""The training loop: AdamW, warmup, plateau and decay, clipping, checkpoints, exact resume.

What differs between pretraining and distillation is the loss, a function of the step. Everything
random is a function of (seed, step), so that a resumed run is the uninterrupted one, bit for bit.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.errors import InputError

STATE = "training.json"
CURVE = "curve.jsonl"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
BETAS = (0.9, 0.95)
CLIP = 1.0
QUIET_SECONDS = 15.0

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one training runs; ``data`` is a digest of what it runs on, to recognize a checkpoint."""

    steps: int
    batch_tokens: int
    learning_rate: float
    warmup: int
    decay: int
    weight_decay: float
    seed: int
    checkpoint_every: int
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One step of a training: the tokens seen with it, its loss in nats per token, its rate."""

    step: int
    tokens: int
    loss: float
    lr: float


def train(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    settings: TrainSettings,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
    after_step: Callable[[int], Mapping[str, float] | None] | None = None,
) -> list[CurvePoint]:
    """Train what requires a gradient in ``model``, in place; the curve, a point per step.

    With a directory there is a checkpoint every ``checkpoint_every`` steps and at the end, and an
    unfinished training of the same settings continues; one of other settings is started over.
    ``after_step`` runs after every update (its figures join the progress report). It may change
    buffers of the model, which checkpoints keep, and nothing else.

    Raises:
        InputError: the loss is not finite; the message names the step.
    """
    report = progress or print_rarely()
    optimizer = optimizer_of(model, settings)
    curve = [] if directory is None else resume(directory, model, optimizer, settings)
    for step in range(len(curve), settings.steps):
        rate = rate_at(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step)
        if not math.isfinite(value := loss.item()):
            raise InputError(
                f"the loss is {value} at step {step + 1} of {settings.steps}; a lower "
                f"learning_rate (now {settings.learning_rate:g}) usually helps"
            )
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tokens = (step + 1) * settings.batch_tokens
        curve.append(CurvePoint(step=step + 1, tokens=tokens, loss=value, lr=rate))
        figures = after_step(step + 1) if after_step else None
        done = step + 1
        if directory and (done % settings.checkpoint_every == 0 or done == settings.steps):
            save(directory, model, optimizer, settings, curve)
        report(done, settings.steps, {"loss": value, "lr": rate, **(figures or {})})
    return curve


def rate_at(step: int, settings: TrainSettings) -> float:
    """Learning rate of a step: linear warmup, plateau, linear decay that would end at zero."""
    up = (step + 1) / max(settings.warmup, 1)
    down = (settings.steps - step) / max(settings.decay, 1)
    return settings.learning_rate * min(up, 1.0, down)


def optimizer_of(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms, biases and the Mamba scalars are left alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS)


def batch_at(rows: Tensor, step: int, batch: int, seed: int, shift: bool = False) -> Tensor:
    """Rows of a step: every epoch in its own order, an incomplete batch filled by the next epoch.

    With ``shift`` the rows are one stream, cut anew at a random place in each epoch.
    """
    count, length = rows.shape
    places = torch.arange(step * batch, (step + 1) * batch)
    starts = []
    for epoch in range(step * batch // count, (step * batch + batch - 1) // count + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        offset = torch.randint(length, (), generator=generator) if shift else 0
        within = places[places // count == epoch] % count
        starts.append(order[within] * length + offset)
    positions = torch.cat(starts)[:, None] + torch.arange(length)
    return rows.reshape(-1)[positions % rows.numel()]


def save(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    settings: TrainSettings,
    curve: list[CurvePoint],
) -> None:
    """Write a checkpoint: tensors first, then the JSON that makes it the current one."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in kept(model).items()}
    for name, parameter in model.named_parameters():
        if state := optimizer.state.get(parameter):
            tensors |= {f"{key}.{name}": state[key] for key in MOMENTS}
    file = f"training-{len(curve):07}.safetensors"
    save_file(tensors, directory / file)
    points = "".join(json.dumps(dataclasses.asdict(point)) + "\n" for point in curve)
    (directory / CURVE).write_text(points)
    state_json = {"step": len(curve), "file": file, "settings": dataclasses.asdict(settings)}
    partial = directory / (STATE + ".partial")
    partial.write_text(json.dumps(state_json, indent=1))
    partial.replace(directory / STATE)
    for old in directory.glob("training-*.safetensors"):
        if old.name != file:
            old.unlink()


def resume(
    directory: Path, model: nn.Module, optimizer: torch.optim.AdamW, settings: TrainSettings
) -> list[CurvePoint]:
    """Load the directory's checkpoint into model and optimizer; the curve up to it, else empty."""
    if not (directory / STATE).is_file():
        return []
    state: dict[str, Any] = json.loads((directory / STATE).read_text())
    if state["settings"] != dataclasses.asdict(settings):
        return []
    try:
        tensors = load_file(directory / state["file"])
    except (OSError, SafetensorError) as error:
        raise InputError(f"the checkpoint in {directory} is broken ({error}); delete it") from error
    model.load_state_dict({name: tensors[f"model.{name}"] for name in kept(model)}, strict=False)
    for name, parameter in model.named_parameters():
        if f"step.{name}" in tensors:
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in MOMENTS}
    lines = (directory / CURVE).read_text().splitlines()[: state["step"]]
    return [CurvePoint(**json.loads(line)) for line in lines]


def kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def forget(directory: Path) -> None:
    """Delete the checkpoint of a finished training; the curve stays."""
    (directory / STATE).unlink(missing_ok=True)
    for file in directory.glob("training-*.safetensors"):
        file.unlink()


def digest(rows: Tensor) -> str:
    """What recognizes the same rows again."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def print_rarely() -> Progress:
    """A progress report that prints a plain line at most every 15 seconds, and the last one."""
    started = last = time.monotonic()
    first = 0

    def report(step: int, steps: int, figures: dict[str, float]) -> None:
        nonlocal last, first
        first = first or step
        now = time.monotonic()
        if now - last < QUIET_SECONDS and step < steps:
            return
        last = now
        left = (now - started) / (step - first + 1) * (steps - step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"step {step}/{steps}  {values}  {left:.0f} s left", flush=True)

    return report
