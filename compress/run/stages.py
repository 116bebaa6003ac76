"""The stages of a run as the command line calls them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.core.files import read_json
from compress.core.quantities import format_bytes
from compress.core.terminal import command, note
from compress.export.readers import Reader
from compress.export.serving import serving
from compress.export.student import export_student
from compress.export.verify import verify as verify_export
from compress.measure.kl import mean_kl
from compress.memory.budget import in_format
from compress.model.build import is_plain
from compress.model.checkpoint import open_checkpoint
from compress.report.files import read_sensitivity
from compress.report.page import report as write_report
from compress.report.rows import read_students, selected_of
from compress.report.scores import print_scores
from compress.report.tables import print_candidates, print_results, print_table
from compress.run import evaluate as evaluating
from compress.run import score as scoring
from compress.run import search as searching
from compress.run import students
from compress.run.directory import Run, find_run, is_run, run_at, shown
from compress.run.evaluate import Asked
from compress.run.recipe import Recipe, check
from compress.run.rounding import pruned
from compress.run.session import Session
from compress.run.work import require_stage
from compress.student.candidate import repair_note
from compress.sweep.placement import placement
from compress.sweep.stack import stack_at, stack_of
from compress.train.optimizers import require as require_optimizer
from compress.train.precision import numerics_of

# The main job on the embedded teacher: a budget that number formats alone do not reach.
QUICKSTART: dict[str, Any] = dict(
    budget="34%", space="joint", context="2k", trials=24, finalists=1, draws=8,
    select_tokens=4096, replay_tokens=2048, short_distill_tokens=49152,
    distill_batch_tokens=1024, learning_rate=6e-4,
)  # fmt: skip


def score(run: Run, recipe: Recipe) -> None:
    """Score the teacher and print what matters most and least."""
    session = Session(run, recipe)
    scores = scoring.score(session)
    print_scores(session.architecture, scores, read_sensitivity(session.run.path))


def search(run: Run, recipe: Recipe) -> None:
    """Find and print the best candidates within the budget."""
    session = Session(run, recipe)
    if found := searching.search(session):
        budgets = [one.budget for one in session.at_each_budget()]
        missing = read_json(run.path / "baselines.json")
        print_candidates(found, missing, budgets, session.teacher_bytes)


def prune(run: Run, recipe: Recipe, name: str | None = None) -> None:
    """Write a candidate's BF16 student."""
    session = Session(run, recipe)
    candidate, _ = students.find_candidate(session, name)
    note(f"{candidate.id}: BF16 student in {pruned(session, candidate)}")


def distill(run: Run, recipe: Recipe, name: str | None = None) -> None:
    """Train the candidate for the whole distance and say what it bought."""
    distill_one(run, recipe, name)
    students.forget_states(run)


def distill_one(run: Run, recipe: Recipe, name: str | None) -> None:
    """Train a candidate; its teacher's states stay for the next one."""
    session = Session(run, recipe)
    require_optimizer(recipe.optimizer, session.placement)
    numerics_of(recipe.precision, recipe.emulate, session.placement)
    candidate, _ = students.find_candidate(session, name)
    for stage, tokens in (("local", recipe.local_tokens), ("distill", recipe.distill_tokens)):
        if tokens:
            require_stage(stage, candidate.architecture, recipe, session.placement, 1.0)
    text = session.reference(session.rows("select", 2 * recipe.select_tokens))
    asked = candidate.id, text, recipe.local_tokens
    before, after = students.trained(session, candidate, recipe.distill_tokens, *asked)
    if after is None:
        note(f"{candidate.id} is the teacher itself (KL {before:.4f}): nothing to train")
        return
    note(
        f"{candidate.id}: KL {before:.4f} before, {after:.4f} after {trained_for(recipe)} "
        f"(select text, in its formats); student in {students.latest(session, candidate)}"
    )
    if not after < before:
        note(
            f"training made {candidate.id} worse, so that student is not of it; a lower "
            f"learning_rate than {recipe.learning_rate:g} or more distill_tokens may help"
        )


def trained_for(recipe: Recipe) -> str:
    """For how many tokens the chosen student is trained, and how."""
    said = f"{recipe.distill_tokens} tokens"
    if recipe.local_tokens:
        said = f"{recipe.local_tokens} tokens a block and {said}"
    return said


def quantize(run: Run, recipe: Recipe, name: str | None = None) -> None:
    """Say what the formats of the latest student cost."""
    session = Session(run, recipe)
    candidate, _ = students.find_candidate(session, name)
    directory, cut = students.latest(session, candidate), pruned(session, candidate)
    text = session.reference(session.rows("select", recipe.select_tokens))
    plain = in_format(candidate.architecture, "bf16")
    whole = mean_kl(stack_of(open_checkpoint(cut), session.placement, plain), text)
    served = mean_kl(stack_at(directory, session.placement), text)
    formats = ", ".join(sorted(candidate.architecture.formats))
    note(f"{candidate.id}: KL {whole:.4f} as cut, in BF16; {served:.4f} in {formats}: {directory}")


def export(run: Run, recipe: Recipe, name: str | None = None) -> dict[str, Any]:
    """Export the latest student in its formats; what was verified by reading it back."""
    session = Session(run, recipe)
    candidate, row = students.find_candidate(session, name)
    directory, out = students.latest(session, candidate), run.path / "export" / candidate.id
    card: dict[str, Any] = {
        "command": command("search", session.name, "--run", run.name),
        "budget": f"budget {format_bytes(row.budget)}",
        "teacher": f"{session.name} ({session.note})" if session.note else session.name,
        "bytes": f"{format_bytes(row.bytes)} with caches at {recipe.context} context",
        "KL to the teacher": f"{row.measured_kl:.4f} nats per token before distillation",
        "student": str(directory.relative_to(run.path)),
    }
    architecture = candidate.architecture
    require_stage("export", architecture, recipe, session.placement)
    if candidate.repaired:
        card["repair"] = repair_note(len(candidate.repaired), len(architecture.blocks))
    if architecture.formats != {"bf16"}:
        card["rounding"] = f"{recipe.rounding}, on {recipe.calibration_tokens} tokens of text"
    deployed, code = (recipe.deployment, recipe.preset), not is_plain(architecture)
    card["serving"] = serving("DIRECTORY", architecture, recipe.target, *deployed, code=code)
    place = session.placement
    python = None if recipe.reader_python is None else Path(recipe.reader_python)
    facts = export_student(
        directory, out, architecture, recipe.target, card, placement=place, python=python
    )
    note(
        f"{out}: {format_bytes(facts['bytes'])} of tensors, verified: read back by "
        f"{facts['reader']}, log-probabilities differ by at most "
        f"{facts['logit_difference']:.1e}"
    )
    return facts


def verify(directory: Path, reader: Reader | None, python: Path | None, recipe: Recipe) -> None:
    """Compare an export with the student that was measured, and say what each reader found."""
    place = placement(recipe.compute, recipe.memory_bytes)
    for found in verify_export(directory, {reader or "compress": python}, place):
        note(f"{directory}: {found.text}")
    note("files, tensors and settings are those that were exported")


def finish(run: Run, recipe: Recipe) -> list[str]:
    """Distil and export what was chosen, of a sweep for every budget; how commands name each."""
    rows = selected_of(read_students(run.path))
    names = [row.id for row in rows] if len(rows) > 1 else [None]
    for name in names:
        distill_one(run, recipe, name)
        export(run, recipe, name)
    students.forget_states(run)
    return [shown(run) if name is None else f"{shown(run)}:{name}" for name in names]


def evaluate(names: Sequence[str], asked: Asked, recipe: Recipe, as_json: bool = False) -> None:
    """Compare models and runs, and print the tables or one JSON object.

    A run alone is its last table: the teacher and the best of every kind, before and after
    distillation.
    """
    alone = len(names) == 1 and is_run(names[0])
    if alone:
        session = Session(find_run(names[0])[0], recipe)
        found = evaluating.final_table(session, asked)
    else:
        found = evaluating.evaluate(names, asked, recipe)
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
    export(run, recipe)
    print_last_table(session, evaluating.final_table(session, Asked()))
    write_report(run.path)
