"""The training loop: AdamW, warmup, plateau and decay, clipping, checkpoints, exact resume.

What differs between pretraining and distillation is the loss, a function of the step. Everything
random is a function of (seed, step), so that a resumed run is the uninterrupted one, bit for bit.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.core import terminal
from compress.core.errors import InputError
from compress.core.files import fingerprint, read_json, write_json, write_text
from compress.model.tensor_files import save_tensors
from compress.train.optimizers import Optimizer, optimizer_of, restore, set_rate, state_of
from compress.train.recipes import OptimizerName

STATE = "training.json"
CURVE = "curve.jsonl"
CLIP = 1.0

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one training runs; ``data`` is a digest of what it runs on, to recognize a checkpoint.

    ``start`` names the weights it begins with; empty, they are digested.
    A checkpoint is written every ``checkpoint_every`` steps, but not before ``checkpoint_seconds``
    have passed since the last, and so many times what writing that one took.
    """

    steps: int
    batch_tokens: int
    learning_rate: float
    warmup: int
    decay: int
    weight_decay: float
    seed: int
    checkpoint_every: int = 1
    checkpoint_seconds: float = 0.0
    optimizer: OptimizerName = "adamw"
    data: str = ""
    start: str = ""


# A step's loss, or parts of it that add up.
Loss = Tensor | Iterable[Tensor]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One step of a training: the tokens seen with it, its loss in nats per token, its rate."""

    step: int
    tokens: int
    loss: float
    lr: float


def train(
    model: nn.Module,
    loss_of: Callable[[int], Loss],
    settings: TrainSettings,
    *,
    what: str = "train",
    directory: Path | None = None,
    progress: Progress | None = None,
    after_step: Callable[[int], Mapping[str, float] | None] | None = None,
) -> list[CurvePoint]:
    """Train what requires a gradient in ``model``, in place; the curve, a point per step.

    With a directory there are checkpoints, the last one at the end, and an unfinished training of
    the same start and settings continues bit for bit; any other is started over.
    ``loss_of`` gives a step's loss, or parts that add up to it, for batches larger than memory.
    ``what`` names the progress bar, which a ``progress`` of the caller's replaces. ``after_step``
    runs after every update (its figures join the progress report). It may change buffers of the
    model, which checkpoints keep, and nothing else. InputError names the step where the loss is not
    finite.
    """
    rates = settings.learning_rate, settings.weight_decay
    optimizer = optimizer_of(model, settings.optimizer, *rates)
    # Taken before a checkpoint is loaded: the same start, settings and text are the same training.
    identity = identity_of(model, settings) if directory else ""
    losses = resume(directory, model, optimizer, identity) if directory else []
    left = settings.steps - len(losses)
    written, cost = time.monotonic(), 0.0
    with nullcontext(progress) if progress else shown(what, left) as report:
        for step in range(len(losses), settings.steps):
            losses.append(update(model, optimizer, loss_of(step), step, settings))
            done = step + 1
            figures = after_step(done) if after_step else None
            pause = settings.checkpoint_seconds * max(1.0, cost)
            due = done % settings.checkpoint_every == 0 and time.monotonic() - written >= pause
            if directory and (due or done == settings.steps):
                begun = time.monotonic()
                save(directory, model, optimizer, curve_of(losses, settings), identity)
                written = time.monotonic()
                cost = written - begun
            rate = rate_at(step, settings)
            report(done, settings.steps, {"loss": losses[-1], "lr": rate, **(figures or {})})
    return curve_of(losses, settings)


def update(
    model: nn.Module, optimizer: Optimizer, loss: Loss, step: int, settings: TrainSettings
) -> float:
    """One step down the gradient; the loss, which must be finite.

    Of a loss in parts, only one part's graph is in memory at a time.
    """
    value = 0.0
    for part in (loss,) if isinstance(loss, Tensor) else loss:
        value += part.item()
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} at step {step + 1} of {settings.steps}; a lower "
                f"learning_rate (now {settings.learning_rate:g}) usually helps"
            )
        torch.autograd.backward(part)
    set_rate(optimizer, rate_at(step, settings))
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    if settings.optimizer == "adamw8bit":
        # Its rounding draws random numbers.
        torch.manual_seed(settings.seed * 1_000_003 + step)
    optimizer.step()
    optimizer.zero_grad()
    return value


def curve_of(losses: list[float], settings: TrainSettings) -> list[CurvePoint]:
    """The curve that the losses of the first steps make."""
    tokens, rate = settings.batch_tokens, partial(rate_at, settings=settings)
    return [
        CurvePoint(step=step + 1, tokens=(step + 1) * tokens, loss=loss, lr=rate(step))
        for step, loss in enumerate(losses)
    ]


def rate_at(step: int, settings: TrainSettings) -> float:
    """Learning rate of a step: linear warmup, plateau, linear decay that would end at zero."""
    up = (step + 1) / max(settings.warmup, 1)
    down = (settings.steps - step) / max(settings.decay, 1)
    return settings.learning_rate * min(up, 1.0, down)


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
    optimizer: Optimizer,
    curve: list[CurvePoint],
    identity: str,
) -> None:
    """Write a checkpoint: tensors first, then the JSON that makes it the current one."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in kept(model).items()}
    for name, parameter in model.named_parameters():
        for key, tensor in state_of(optimizer, parameter).items():
            tensors[f"{name}/{key}"] = tensor
    file = f"training-{len(curve):07}.safetensors"
    save_tensors(tensors, directory / file)
    points = map(dataclasses.asdict, curve)
    write_text(directory / CURVE, "".join(json.dumps(point) + "\n" for point in points))
    losses = [point.loss for point in curve]
    write_json(directory / STATE, {"file": file, "identity": identity, "losses": losses})
    for old in directory.glob("training-*"):
        if old.name != file:
            old.unlink()


def resume(directory: Path, model: nn.Module, optimizer: Optimizer, identity: str) -> list[float]:
    """Load the directory's checkpoint into model and optimizer; the losses so far, else none."""
    if not (directory / STATE).is_file():
        return []
    state = read_json(directory / STATE)
    if state["identity"] != identity:
        return []
    try:
        tensors = load_file(directory / state["file"])
    except (OSError, SafetensorError) as error:
        raise InputError(f"the checkpoint in {directory} is broken ({error}); delete it") from error
    model.load_state_dict({name: tensors[f"model.{name}"] for name in kept(model)}, strict=False)
    for name, parameter in model.named_parameters():
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        restore(optimizer, parameter, own)
    losses: list[float] = state["losses"]
    return losses


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
    for file in directory.glob("training-*"):
        file.unlink()


def identity_of(model: nn.Module, settings: TrainSettings) -> str:
    """What recognizes the same training again: its settings and the weights it starts from.

    When checkpoints are written changes nothing of it.
    """
    asked = dataclasses.asdict(settings)
    asked = {key: value for key, value in asked.items() if not key.startswith("checkpoint")}
    weights = {} if settings.start else {name: digest(w) for name, w in kept(model).items()}
    return fingerprint({"settings": asked, "weights": weights})


def digest(tensor: Tensor) -> str:
    """The sha256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)}".encode()
    return hashlib.sha256(head + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@contextmanager
def shown(what: str, steps: int) -> Iterator[Progress]:
    """Progress as the terminal shows it: a bar for the ``steps`` to go, in a pipe a few lines."""
    with terminal.progress(what, steps) as advance:

        def report(step: int, steps: int, figures: dict[str, float]) -> None:
            values = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            advance(1, f"step {step}  {values}")

        yield report
