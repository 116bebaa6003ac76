"""The last table of a run: teacher and the best of every kind, before and after training."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.core.files import read_json, write_json
from compress.measure.evaluation import Subject
from compress.report.rows import Student, read_students, selected_of
from compress.run.evaluate import on_final_text, teacher_subject
from compress.run.session import Session
from compress.run.students import find_candidate, in_formats, latest, pruned
from compress.searches.space import KINDS
from compress.student.candidate import Candidate


def final_table(
    session: Session,
    tasks: Sequence[str] = ("choice",),
    task_data: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The last table: teacher and the best of every kind at equal bytes, before and after training.

    Written to ``eval/results.json`` and ``table.json``; only this reads the final text.
    """
    students = read_students(session.run.path)
    if len(selected_of(students)) != 1:
        find_candidate(session, None)
    missing: list[Mapping[str, Any]] = read_json(session.run.path / "baselines.json")
    best: dict[str, Student] = {}
    for student in students:
        if student.finalist:
            best.setdefault(student.kind, student)
    subjects = {"teacher": teacher_subject(session)}
    for kind in (kind for kind in KINDS if kind in best):
        candidate, row = find_candidate(session, best[kind].id)
        for name, directory in students_of(session, candidate, kind):
            build = partial(in_formats, session, candidate, directory)
            subjects[name] = Subject(build, row.bytes)
    found = on_final_text(session, subjects, tasks, task_data, limit)
    write_json(session.run.path / "eval" / "results.json", found)
    write_json(session.run.path / "table.json", table_rows(found, best, missing))
    return found


def students_of(session: Session, candidate: Candidate, kind: str) -> list[tuple[str, Path]]:
    """Name and directory of a candidate's student before and, if it was trained, after."""
    before, after = pruned(session, candidate), latest(session, candidate)
    found = [(kind, before)]
    return found if after == before else [*found, (f"{kind} distilled", after)]


def table_rows(
    found: Mapping[str, Any],
    best: Mapping[str, Student],
    missing: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Rows of ``table.json``: one per kind, its figures before and after distillation."""
    models = found["models"]
    rows = []
    for kind in ("teacher", *(kind for kind in KINDS if kind in best)):
        row, after = models[kind], models.get(f"{kind} distilled")
        rows.append(
            {
                "name": best[kind].id if kind in best else kind,
                "kind": kind,
                "fits": kind != "teacher",
                "bytes": row["bytes"],
                **figures(row, ""),
                **(figures(after, "distilled_") if after else {}),
            }
        )
    rows += [{"name": row["kind"], "kind": row["kind"], "fits": False} for row in missing]
    return rows


def figures(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A model's figures under a prefix."""
    choice = row["tasks"].get("choice", {})
    errors = row.get("stderr") or {}
    return {
        f"{prefix}kl": row["kl"],
        f"{prefix}kl_se": errors.get("kl"),
        f"{prefix}nats_per_token": row["nats_per_token"],
        f"{prefix}choice_accuracy": choice.get("acc"),
        f"{prefix}choice_se": choice.get("stderr"),
    }
