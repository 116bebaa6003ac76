"""The training loop: AdamW, warmup, plateau and decay, clipping, checkpoints, exact resume.

What differs between pretraining and distillation is the loss, a function of the step. Everything
random is a function of (seed, step), so that a resumed run is the uninterrupted one, bit for bit.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.core import terminal
from compress.core.files import fingerprint
from compress.core.signals import stoppable
from compress.train.care import BAD_STEPS, Events, NotFinite
from compress.train.checkpoints import History, load_weights, resume, save
from compress.train.masters import Masters, Roundings
from compress.train.optimizers import Optimizer, optimizer_of, set_rate
from compress.train.recipes import OptimizerName, PrecisionName
from compress.train.world import ALONE, World, give_back, sharded, tensors_of, whole

CLIP = 1.0

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one training runs; ``data`` is a digest of what it runs on, to recognize a checkpoint.

    ``start`` names the weights it begins with; empty, they are digested.
    A checkpoint is written every ``checkpoint_every`` steps, but not before ``checkpoint_seconds``
    have passed since the last, and so many times what writing that one took. Validation is every
    ``validate_every`` steps, and at the end; after ``patience`` in a row that were worse than the
    best (0: however many) the training ends, and is what it was after the best.
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
    precision: PrecisionName | None = None
    data: str = ""
    start: str = ""
    loss: str = ""
    validate_every: int = 0
    patience: int = 0


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
    loss_of: Callable[[nn.Module, int], Loss],
    settings: TrainSettings,
    *,
    what: str = "train",
    directory: Path | None = None,
    progress: Progress | None = None,
    after_step: Callable[[nn.Module, int], Mapping[str, float] | None] | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    world: World = ALONE,
    roundings: Roundings | None = None,
) -> list[CurvePoint]:
    """Train what requires a gradient in ``model``, in place; the curve, a point per step.

    With a directory there are checkpoints, the last one at the end, and an unfinished training of
    the same start and settings continues bit for bit (to rounding with another number of
    processes); any other is started over. Asked to end by SIGINT or SIGTERM, it writes one after
    its step and raises KeyboardInterrupt.
    ``loss_of`` gives a step's loss, or parts that add up to it, for batches larger than memory; in
    a world of several processes each gives its part of it. It is given the module that trains,
    which then is a sharded copy of ``model`` and computes in its forward pass alone.
    ``what`` names the progress bar, which a ``progress`` of the caller's replaces. ``after_step``
    runs after every update (its figures join the progress report). It may change buffers of the
    module, which checkpoints keep, and nothing else. With ``roundings`` of parameters by name their
    masters are trained and kept, and losses are of what these round to. ``validate`` measures the
    module; its first figure decides what is best. Steps whose loss or gradient is not finite are
    skipped, and no points of the curve; what is out of the ordinary is in ``EVENTS``. InputError
    after ``BAD_STEPS`` of them in a row.
    """
    rates = settings.learning_rate, settings.weight_decay
    # Taken before a checkpoint is loaded: the same start, settings and text are the same training.
    identity = identity_of(model, settings) if directory else ""
    trained = sharded(model, world)
    masters = Masters(trained, roundings) if roundings else None
    optimizer = optimizer_of(trained, settings.optimizer, *rates)
    with in_place(masters):
        past = resume(directory, trained, optimizer, identity, world) if directory else History()
    losses, events = past.losses, Events(directory if world.leads else None)
    first, written, cost = len(losses), time.monotonic(), 0.0
    began = written
    left = settings.steps - first if world.leads else 0
    reporting = nullcontext(progress) if progress else shown(what, left)
    with stoppable() as asked, reporting as report:
        while (step := len(losses)) < settings.steps and not past.turned(settings.patience):
            # Of what rounds stochastically.
            torch.manual_seed((settings.seed * 1_000_003 + step) * world.size + world.rank)
            loss = loss_of(trained, step)
            try:
                losses.append(update(trained, optimizer, loss, step, settings, world, masters))
            except NotFinite as error:
                losses.append(math.nan)
                events.add("skipped", step + 1, reason=str(error))
                if past.skipped == BAD_STEPS:
                    raise
            events.spike(losses)
            done = step + 1
            figures = dict(after_step(trained, done) or {}) if after_step else {}
            last, every = done == settings.steps, settings.validate_every
            if validate and every and (last or done % every == 0):
                measured = dict(validate(trained))
                past.validations.append((done, next(iter(measured.values()))))
                events.add("validation", done, **measured)
                figures |= measured
            pause = settings.checkpoint_seconds * max(1.0, cost)
            due = done % settings.checkpoint_every == 0 and time.monotonic() - written >= pause
            best = settings.patience > 0 and past.best == done
            due |= last or best or past.turned(settings.patience)
            ending, due = world.any(asked(), due and world.leads)
            if directory and (due or ending):
                begun = time.monotonic()
                points = [dataclasses.asdict(point) for point in curve_of(losses, settings)]
                with in_place(masters):
                    save(directory, trained, optimizer, past, points, identity, world)
                written = time.monotonic()
                cost = written - begun
            speed = (done - first) * settings.batch_tokens / (time.monotonic() - began)
            now = {"loss": losses[-1], "lr": rate_at(step, settings), "tokens/s": speed}
            report(done, settings.steps, now | figures)
            if ending:
                events.add("interrupted", done)
                raise KeyboardInterrupt
    kept = past.best if settings.patience else None
    if directory and kept is not None and kept != len(losses):
        events.add("turned", len(losses), best=kept)
        with in_place(masters):
            load_weights(directory, kept, trained)
    give_back(trained, model)
    return curve_of(losses, settings)


def in_place(masters: Masters | None) -> AbstractContextManager[None]:
    """A model with the weights that are trained, where its forward passes have others."""
    return masters.in_place() if masters else nullcontext()


def update(
    model: nn.Module, optimizer: Optimizer, loss: Loss, step: int, settings: TrainSettings,
    world: World = ALONE, masters: Masters | None = None,
) -> float:  # fmt: skip
    """One step down the gradient; the loss of all processes. NotFinite where there is none to take.

    Of a loss in parts, only one part's graph is in memory at a time.
    """
    value = 0.0
    for part in (loss,) if isinstance(loss, Tensor) else loss:
        value += part.item()
        torch.autograd.backward(part)
    value = world.sum(torch.tensor(value, dtype=torch.float64)).item()
    norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
    if not (math.isfinite(value) and math.isfinite(norm)):
        optimizer.zero_grad()
        found = f"gradient is {norm}" if math.isfinite(value) else f"loss is {value}"
        raise NotFinite(
            f"the {found} at step {step + 1} of {settings.steps}; a lower learning_rate (now "
            f"{settings.learning_rate:g}) usually helps"
        )
    set_rate(optimizer, rate_at(step, settings))
    if settings.optimizer == "adamw8bit":
        # Its rounding draws random numbers.
        torch.manual_seed(settings.seed * 1_000_003 + step)
    with in_place(masters):
        optimizer.step()
    optimizer.zero_grad()
    return value


def curve_of(losses: list[float], settings: TrainSettings) -> list[CurvePoint]:
    """The curve that the losses of the first steps make; skipped ones have no point."""
    tokens, rate = settings.batch_tokens, partial(rate_at, settings=settings)
    return [
        CurvePoint(step=step + 1, tokens=(step + 1) * tokens, loss=loss, lr=rate(step))
        for step, loss in enumerate(losses)
        if not math.isnan(loss)
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


def identity_of(model: nn.Module, settings: TrainSettings) -> str:
    """What recognizes the same training again: its settings and the weights it starts from.

    When checkpoints are written changes nothing of it.
    """
    asked = dataclasses.asdict(settings)
    asked = {key: value for key, value in asked.items() if not key.startswith("checkpoint")}
    weights = {} if settings.start else {name: digest(w) for name, w in tensors_of(model).items()}
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
