"""The evaluation stage: models, runs and their students on held-out text and tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.core.errors import InputError
from compress.core.files import read_json, write_json
from compress.core.quantities import format_bytes
from compress.core.terminal import note, progress, table
from compress.measure.evaluation import evaluate as measure_models
from compress.measure.tasks import write_task_rows
from compress.model.build import load
from compress.report.rows import Student, read_students, selected_of
from compress.run.directory import Run, find_run, is_run
from compress.run.recipe import Recipe, check, located, read_recipe
from compress.run.session import Session
from compress.run.students import find_candidate, in_formats, latest, pruned
from compress.searches.space import KINDS
from compress.student.candidate import Candidate

CHOICE_ROWS = 200
ROLLING_CHARACTERS = 40000


class Built(Mapping[str, Any]):
    """Models by name, each built when it is looked up: one at a time is in memory."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self.makers = makers

    def __getitem__(self, name: str) -> Any:
        """The model, built anew."""
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        """Names, in order."""
        return iter(self.makers)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.makers)


def recipe_for(names: Sequence[str], given: Mapping[str, Any]) -> Recipe:
    """The recipe to evaluate with: that of the first run among the names, changed by the flags.

    The teacher is the first name, or that run's where the first name is a run.
    """
    runs = [name for name in names if is_run(name)]
    if not runs:
        return check({"model": names[0], **given}, "command line")
    kept = read_recipe(find_run(runs[0])[0].path / "recipe.yaml")
    if is_run(names[0]) or located(names[0]) == kept.model:
        return kept.changed(**given)
    return kept.changed(**{"revision": None, **given}, model=names[0])


def evaluate(
    names: Sequence[str],
    tasks: Sequence[str],
    recipe: Recipe,
    task_data: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure models and runs against the recipe's model; the result as ``eval --json`` prints it.

    A run stands for its export if there is one, else for its latest student in its formats. The
    result is also written to every run's ``eval/results.json``.
    """
    runs = [find_run(name)[0] for name in names if is_run(name)]
    session = Session(runs[0] if runs else Run(Path("runs") / "eval"), recipe)
    makers: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    teacher = next((name for name in names if located(name) == recipe.model), None)
    for name in names:
        if name == teacher and name not in makers:
            makers[name], sizes[name] = partial(getattr, session, "model"), session.teacher_bytes
        elif is_run(name):
            # The name of a directory may be that of its run as well.
            label = f"{name} (run)" if name == teacher else name
            makers[label], sizes[label] = run_model(name)
        elif name not in makers:
            other = Session(session.run, recipe.changed(model=name, revision=None))
            require_same_tokens(session, other)
            makers[name], sizes[name] = partial(getattr, other, "model"), other.teacher_bytes
    found = on_final_text(session, Built(makers), sizes, tasks, task_data, limit)
    for run in runs:
        write_json(run.path / "eval" / "results.json", found)
    return found


def require_same_tokens(teacher: Session, other: Session) -> None:
    """InputError where a model's own tokenizer reads the text otherwise than the teacher's."""
    own, theirs = (session.path / "tokenizer.json" for session in (other, teacher))
    if not (own.is_file() and theirs.is_file()) or own.read_bytes() == theirs.read_bytes():
        return
    tokens = teacher.recipe.final_tokens
    if not torch.equal(other.rows("final", tokens), teacher.rows("final", tokens)):
        raise InputError(
            f"{own} reads the text otherwise than {theirs}: KL compares the same tokens; compare "
            "models of one tokenizer"
        )


def run_model(name: str) -> tuple[Callable[[], Any], int]:
    """What builds the model of a run (or RUN:CANDIDATE), and the bytes it takes to serve."""
    run, wanted = find_run(name)
    recipe = read_recipe(run.path / "recipe.yaml")
    session = Session(run, recipe)
    candidate, row = find_candidate(session, wanted)
    exported = run.path / "export" / candidate.id
    if exported.is_dir():
        return partial(load, exported), row.bytes
    return partial(in_formats, session, candidate, latest(session, candidate)), row.bytes


def on_final_text(
    session: Session,
    models: Mapping[str, Any],
    sizes: Mapping[str, int],
    tasks: Sequence[str],
    task_data: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """``evaluate`` on the session's final split; rows of our own tasks come from it too."""
    recipe = session.recipe
    own = write_task_rows(
        session.run.path / "eval" / "tasks", session.splits["final"], CHOICE_ROWS,
        ROLLING_CHARACTERS, recipe.seed,
    ) if {"choice", "rolling"} & set(tasks) else {}  # fmt: skip
    with progress("eval", len(models) + 1) as advance:
        return measure_models(
            models, session.model, session.tokenizer, session.rows("final", recipe.final_tokens),
            tasks=tasks, task_rows=own, task_data=task_data, task_limit=limit, sizes=sizes,
            progress=lambda what: advance(1, what),
        )  # fmt: skip


def print_results(found: Mapping[str, Any]) -> None:
    """The evaluation as tables: models, then paired differences with standard errors."""
    tasks = sorted({task for row in found["models"].values() for task in row["tasks"]})
    text = found["text"]
    table(
        f"Held-out text: {text['tokens']} tokens in {text['sequences']} sequences",
        ["model", "bytes", "KL", "nats/token", "bits/byte", *tasks],
        [[name, *cells(row, tasks)] for name, row in found["models"].items()],
    )
    pairs = [
        [f"{pair['b']} - {pair['a']}", pair["metric"], f"{pair['difference']:+.4f}",
         "" if pair["stderr"] is None else f"{pair['stderr']:.4f}"]
        for pair in found["paired"] if pair["metric"] in ("kl", "nats_per_token")
        or pair["metric"].endswith(("acc", "acc_norm"))
    ]  # fmt: skip
    if pairs:
        table("Paired differences", ["models", "metric", "difference", "stderr"], pairs, left=2)


def cells(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """A model's figures."""
    errors = row.get("stderr") or {}

    def figure(key: str) -> str:
        error = errors.get(key)
        return f"{row[key]:.4f}" + (f" ± {error:.4f}" if error is not None else "")

    found = [
        format_bytes(row["bytes"]),
        figure("kl"),
        figure("nats_per_token"),
        figure("bits_per_byte"),
    ]
    for task in tasks:
        metrics = row["tasks"].get(task, {})
        names = [key for key in metrics if "stderr" not in key]
        found.append(f"{metrics[names[0]]:.3f} ± {metrics['stderr']:.3f}" if names else "")
    return found


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
    makers: dict[str, Callable[[], Any]] = {"teacher": partial(getattr, session, "model")}
    sizes = {"teacher": session.teacher_bytes}
    for kind in (kind for kind in KINDS if kind in best):
        candidate, row = find_candidate(session, best[kind].id)
        for name, directory in students_of(session, candidate, kind):
            makers[name] = partial(in_formats, session, candidate, directory)
            sizes[name] = row.bytes
    found = on_final_text(session, Built(makers), sizes, tasks, task_data, limit)
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

    def pm(value: float | None, error: float | None, digits: int = 4) -> str:
        if value is None:
            return ""
        return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    lines = []
    for row in rows:
        kind = row["kind"].replace("_", " ")
        if row["kind"] != "teacher" and not row["fits"]:
            lines.append([kind, "does not fit", *[""] * 7])
            continue
        lines.append(
            [kind, format_bytes(row["bytes"]), f"{row['bytes'] / whole:.0%}",
             pm(row["kl"], row["kl_se"]), pm(row.get("distilled_kl"), row.get("distilled_kl_se")),
             pm(row["nats_per_token"], None), pm(row.get("distilled_nats_per_token"), None),
             pm(row["choice_accuracy"], row["choice_se"], 3),
             pm(row.get("distilled_choice_accuracy"), row.get("distilled_choice_se"), 3)]
        )  # fmt: skip
    table(
        f"Within {session.budget.description}, on {found['text']['tokens']} tokens of final text",
        ["student", "bytes", "", "KL", "KL distilled", "nats", "nats dist.", "choice",
         "choice dist."],
        lines,
    )  # fmt: skip
    for pair in found["paired"]:
        if pair["metric"] == "kl" and pair["b"].startswith("joint") and pair["a"] != "teacher":
            same = pair["a"].endswith("distilled") == pair["b"].endswith("distilled")
            if same:
                shift = f"{pair['difference']:+.4f} ± {pair['stderr']:.4f}"
                note(f"{pair['b']} minus {pair['a']}: KL {shift}")
