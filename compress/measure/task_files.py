"""Local JSONL files that lm-eval's tasks read instead of the hub, their shots included."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.text.sources import read_rows

# Files of a task's directory by what they are for: the first there is asked.
ASKED = ("validation", "test", "train")


def data_files(task_data: Path) -> dict[str, dict[str, Path]]:
    """JSONL files of a directory by task name: the rows asked (test) and those for shots (train).

    ``piqa/validation.jsonl`` belongs to ``piqa``, which takes its shots from ``piqa/train.jsonl``;
    ``blimp/adjunct_island.jsonl`` belongs to ``blimp_adjunct_island``.
    """
    if not task_data.is_dir():
        raise InputError(f"task data {task_data} is not a directory")
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(task_data.glob("*/*.jsonl")):
        if file.stem not in ASKED:
            found[f"{file.parent.name}_{file.stem}"] = {"test": file}
            continue
        whole = [file.with_stem(stem) for stem in ASKED if file.with_stem(stem).is_file()]
        shots = {"train": whole[-1]} if len(whole) > 1 and whole[-1].stem == "train" else {}
        found[file.parent.name] = {"test": whole[0]} | shots
    return found


def file_task(task: str, files: Mapping[str, Path], cache: str) -> dict[str, Any]:
    """A registered task reading local JSONL files, its other splits and its dataset absent.

    The cache is our own: the shared one of datasets may hold rows of an older file of that name.
    """
    for file in files.values():
        if not file.is_file():
            raise InputError(f"{file}, the rows of task {task!r}, does not exist")
        if not list(read_rows(file)):
            raise InputError(f"{file}, the rows of task {task!r}, is empty")
    data = {split: str(file) for split, file in files.items()}
    absent = ("dataset_name", "training_split", "validation_split", "fewshot_split")
    read = {"data_files": data, "cache_dir": cache}
    own = {"task": task, "dataset_path": "json", "dataset_kwargs": read, "test_split": "test"}
    return own | dict.fromkeys(absent)


def take_shots(task: Any, files: Mapping[str, Path]) -> str | None:
    """Let no prompt of a local task hold the row that it asks; what a reader must know of it.

    Shots are drawn from the train file, rows that are asked left out; without one from the rows
    asked, but for the row of the prompt. There are as many as the task wants or these rows give.
    """
    wanted = task.config.num_fewshot or 0
    shots = task.config.fewshot_config
    if not wanted or shots.samples is not None:
        # Some tasks bring their shots with them.
        return None
    own = "train" in files
    # lm-eval 0.4.13 leaves the asked row out of shots whose split has the name of the one asked.
    shots.split = "train" if own else "test"
    asked = Counter(map(row_key, task.eval_docs))
    pool = [row for row in task.fewshot_docs() if not own or row_key(row) not in asked]
    given = min(wanted, len(pool) if own else len(pool) - max(asked.values()))
    task.sampler.replace_df(pool)
    task.set_config("num_fewshot", given)
    said = f"{given} of {wanted} shots"
    if own:
        few = f"{said}: {files['train']} has no more rows that are not asked"
        return few if given < wanted else None
    file = files["test"]
    better = f"; {file.with_name('train.jsonl')} would be taken" if file.stem in ASKED else ""
    return f"{said}, from the other rows that are asked{better}"


def row_key(row: Mapping[str, Any]) -> str:
    """What is the same for two rows that are."""
    return json.dumps(row, sort_keys=True, default=str)
