"""The files of a run directory as values; what has not been written yet is None or empty."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.report.rows import Student, Teacher, read_students, read_teacher, selected_of

Rows = list[dict[str, Any]]
FIGURES = ("kl", "kl_se", "nats_per_token", "choice_accuracy", "choice_se")
# What a row of table.json may leave out; its figures are before and after distillation.
TABLE_ROW: dict[str, Any] = {"kind": "", "fits": True, "bytes": None} | dict.fromkeys(
    [*FIGURES, *(f"distilled_{figure}" for figure in FIGURES)]
)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Everything that a report shows."""

    name: str
    recipe: str | None
    teacher: Teacher | None
    students: tuple[Student, ...]
    baselines: Rows
    curves: Mapping[str, Rows]
    results: dict[str, Any] | None
    table: Rows
    keep: Mapping[str, NDArray[np.int64]] | None
    # What number formats cost, as scores predict.
    sensitivity: Mapping[str, Rows] | None
    # The student that the run stands for: the one marked, else the best.
    selected: Student | None


def read_run(path: Path) -> RunFiles:
    """Read a run directory; InputError when it is none, or when a file is not what it should be."""
    recipe = path / "recipe.yaml"
    if not recipe.is_file() and not (path / "teacher.json").is_file():
        raise InputError(f"{path} is not a run: it has neither recipe.yaml nor teacher.json")
    students, teacher, keep = read_students(path), read_teacher(path), None
    if selected := next(iter([*selected_of(students), *students]), None):
        keep = read_keep(path / "candidates" / selected.id / "keep.safetensors")
        # Of a sweep, the budget of the student that the run stands for.
        teacher = teacher and replace(teacher, budget=selected.budget)
    return RunFiles(
        name=path.resolve().name,
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        teacher=teacher,
        students=students,
        baselines=rows_of(path / "baselines.json", "kind", "reason"),
        curves={
            file.parent.name: having(read_lines(file), ("tokens", "loss"), file)
            for file in sorted(path.glob("distill/*/curve.jsonl"))
        },
        results=read_results(path / "eval" / "results.json"),
        table=[TABLE_ROW | row for row in rows_of(path / "table.json", "name")],
        keep=keep,
        sensitivity=read_sensitivity(path),
        selected=selected,
    )


def rows_of(file: Path, *keys: str) -> Rows:
    """A JSON list of objects that have ``keys``, empty if the file is not there."""
    rows = read_json(file) if file.is_file() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file} is not a list of objects")
    return having(rows, keys, file)


def having(rows: Rows, keys: Sequence[str], file: Path) -> Rows:
    """The rows themselves, if each has all keys; InputError names what is missing."""
    for number, row in enumerate(rows, start=1):
        if missing := [key for key in keys if key not in row]:
            raise InputError(f"{file}, row {number} has no {missing[0]!r}")
    return rows


def read_results(file: Path) -> dict[str, Any] | None:
    """What ``eval --json`` printed: at least one model with its figures, and paired differences."""
    if not file.is_file():
        return None
    results: dict[str, Any] = read_json(file)
    try:
        having(list(results["models"].values()), ("bytes", "kl", "nats_per_token", "tasks"), file)
        having(results["paired"], ("a", "b", "metric", "difference", "stderr"), file)
        next(iter(results["models"]))
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{file} is not an evaluation: {error!r}") from error
    return results


def read_sensitivity(path: Path) -> Mapping[str, Rows] | None:
    """What scoring a run said of number formats; None where it did not."""
    file = path / "scores" / "sensitivity.json"
    if not file.is_file():
        return None
    found = read_json(file)
    if not isinstance(found, dict) or not {"groups", "curve"} <= found.keys():
        raise InputError(f"{file} has no groups and no curve")
    having(found["groups"], ("kind", "group", "format", "saved", "kl", "most", "where"), file)
    having(found["curve"], ("bits", "bytes", "kl", "format"), file)
    return found


def read_lines(file: Path) -> Rows:
    """JSON lines; a last line that a killed process left half-written is ignored."""
    lines = file.read_text(encoding="utf-8").splitlines()
    rows: Rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{file}, line {number} is not JSON: {error}") from error
    return rows


def read_keep(file: Path) -> Mapping[str, NDArray[np.int64]] | None:
    """Kept indices of a candidate, None if it was not written."""
    if not file.is_file():
        return None
    try:
        keep = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is corrupt: {error}") from error
    if "blocks" not in keep:
        raise InputError(f"{file} has no tensor 'blocks'")
    return keep
