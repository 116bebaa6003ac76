"""The last table of a run: teacher and the best of every kind, before and after training."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.core.files import read_json, write_json
from compress.core.quantities import format_bytes
from compress.core.terminal import note, table
from compress.measure.evaluation import Subject
from compress.report.rows import Student, read_students, selected_of
from compress.run.evaluate import on_final_text, plus_minus, teacher_subject
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


def print_table(session: Session, found: Mapping[str, Any]) -> None:
    """The last table on the terminal, and whether anything beats the joint student."""
    rows = read_json(session.run.path / "table.json")
    whole = session.teacher_bytes
    # Where the text gives no rows for the task choice there are no columns for it.
    choice = any(row.get("choice_accuracy") is not None for row in rows)
    columns = [
        *("student", "bytes", "", "KL", "KL distilled", "nats", "nats dist."),
        *(("choice", "choice dist.") if choice else ()),
    ]
    lines = []
    for row in rows:
        kind = row["kind"].replace("_", " ")
        if row["kind"] != "teacher" and not row["fits"]:
            lines.append([kind, "does not fit", *[""] * (len(columns) - 2)])
            continue
        cells = [kind, format_bytes(row["bytes"]), f"{row['bytes'] / whole:.0%}"]
        for key, error, digits in (
            ("kl", "kl_se", 4), ("nats_per_token", None, 4), ("choice_accuracy", "choice_se", 3)
        ):  # fmt: skip
            cells += [
                plus_minus(
                    row.get(prefix + key), row.get(prefix + error) if error else None, digits
                )
                for prefix in ("", "distilled_")
            ]
        lines.append(cells[: len(columns)])
    tokens = found["text"]["tokens"]
    table(f"Within {session.budget.description}, on {tokens} tokens of final text", columns, lines)
    for pair in found["paired"]:
        if pair["metric"] == "kl" and pair["b"].startswith("joint") and pair["a"] != "teacher":
            same = pair["a"].endswith("distilled") == pair["b"].endswith("distilled")
            if same:
                shift = plus_minus(pair["difference"], pair["stderr"], sign="+")
                note(f"{pair['b']} minus {pair['a']}: KL {shift}")
