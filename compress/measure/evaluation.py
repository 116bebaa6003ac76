"""How far models are from their teacher, how well they predict, and which differences are real.

Every figure keeps its per-sample values, so that two models on the same samples are compared by
paired differences.
"""

import itertools
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.core.errors import InputError
from compress.measure.estimates import Estimate, difference, mean_of, ratio_of
from compress.measure.lm_eval import TaskResults, Tasks, run_tasks
from compress.measure.losses import kl_from_hidden, nll_from_hidden, require_finite
from compress.model.build import load_model
from compress.model.modules import final_hidden, head_of

BATCH_TOKENS = 2048
# {metric: estimate} of the held-out text, or {task: {metric: estimate}}
Metrics = dict[str, Estimate]


def evaluate(
    models: Mapping[str, Path | PreTrainedModel],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows_RT: Tensor,
    *,
    tasks: Sequence[str] = (),
    task_rows: Mapping[str, Path] | None = None,
    task_data: Path | None = None,
    task_limit: int | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure models on held-out rows of tokens and on lm-eval tasks; one model in memory at once.

    Args:
        models: by name, loaded or to be loaded; the first is the reference of tables.
        teacher: what KL is measured from.
        tokenizer: the teacher's; students share it.
        rows_RT: packed held-out text; KL is over all its positions, nats over the tokens that
            are predicted, all but a row's first.
        tasks: our own (``choice``, ``rolling``) and any that lm-eval knows.
        task_rows: files of our own tasks by name, as ``harness.write_task_rows`` gives them.
        task_data: a directory of JSONL files that built-in tasks read instead of the hub.
        task_limit: take the first documents of each task only.
        sizes: bytes of the models; without it, bytes of their weights.
        progress: told in a few words what begins.

    Returns:
        ``{"models": {name: {"bytes", "kl", "nats_per_token", "bits_per_byte", "stderr": {...},
        "tasks": {task: {metric: value, "stderr": of the first metric, "METRIC_stderr": of the
        others}}}}, "paired": [{"a", "b", "metric", "difference": b - a, "stderr"}], "text":
        {"sequences", "tokens", "bytes"}, "samples": {task: count}}``. ``kl`` is in nats per token.
        Every pair of models is compared, ``a`` being the earlier one; task metrics are called
        ``task/metric``. A standard error is null where one sample gives none.
    """
    if not models:
        raise InputError("no model to evaluate")
    # Names are checked before the first model runs.
    resolved = Tasks(tasks, task_rows or {}, task_data) if tasks else None
    bytes_R = row_bytes(rows_RT, tokenizer)
    progress("teacher")
    teacher_hidden = [hidden.cpu() for _, hidden in hidden_states(teacher, rows_RT)]
    measured: dict[str, tuple[int, Metrics, TaskResults]] = {}
    for name, source in models.items():
        progress(name)
        model = load_model(source) if isinstance(source, Path) else source
        held_out = on_text(model, teacher, teacher_hidden, rows_RT, bytes_R)
        results = run_tasks(model, tokenizer, resolved, task_limit) if resolved else {}
        size = weight_bytes(source)
        measured[name] = (sizes[name] if sizes and name in sizes else size, held_out, results)
    return {
        "models": {name: model_json(*found) for name, found in measured.items()},
        "paired": paired(
            {name: flat(text, results) for name, (_, text, results) in measured.items()}
        ),
        "text": {
            "sequences": rows_RT.shape[0],
            "tokens": rows_RT.numel(),
            "bytes": int(bytes_R.sum()),
        },
        "samples": {
            task: len(next(iter(found.values())).influence)
            for _, _, results in measured.values()
            for task, found in results.items()
            if found
        },
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


@torch.no_grad()
def hidden_states(model: PreTrainedModel, rows_RT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of rows [batch, T] and the model's normed hidden states [batch, T, D]."""
    for rows_BT in torch.split(rows_RT, max(1, BATCH_TOKENS // rows_RT.shape[1])):
        rows = rows_BT.to(model.device)
        yield rows, final_hidden(model, rows)


@torch.no_grad()
def on_text(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    teacher_hidden: Sequence[Tensor],
    rows_RT: Tensor,
    bytes_R: np.ndarray[Any, Any],
) -> Metrics:
    """KL, nats per token and bits per byte, with one value per row."""
    kl_R: list[Tensor] = []
    nats_R: list[Tensor] = []
    head, teacher_head = head_of(model), head_of(teacher).to(model.device)
    for (rows, hidden), reference in zip(
        hidden_states(model, rows_RT), teacher_hidden, strict=True
    ):
        reference_ND = reference.to(model.device).flatten(0, 1)
        kl_N = kl_from_hidden(hidden.flatten(0, 1), head, reference_ND, teacher_head)
        nats_N = nll_from_hidden(hidden[:, :-1].flatten(0, 1), head, rows[:, 1:].flatten())
        kl_R.append(kl_N.reshape(len(rows), -1).double().mean(1).cpu())
        nats_R.append(nats_N.reshape(len(rows), -1).double().mean(1).cpu())
    require_finite(torch.cat([*kl_R, *nats_R]), "the logits of a model or of its teacher")
    nats = torch.cat(nats_R).numpy()
    return {
        "kl": mean_of(torch.cat(kl_R).numpy()),
        "nats_per_token": mean_of(nats),
        "bits_per_byte": ratio_of(nats * (rows_RT.shape[1] - 1) / math.log(2), bytes_R),
    }


def weight_bytes(source: Path | PreTrainedModel) -> int:
    """Bytes of all tensors: as stored, or as loaded (tied ones once)."""
    if isinstance(source, Path):
        return sum(stored_bytes(file) for file in sorted(source.glob("*.safetensors")))
    return sum(parameter.nbytes for parameter in source.parameters())


def stored_bytes(file: Path) -> int:
    """Bytes of the tensors of a safetensors file: what follows its header."""
    with file.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    return file.stat().st_size - 8 - int(header)


def model_json(size: int, text: Metrics, tasks: TaskResults) -> dict[str, Any]:
    """The figures of one model as ``evaluate`` returns them."""
    return {
        "bytes": size,
        **{metric: estimate.value for metric, estimate in text.items()},
        "stderr": {metric: estimate.stderr for metric, estimate in text.items()},
        "tasks": {task: task_json(metrics) for task, metrics in tasks.items()},
    }


def task_json(metrics: Metrics) -> dict[str, float | None]:
    """Values of a task's metrics; ``stderr`` belongs to the first."""
    found: dict[str, float | None] = {}
    for number, (metric, estimate) in enumerate(metrics.items()):
        found[metric] = estimate.value
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
            rows.append({"a": a, "b": b, "metric": metric, "difference": change, "stderr": stderr})
    return rows
