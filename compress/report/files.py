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
from compress.memory.footprint import Deployment, Footprint, footprint
from compress.model.architecture import Architecture, from_json

Rows = list[dict[str, Any]]
# What a row of table.json may leave out.
TABLE_ROW: dict[str, Any] = {
    "kind": "",
    "bytes": None,
    "fits": True,
    "kl": None,
    "kl_se": None,
    "distilled_kl": None,
    "distilled_kl_se": None,
    "nats_per_token": None,
    "distilled_nats_per_token": None,
    "choice_accuracy": None,
    "choice_se": None,
    "distilled_choice_accuracy": None,
    "distilled_choice_se": None,
}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """``teacher.json``: what was compressed, for which deployment, into how many bytes."""

    name: str
    note: str
    architecture: Architecture
    deployment: Deployment
    footprint: Footprint
    budget: int | None


@dataclass(frozen=True, kw_only=True)
class Student:
    """A row of ``candidates.json``; ``repaired`` counts blocks."""

    id: str
    kind: str
    budget: int | None
    bytes: int
    parameters: int
    architecture: Architecture
    predicted_kl: float | None
    measured_kl: float | None
    measured_se: float | None
    distilled_kl: float | None
    finalist: bool
    selected: bool
    repaired: int

    @property
    def kl(self) -> float | None:
        """The latest figure: after distillation if it had any."""
        return self.measured_kl if self.distilled_kl is None else self.distilled_kl


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

    @property
    def selected(self) -> Student | None:
        """The student that the run stands for: the one marked, else the best."""
        marked = [student for student in self.students if student.selected]
        return next(iter([*marked, *self.students]), None)


def read_run(path: Path) -> RunFiles:
    """Read a run directory; InputError when it is none, or when a file is not what it should be."""
    if not (path / "recipe.yaml").is_file() and not (path / "teacher.json").is_file():
        raise InputError(f"{path} is not a run: it has neither recipe.yaml nor teacher.json")
    students = tuple(read_student(path, row) for row in rows_of(path / "candidates.json"))
    run = RunFiles(
        name=path.resolve().name,
        recipe=text_of(path / "recipe.yaml"),
        teacher=read_teacher(path / "teacher.json"),
        students=students,
        baselines=rows_of(path / "baselines.json", "kind", "reason"),
        curves={
            file.parent.name: having(read_lines(file), ("tokens", "loss"), file)
            for file in sorted(path.glob("distill/*/curve.jsonl"))
        },
        results=read_results(path / "eval" / "results.json"),
        table=[TABLE_ROW | row for row in rows_of(path / "table.json", "name")],
        keep=None,
    )
    if run.selected is None:
        return run
    keep = read_keep(path / "candidates" / run.selected.id / "keep.safetensors")
    teacher = run.teacher
    if teacher and run.selected.budget is not None:
        # Of a sweep, the budget of the student that the run stands for.
        teacher = replace(teacher, budget=run.selected.budget)
    return replace(run, keep=keep, teacher=teacher)


def optional(file: Path) -> Any:
    """The JSON of a file, None if it is not there."""
    return read_json(file) if file.is_file() else None


def text_of(file: Path) -> str | None:
    """The text of a file, None if it is not there."""
    return file.read_text(encoding="utf-8") if file.is_file() else None


def rows_of(file: Path, *keys: str) -> Rows:
    """A JSON list of objects that have ``keys``, empty if the file is not there."""
    rows = optional(file)
    if rows is not None and not (
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    ):
        raise InputError(f"{file} is not a list of objects")
    return having(rows or [], keys, file)


def having(rows: Rows, keys: Sequence[str], file: Path) -> Rows:
    """The rows themselves, if each has all keys; InputError names what is missing."""
    for number, row in enumerate(rows, start=1):
        if missing := [key for key in keys if key not in row]:
            raise InputError(f"{file}, row {number} has no {missing[0]!r}")
    return rows


def read_results(file: Path) -> dict[str, Any] | None:
    """What ``eval --json`` printed: at least one model with its figures, and paired differences."""
    results: dict[str, Any] | None = optional(file)
    if results is None:
        return None
    try:
        having(list(results["models"].values()), ("bytes", "kl", "nats_per_token", "tasks"), file)
        having(results["paired"], ("a", "b", "metric", "difference", "stderr"), file)
        next(iter(results["models"]))
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{file} is not an evaluation: {error!r}") from error
    return results


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


def read_teacher(file: Path) -> Teacher | None:
    """The teacher, its memory computed from its architecture."""
    data = optional(file)
    if data is None:
        return None
    try:
        architecture = from_json(json.dumps(data["architecture"]))
        deployment = Deployment(**data["deployment"])
        return Teacher(
            name=data["name"],
            note=data.get("note") or "",
            architecture=architecture,
            deployment=deployment,
            footprint=footprint(architecture, deployment),
            budget=data["budget"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not a teacher's: {error!r}") from error


def read_student(path: Path, row: Mapping[str, Any]) -> Student:
    """One candidate."""
    try:
        return Student(
            id=row["id"],
            kind=row["kind"],
            budget=row.get("budget"),
            bytes=row["bytes"],
            parameters=row["parameters"],
            architecture=from_json(json.dumps(row["architecture"])),
            predicted_kl=row.get("predicted_kl"),
            measured_kl=row.get("measured_kl"),
            measured_se=row.get("measured_se"),
            distilled_kl=row.get("distilled_kl"),
            finalist=row.get("finalist", False),
            selected=row.get("selected", False),
            repaired=len(row.get("repaired", ())),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'candidates.json'} has a row without {error}") from error


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
