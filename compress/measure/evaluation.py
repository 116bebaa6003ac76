"""How far models are from their teacher, how well they predict, and which differences are real.

Every figure keeps its per-sample values, so that two models on the same samples are compared by
paired differences.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress.measure.estimates import Estimate, difference, finite, mean_of, ratio_of
from compress.measure.lm_eval import TaskResults, Tasks, run_tasks
from compress.measure.losses import check_finite, kl_from_hidden, nll_from_hidden
from compress.model.modules import Head
from compress.sweep.stack import Stack, final_states

BATCH_TOKENS = 2048
# {metric: estimate} of the held-out text, or {task: {metric: estimate}}
Metrics = dict[str, Estimate]


@dataclass(frozen=True)
class Subject:
    """A model to measure: what gives its stack, and the bytes that it takes to serve."""

    build: Callable[[], Stack]
    bytes: int


def compare(
    subjects: Mapping[str, Subject],
    teacher: Stack,
    tokenizer: PreTrainedTokenizerBase,
    rows_RT: Tensor,
    tasks: Tasks | None = None,
    *,
    task_limit: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure models on held-out rows of tokens and on lm-eval tasks.

    The first subject is the reference of tables. KL is from the teacher, whose tokenizer all share.
    ``rows_RT`` is packed held-out text: KL is over all its positions, nats over the tokens that are
    predicted, all but a row's first. ``task_limit`` takes the first documents of each task only;
    ``progress`` is told in a few words what begins.

    Returns:
        ``{"models": {name: {"bytes", "kl", "nats_per_token", "bits_per_byte", "stderr": {...},
        "tasks": {task: {metric: value, "stderr": of the first metric, "METRIC_stderr": of the
        others}}}}, "paired": [{"a", "b", "metric", "difference": b - a, "stderr"}], "text":
        {"sequences", "tokens", "bytes"}, "samples": {task: count}, "notes": [...]}``. ``kl`` is in
        nats per token. Every pair of models is compared, ``a`` being the earlier one; task metrics
        are called ``task/metric``. A standard error is null where one sample gives none, a task's
        metric where it is not finite. Notes are what a reader of the figures must know.

    Raises:
        InputError: a model's predictions of the text are not finite.
    """
    bytes_R = row_bytes(rows_RT, tokenizer)
    progress("teacher")
    text = predicted(teacher, rows_RT)
    found: dict[str, tuple[Metrics, TaskResults]] = {}
    for name, subject in subjects.items():
        progress(name)
        stack = subject.build()
        held_out = on_text(predicted(stack, rows_RT), text, rows_RT, bytes_R, name)
        found[name] = held_out, {}
        if tasks:
            found[name] = held_out, run_tasks(stack, tokenizer, tasks, task_limit)
    sequences, tokens = rows_RT.shape[0], rows_RT.numel()
    return {
        "models": {
            name: {"bytes": subjects[name].bytes, **model_json(*parts)}
            for name, parts in found.items()
        },
        "paired": paired({name: flat(*parts) for name, parts in found.items()}),
        "text": {"sequences": sequences, "tokens": tokens, "bytes": int(bytes_R.sum())},
        "samples": {
            task: len(next(iter(metrics.values())).influence)
            for _, results in found.values()
            for task, metrics in results.items()
            if metrics
        },
        "notes": list(tasks.notes.values()) if tasks else [],
    }


def row_bytes(rows_RT: Tensor, tokenizer: PreTrainedTokenizerBase) -> np.ndarray[Any, Any]:
    """UTF-8 bytes of the text behind the predicted tokens of each row: all but its first.

    A row is decoded as a whole, special tokens left out: they cost nats but are no text. A
    character that a row's edge cuts counts as the replacement character.
    """
    decoded = tokenizer.batch_decode(
        rows_RT[:, 1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return np.array([len(text.encode()) for text in decoded])


@dataclass(frozen=True)
class Predicted:
    """A model's predictions of rows: final hidden states [batch, T, D] a batch, and its head."""

    hidden: Sequence[Tensor]
    head: Head


def in_batches(rows_RT: Tensor) -> tuple[Tensor, ...]:
    """Rows as they are worked on together."""
    return torch.split(rows_RT, max(1, BATCH_TOKENS // rows_RT.shape[1]))


def predicted(stack: Stack, rows_RT: Tensor) -> Predicted:
    """A stack's predictions of rows, by one sweep."""
    hidden = final_states(stack, in_batches(rows_RT))
    with stack.head() as head:
        return Predicted(hidden, head)


@torch.no_grad()
def on_text(
    model: Predicted,
    teacher: Predicted,
    rows_RT: Tensor,
    bytes_R: np.ndarray[Any, Any],
    name: str = "the model",
) -> Metrics:
    """KL, nats per token and bits per byte, with one value per row."""
    kl_R: list[Tensor] = []
    nats_R: list[Tensor] = []
    head, batches = model.head, zip(in_batches(rows_RT), model.hidden, teacher.hidden, strict=True)
    for rows, hidden, reference in batches:
        reference_ND, targets = reference.flatten(0, 1), rows[:, 1:].flatten().to(hidden.device)
        kl_N = kl_from_hidden(hidden.flatten(0, 1), head, reference_ND, teacher.head)
        check_finite(kl_N, name, reference_ND, teacher.head, "the teacher")
        nats_N = nll_from_hidden(hidden[:, :-1].flatten(0, 1), head, targets)
        kl_R.append(kl_N.reshape(len(rows), -1).double().mean(1).cpu())
        nats_R.append(nats_N.reshape(len(rows), -1).double().mean(1).cpu())
    nats = torch.cat(nats_R).numpy()
    return {
        "kl": mean_of(torch.cat(kl_R).numpy()),
        "nats_per_token": mean_of(nats),
        "bits_per_byte": ratio_of(nats * (rows_RT.shape[1] - 1) / math.log(2), bytes_R),
    }


def model_json(text: Metrics, tasks: TaskResults) -> dict[str, Any]:
    """The figures of one model as ``compare`` returns them."""
    return {
        **{metric: finite(estimate.value) for metric, estimate in text.items()},
        "stderr": {metric: estimate.stderr for metric, estimate in text.items()},
        "tasks": {task: task_json(metrics) for task, metrics in tasks.items()},
    }


def task_json(metrics: Metrics) -> dict[str, float | None]:
    """Values of a task's metrics; ``stderr`` belongs to the first."""
    found: dict[str, float | None] = {}
    for number, (metric, estimate) in enumerate(metrics.items()):
        found[metric] = finite(estimate.value)
        found[f"{metric}_stderr" if number else "stderr"] = estimate.stderr
    return found


def flat(text: Metrics, tasks: TaskResults) -> Metrics:
    """All metrics of a model under one name each."""
    return text | {
        f"{task}/{metric}": estimate
        for task, metrics in tasks.items()
        for metric, estimate in metrics.items()
    }


def paired(models: Mapping[str, Metrics]) -> list[dict[str, Any]]:
    """Differences ``b - a`` of every metric between every two models, paired over samples."""
    rows = []
    for a, b in itertools.combinations(models, 2):
        for metric in models[a]:
            change, stderr = difference(models[a][metric], models[b][metric])
            figures = {"difference": finite(change), "stderr": stderr}
            rows.append({"a": a, "b": b, "metric": metric, **figures})
    return rows
