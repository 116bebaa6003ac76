"""lm-eval as a function: a model and task names in, estimates with per-sample values out.

Benchmarks that lm-eval knows read their data from the hub, or from local JSONL files with the same
columns. Two tasks are our own (``evals/tasks``); ``measure.tasks`` makes their rows.

lm-eval takes seconds to import and has no types: it is imported by name, where it is used.
"""

import contextlib
import io
import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import UndefinedError
from transformers import PreTrainedTokenizerBase

from compress.core.errors import InputError
from compress.measure.estimates import Estimate, exponential, mean_of, pooled, ratio_of
from compress.measure.likelihoods import asked, likelihoods
from compress.measure.task_files import data_files, file_task, take_shots
from compress.measure.tasks import OWN
from compress.model.find import shipped
from compress.sweep.stack import Stack
from compress.text.packing import require_tokens

LONGEST_WINDOW = 1024
# Of a forward of a task that generates text: [tokens, vocab] in float32.
LOGITS_BYTES = 2**26
# What lm-eval's own command line seeds the drawing of shots with.
SHOTS_SEED = 1234

# {task: {metric: estimate}}
TaskResults = dict[str, dict[str, Estimate]]


def nats_per_weight(samples: Sequence[tuple[float, float]]) -> Estimate:
    """Nats per byte or word from pairs of a log-likelihood and a count of them."""
    likelihoods, weights = np.asarray(samples, dtype=np.float64).T
    return ratio_of(-likelihoods, weights)


# By the name of lm-eval's aggregation function.
AGGREGATIONS: Mapping[str, Callable[[Any], Estimate]] = {
    "mean": mean_of,
    "perplexity": lambda samples: exponential(mean_of(-np.asarray(samples, dtype=np.float64))),
    "weighted_perplexity": lambda samples: exponential(nats_per_weight(samples)),
    "bits_per_byte": lambda samples: ratio_of(
        *(np.asarray(samples, dtype=np.float64) * (-1 / np.log(2), 1)).T
    ),
}


@cache
def manager(builtin: bool) -> Any:
    """lm-eval's index of tasks: ours, and only where asked for the many built-in ones (slow)."""
    with quiet():
        return import_module("lm_eval.tasks").TaskManager(
            include_path=str(shipped("evals", "tasks")), include_defaults=builtin
        )


class Tasks:
    """Task names resolved to lm-eval tasks, once for all models.

    ``rows`` are the files of our own tasks. With ``task_data`` every other name must be covered by
    a file of that directory (a group stands for its members that are); else lm-eval gets its data
    where it always does. ``notes`` says, once they are loaded, where the shots of a task are from.
    """

    def __init__(
        self, names: Sequence[str], rows: Mapping[str, Path], task_data: Path | None = None
    ) -> None:
        own = {name: {"test": file} for name, file in rows.items()}
        self.files = own | (data_files(task_data) if task_data else {})
        self.notes: dict[str, str] = {}
        self.members = {name: self.members_of(name, task_data) for name in names}
        builtin = [name for name in names if name not in rows]
        self.manager = manager(bool(builtin))
        for name in builtin:
            if name in OWN or name not in self.manager.all_tasks:
                raise InputError(
                    f"task {name!r} is not known to lm-eval, nor one that has rows here: "
                    f"{', '.join(rows) or 'none'}"
                )

    def members_of(self, name: str, task_data: Path | None) -> list[str] | None:
        """The tasks with a file that a name stands for; None leaves the name to lm-eval."""
        if name in self.files:
            return [name]
        if task_data is None:
            return None
        if members := [task for task in self.files if task.startswith(f"{name}_")]:
            return members
        raise InputError(
            f"{task_data} has no file for task {name!r}; it has: {', '.join(self.files)}"
        )

    def load(self, cache: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Fresh lm-eval tasks by name, and the tasks that each requested name stands for."""
        leaves = dict.fromkeys(task for listed in self.members.values() for task in listed or ())
        tasks: dict[str, Any] = {}
        if leaves:
            # lm-eval 0.4.13: overrides inherit the registered task only inside a group.
            overridden = [file_task(task, self.files[task], cache) for task in leaves]
            broken = import_module("datasets.exceptions").DatasetsError
            try:
                tasks |= self.manager.load([{"group": "local", "task": overridden}])["tasks"]
            except (KeyError, UndefinedError, broken) as error:
                reason = error.__cause__ or error
                raise InputError(f"rows of {', '.join(leaves)} do not fit: {reason}") from error
            for name in leaves:
                if note := take_shots(tasks[name], self.files[name]):
                    self.notes[name] = f"task {name}: {note}"
        members: dict[str, list[str]] = {}
        for name, listed in self.members.items():
            loaded = {} if listed else self.manager.load([name])["tasks"]
            tasks |= loaded
            members[name] = listed or list(loaded)
        for task in tasks.values():
            task.set_fewshot_seed(SHOTS_SEED)
        return tasks, members


def run_tasks(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, limit: int | None
) -> TaskResults:
    """Every metric of every task on one model, whose windows are at most ``LONGEST_WINDOW``.

    Likelihoods are sweeps; only tasks that generate text have the whole model in memory.
    ``limit`` takes the first documents of each task only.
    A name that stands for several tasks gets, beside theirs, the mean over all their samples.
    Metrics that are no mean, ratio or perplexity are left out: they have no standard error here.
    """
    with tempfile.TemporaryDirectory() as cache, quiet():
        adapter = adapted(stack, tokenizer)
        loaded, members = tasks.load(cache)
        kinds = {
            name: {metric: function.__name__ for metric, function in task.aggregation().items()}
            for name, task in loaded.items()
        }
        for task in loaded.values():
            # lm-eval's own aggregates are not read, and a perplexity beyond floats overflows there.
            task.aggregation = lambda: defaultdict(lambda: len)
        found = import_module("lm_eval").evaluate(
            adapter, {"tasks": loaded, "groups": {}}, limit=limit, bootstrap_iters=0
        )
    results = {name: task_estimates(kinds[name], found["samples"][name]) for name in loaded}
    for name, leaves in members.items():
        if leaves != [name]:
            means = {
                metric for leaf in leaves for metric in kinds[leaf] if kinds[leaf][metric] == "mean"
            }
            shared = sorted(means.intersection(*(results[leaf] for leaf in leaves)))
            results[name] = {m: pooled([results[leaf][m] for leaf in leaves]) for m in shared}
    return results


def adapted(stack: Stack, tokenizer: PreTrainedTokenizerBase) -> Any:
    """lm-eval's adapter of transformers models, for a stack.

    It raises InputError for an answer that its window cannot hold and for tokens that the model has
    no embedding of; lm-eval 0.4.13 fails an assertion without a message.
    """
    config = stack.model.config
    window = min(LONGEST_WINDOW, getattr(config, "max_position_embeddings", LONGEST_WINDOW))
    adapter = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=stack.model, tokenizer=tokenizer, backend="causal", max_length=window,
        batch_size=max(1, LOGITS_BYTES // (4 * window * config.vocab_size)),
    )  # fmt: skip
    generate = adapter.generate_until

    def swept(
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > window:
            raise InputError(
                f"a task has an answer of {longest} tokens, but the model's window is {window}; "
                "leave that task out"
            )
        for _, context, answer in requests:
            require_tokens([*context, *answer], config.vocab_size)
        return likelihoods(stack, [asked(*request[1:], window) for request in requests])

    def generated(requests: Sequence[Any], **options: Any) -> Any:
        adapter._device = stack.placement.device
        with stack.whole():
            return generate(requests, **options)

    adapter._loglikelihood_tokens, adapter.generate_until = swept, generated
    return adapter


def task_estimates(
    kinds: Mapping[str, str], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Estimate]:
    """Estimates of a task's metrics from lm-eval's log of samples, in the order of documents.

    ``kinds`` are the names of lm-eval's aggregation functions by metric.
    """
    values: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
    return {
        metric if chosen == "none" else f"{metric},{chosen}": AGGREGATIONS[kinds[metric]](listed)
        for (metric, chosen), listed in values.items()
        if kinds[metric] in AGGREGATIONS
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's many progress bars and notes; exceptions pass."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
