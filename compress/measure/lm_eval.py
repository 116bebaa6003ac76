"""lm-eval as a function: a model and task names in, estimates with per-sample values out.

Benchmarks that lm-eval knows read their data from the hub, or from local JSONL files with the same
columns. Two tasks are our own (``evals/tasks``); ``harness`` makes their rows.

lm-eval takes seconds to import and has no types: it is imported by name, where it is used.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.core.errors import InputError
from compress.measure.estimates import Estimate, exponential, mean_of, pooled, ratio_of
from compress.model.find import shipped
from compress.text.packing import require_tokens

# Longer windows would only make the logits of one forward bigger: [tokens, vocab] in float32.
LONGEST_WINDOW = 1024
LOGITS_BYTES = 2**28

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


def data_files(task_data: Path) -> dict[str, Path]:
    """JSONL files of a directory by task name.

    ``piqa/validation.jsonl`` belongs to ``piqa``, ``blimp/adjunct_island.jsonl`` to
    ``blimp_adjunct_island``.
    """
    if not task_data.is_dir():
        raise InputError(f"task data {task_data} is not a directory")
    found = {}
    for file in sorted(task_data.glob("*/*.jsonl")):
        whole = file.stem in ("train", "validation", "test")
        found[file.parent.name if whole else f"{file.parent.name}_{file.stem}"] = file
    return found


@cache
def known_tasks(directory: Path, builtin: bool) -> Any:
    """lm-eval's manager of a directory's tasks, and of its built-in ones: seconds to read."""
    manager = import_module("lm_eval.tasks").TaskManager
    with quiet():
        return manager(include_path=str(directory), include_defaults=builtin)


class Tasks:
    """Task names resolved to lm-eval tasks, once for all models.

    ``rows`` are the files of our own tasks. With ``task_data`` every other name must be covered by
    a file of that directory (a group stands for its members that are); else lm-eval gets its data
    where it always does.
    """

    def __init__(
        self, names: Sequence[str], rows: Mapping[str, Path], task_data: Path | None = None
    ) -> None:
        self.files = dict(rows) | (data_files(task_data) if task_data else {})
        self.members = {name: self.members_of(name, task_data) for name in names}
        builtin = [name for name in names if name not in rows]
        directory = shipped("evals", "tasks")
        self.manager = known_tasks(directory, bool(builtin))
        for name in builtin:
            if name not in self.manager.all_tasks or (directory / f"{name}.yaml").is_file():
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
            tasks |= self.manager.load([{"group": "local", "task": overridden}])["tasks"]
        members: dict[str, list[str]] = {}
        for name, listed in self.members.items():
            loaded = self.manager.load([name])["tasks"] if listed is None else {}
            tasks |= loaded
            members[name] = listed or list(loaded)
        return tasks, members


def file_task(task: str, file: Path, cache: str) -> dict[str, Any]:
    """A registered task reading one local JSONL file, its other splits and its dataset absent.

    The cache is our own: the shared one of datasets may hold rows of an older file of that name.
    """
    if not file.is_file():
        raise InputError(f"{file}, the rows of task {task!r}, does not exist")
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": cache},
        "training_split": None,
        "validation_split": None,
        "fewshot_split": None,
        "test_split": "test",
    }


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    limit: int | None = None,
) -> TaskResults:
    """Every metric of every task on one model, whose windows are at most ``LONGEST_WINDOW``.

    ``limit`` takes the first documents of each task only.
    A name that stands for several tasks gets, beside theirs, the mean over all their samples.
    Metrics that are no mean, ratio or perplexity are left out: they have no standard error here.
    """
    window = min(LONGEST_WINDOW, getattr(model.config, "max_position_embeddings", LONGEST_WINDOW))
    with tempfile.TemporaryDirectory() as cache, quiet(), without_cache(model):
        adapter = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=window,
            batch_size=max(1, LOGITS_BYTES // (4 * window * model.config.vocab_size)),
        )
        require_requests(adapter, window, model.config.vocab_size)
        loaded, members = tasks.load(cache)
        found = import_module("lm_eval").simple_evaluate(
            model=adapter,
            tasks=list(loaded.values()),
            task_manager=tasks.manager,
            limit=limit,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    results = {name: task_estimates(loaded[name], found["samples"][name]) for name in loaded}
    for name, leaves in members.items():
        if leaves != [name]:
            means = {
                metric
                for leaf in leaves
                for metric, function in loaded[leaf].aggregation().items()
                if function.__name__ == "mean"
            }
            shared = means.intersection(*(results[leaf] for leaf in leaves))
            results[name] = {
                metric: pooled([results[leaf][metric] for leaf in leaves])
                for metric in sorted(shared)
            }
    return results


def require_requests(adapter: Any, window: int, vocab: int) -> None:
    """Make the adapter raise InputError for an answer that its window cannot hold.

    So it does for tokens that the model has no embedding of. lm-eval 0.4.13 fails an assertion
    without a message.
    """
    score = adapter._loglikelihood_tokens

    def checked(requests: Sequence[tuple[Any, Any, Sequence[int]]], **options: Any) -> Any:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > window:
            raise InputError(
                f"a task has an answer of {longest} tokens, but the model's window is {window}; "
                "leave that task out"
            )
        for _, context, answer in requests:
            require_tokens([*context, *answer], vocab)
        return score(requests, **options)

    adapter._loglikelihood_tokens = checked


def task_estimates(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Estimates of a task's metrics from lm-eval's log of samples, in the order of documents."""
    values: dict[str, list[Any]] = {}
    functions: dict[str, str] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            values.setdefault(name, []).append(sample[metric])
            functions[name] = task.aggregation()[metric].__name__
    return {
        name: AGGREGATIONS[functions[name]](listed)
        for name, listed in values.items()
        if functions[name] in AGGREGATIONS
    }


@contextlib.contextmanager
def without_cache(model: PreTrainedModel) -> Iterator[None]:
    """A model that keeps no KV cache: lm-eval does not ask for one and does not use it."""
    before = model.config.use_cache
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's many progress bars and notes; exceptions pass."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    evaluator = import_module("lm_eval.evaluator")
    # lm-eval 0.4.13 asks git for the commit of the folder it runs in, and git complains on the
    # terminal where that is no repository.
    silent = mock.patch.object(evaluator, "get_git_commit_hash", return_value=None)
    try:
        with (
            silent,
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        logger.setLevel(level)
