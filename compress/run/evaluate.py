"""The evaluation stage: models, runs and their students on held-out text and tasks.

A run alone is its last table: teacher and the best of every kind, before and after training.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import read_json, write_json
from compress.core.terminal import progress
from compress.measure.evaluation import Subject, compare
from compress.measure.lm_eval import Tasks
from compress.measure.tasks import OWN, write_task_rows
from compress.model.find import is_model
from compress.report.rows import Student, read_students, selected_of
from compress.run.directory import Run, by_path, find_run, is_run
from compress.run.recipe import Recipe, check, located, read_recipe
from compress.run.rounding import untrained
from compress.run.session import Session
from compress.run.students import find_candidate, latest
from compress.searches.space import KINDS
from compress.sweep.stack import stack_at

# Characters of held-out text on which two tokenizers have to agree.
SAME_TOKENS_ON = 20_000


@dataclass(frozen=True)
class Asked:
    """What is asked besides text: tasks, a directory of their data, documents of each at most."""

    tasks: Sequence[str] = ()
    data: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Named:
    """A name given to eval: how tables call it, and the run it stands for; None: a model."""

    name: str
    label: str
    run: Run | None


def resolved(names: Sequence[str]) -> list[Named]:
    """What each of the names stands for, each with a label of its own.

    A name of both a run and a model is the run's, or where that run is named once more the
    model's: a teacher and its student may be called alike.
    """
    targets = [find_run(name) if is_run(name) else None for name in names]
    found: list[Named] = []
    for number, (name, target) in enumerate(zip(names, targets, strict=True)):
        others = [other[0].path.resolve() for other in targets[number + 1 :] if other]
        if target and target[0].path.resolve() in others and is_model(name):
            target = None
        spelled = [name, by_path(*target)] if target else [name]
        labels = itertools.chain(spelled, (f"{name} ({n})" for n in itertools.count(2)))
        taken = {other.label for other in found}
        label = next(label for label in labels if label not in taken)
        found.append(Named(name, label, target and target[0]))
    return found


def recipe_for(names: Sequence[str], given: Mapping[str, Any]) -> Recipe:
    """The recipe to evaluate with: that of the first run among the names, changed by the flags.

    The teacher is the first name, or that run's where the first name is a run.
    """
    found = resolved(names)
    runs = [named.run for named in found if named.run]
    if not runs:
        return check({"model": names[0], **given}, "command line")
    kept = read_recipe(runs[0].path / "recipe.yaml")
    if found[0].run or located(names[0]) == kept.model:
        return kept.changed(**given)
    return kept.changed(**{"revision": None, **given}, model=names[0])


def evaluate(names: Sequence[str], asked: Asked, recipe: Recipe) -> dict[str, Any]:
    """Measure models and runs against the recipe's model; the result as ``eval --json`` prints it.

    A run stands for its export if there is one, else for its latest student in its formats. The
    result is also written to every run's ``eval/results.json``.
    """
    found = resolved(names)
    runs = [named.run for named in found if named.run]
    session = Session(runs[0] if runs else Run(Path("runs") / "eval"), recipe)
    subjects = {named.label: subject_of(session, named) for named in found}
    results = on_final_text(session, subjects, asked)
    for run in runs:
        write_json(run.path / "eval" / "results.json", results)
    return results


def teacher_subject(session: Session) -> Subject:
    """The session's teacher."""
    return Subject(lambda: session.stack, session.served_bytes)


def subject_of(session: Session, named: Named) -> Subject:
    """A model, or the student of a run (or RUN:CANDIDATE) as it is served."""
    if named.run is None:
        if located(named.name) == session.recipe.model:
            return teacher_subject(session)  # not loaded twice
        other = Session(session.run, session.recipe.changed(model=named.name, revision=None))
        require_same_tokens(session, other)
        return teacher_subject(other)
    run, wanted = find_run(named.name)
    other = Session(run, read_recipe(run.path / "recipe.yaml"))
    candidate, row = find_candidate(other, wanted)
    require_same_tokens(session, other)
    exported = run.path / "export" / candidate.id
    if exported.is_dir():
        return Subject(partial(stack_at, exported, session.placement), row.bytes)
    build = partial(stack_at, latest(other, candidate), session.placement)
    return Subject(build, row.bytes)


def require_same_tokens(teacher: Session, other: Session) -> None:
    """InputError where a model's own tokenizer reads the text otherwise than the teacher's."""
    own, theirs = (session.path / "tokenizer.json" for session in (other, teacher))
    if not (own.is_file() and theirs.is_file()) or own.read_bytes() == theirs.read_bytes():
        return
    # Not the packed rows: a model that was made to chat may end its texts with another token.
    text = "".join(teacher.splits["final"])[:SAME_TOKENS_ON]
    one, two = (
        session.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        for session in (teacher, other)
    )
    if one != two:
        raise InputError(
            f"{own} reads the text otherwise than {theirs}: KL compares the same tokens; compare "
            "models of one tokenizer"
        )


def on_final_text(
    session: Session, subjects: Mapping[str, Subject], asked: Asked
) -> dict[str, Any]:
    """``compare`` on the session's final split; rows of our own tasks come from it too."""
    recipe = session.recipe
    rows_RT = session.rows("final", recipe.final_tokens)
    directory = session.run.path / "eval" / "tasks"
    own, notes = write_task_rows(directory, session.splits["final"], asked.tasks, recipe.seed)
    names = [task for task in asked.tasks if task in own or task not in OWN]
    loaded = Tasks(names, own, asked.data) if names else None
    with progress("eval", len(subjects) + 1) as advance:
        found = compare(
            subjects, session.stack, session.tokenizer, rows_RT, loaded, task_limit=asked.limit,
            progress=lambda what: advance(1, what),
        )  # fmt: skip
    return found | {"notes": [*notes, *found["notes"]]}


def final_table(session: Session, asked: Asked) -> dict[str, Any]:
    """The last table: teacher and the best of every kind at equal bytes, before and after training.

    Written to ``eval/results.json`` and ``table.json``; only this reads the final text. The task is
    our own multiple choice where none is asked for.
    """
    rows = read_students(session.run.path)
    if len(selected_of(rows)) != 1:
        find_candidate(session, None)
    missing: list[Mapping[str, Any]] = read_json(session.run.path / "baselines.json")
    best = {row.kind: row for row in reversed(rows) if row.finalist}
    subjects = {"teacher": teacher_subject(session)}
    for kind in (kind for kind in KINDS if kind in best):
        candidate, row = find_candidate(session, best[kind].id)
        before, after = untrained(session, candidate), latest(session, candidate)
        students = {kind: before} if after == before else {kind: before, f"{kind} distilled": after}
        for name, directory in students.items():
            subjects[name] = Subject(partial(stack_at, directory, session.placement), row.bytes)
    found = on_final_text(session, subjects, replace(asked, tasks=asked.tasks or ("choice",)))
    write_json(session.run.path / "eval" / "results.json", found)
    write_json(session.run.path / "table.json", table_rows(found, best, missing))
    return found


def table_rows(
    found: Mapping[str, Any], best: Mapping[str, Student], missing: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of ``table.json``: one per kind, its figures before and after distillation."""
    models = found["models"]
    rows = []
    for kind in ("teacher", *(kind for kind in KINDS if kind in best)):
        row, after = models[kind], models.get(f"{kind} distilled")
        name = best[kind].id if kind in best else kind
        what = {"name": name, "kind": kind, "fits": kind != "teacher", "bytes": row["bytes"]}
        rows.append(what | figures(row, "") | (figures(after, "distilled_") if after else {}))
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
