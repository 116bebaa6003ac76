"""The stages of a run as the command line calls them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.core.files import read_json
from compress.core.terminal import note
from compress.export.targets import Target
from compress.report.page import report as write_report
from compress.report.scores import print_scores
from compress.report.tables import print_candidates, print_results, print_table
from compress.run import evaluate as evaluating
from compress.run import score as scoring
from compress.run import search as searching
from compress.run import students, table
from compress.run.directory import Run, find_run, is_run, run_at, shown
from compress.run.guide import selected
from compress.run.recipe import Recipe, check, read_recipe
from compress.run.session import Session

# The main job on the embedded teacher: a budget that number formats alone do not reach.
QUICKSTART: dict[str, Any] = dict(
    budget="34%",
    space="joint",
    context="2k",
    trials=24,
    finalists=1,
    draws=8,
    select_tokens=4096,
    replay_tokens=2048,
    short_distill_tokens=49152,
    distill_batch_tokens=1024,
    learning_rate=6e-4,
)


def session_of(run: Run) -> Session:
    """The session of a run that exists."""
    return Session(run, read_recipe(run.path / "recipe.yaml"))


def score(run: Run, recipe: Recipe) -> None:
    """Score the teacher and print what matters most and least."""
    session = Session(run, recipe)
    print_scores(session.architecture.blocks, scoring.score(session))


def search(run: Run, recipe: Recipe) -> None:
    """Find and print the best candidates within the budget."""
    session = Session(run, recipe)
    if found := searching.search(session):
        budgets = [one.budget for one in session.at_each_budget()]
        missing = read_json(run.path / "baselines.json")
        print_candidates(found, missing, budgets, session.teacher_bytes)


def prune(run: Run, candidate: str | None) -> None:
    """Write a candidate's BF16 student."""
    session = session_of(run)
    found, _ = students.find_candidate(session, candidate)
    note(f"{found.id}: BF16 student in {students.pruned(session, found)}")


def distill(run: Run, candidate: str | None) -> None:
    """Train a candidate's student."""
    students.distill(session_of(run), candidate)


def finish(run: Run) -> list[str]:
    """Distil and export what was chosen, of a sweep for every budget; how commands name each."""
    rows = selected(run)
    if len(rows) < 2:
        distill(run, None)
        export(run, None)
        return [shown(run)]
    for row in rows:
        distill(run, row.id)
        export(run, row.id)
    return [f"{shown(run)}:{row.id}" for row in rows]


def quantize(run: Run, candidate: str | None) -> None:
    """Measure the latest student in BF16 and in its formats."""
    students.quantize(session_of(run), candidate)


def export(run: Run, candidate: str | None, target: Target | None = None) -> None:
    """Export the latest student in its formats, verified, for the run's target or another one."""
    recipe = read_recipe(run.path / "recipe.yaml")
    changed = recipe if target is None else recipe.changed(target=target)
    students.export(Session(run, changed), candidate)


def evaluate(
    names: Sequence[str],
    tasks: Sequence[str],
    as_json: bool,
    recipe: Recipe,
    task_data: Path | None = None,
    limit: int | None = None,
) -> None:
    """Compare models and runs, and print the tables or one JSON object.

    A run alone is its last table: the teacher and the best of every kind, before and after
    distillation.
    """
    alone = len(names) == 1 and is_run(names[0])
    if alone:
        session = Session(find_run(names[0])[0], recipe)
        found = table.final_table(session, tasks or ("choice",), task_data, limit)
    else:
        found = evaluating.evaluate(names, tasks, recipe, task_data, limit)
    if as_json:
        print(json.dumps(found))
        return
    if alone:
        print_last_table(session, found)
    print_results(found)


def print_last_table(session: Session, found: Mapping[str, Any]) -> None:
    """The table at equal bytes of an evaluation of the whole run."""
    rows = read_json(session.run.path / "table.json")
    print_table(rows, found, session.budget, session.teacher_bytes)


def quickstart() -> None:
    """The whole path on the embedded teacher: search, distil, export, evaluate, report."""
    run = run_at("quickstart")
    recipe = check(QUICKSTART, "quickstart")
    session = Session(run, recipe)
    search(run, recipe)
    students.export(session, None)
    found = table.final_table(session)
    print_last_table(session, found)
    write_report(run.path)
