"""From a candidate to a student: cut, rounded to its formats, trained in them."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import atomic_directory, fingerprint, read_json, write_json
from compress.core.quantities import format_bytes
from compress.core.terminal import progress
from compress.export.student import store_student
from compress.measure.kl import Reference, mean_kl
from compress.model.architecture import to_json
from compress.model.build import disk_tensors, input_scales, load_model
from compress.model.checkpoint import in_bf16, open_checkpoint
from compress.model.inputs import round_inputs
from compress.report.rows import Student, Teacher, read_students, read_teacher
from compress.run.directory import Run
from compress.run.local import localized
from compress.run.rounding import CUT, pruned, rounding_of, served, untrained
from compress.run.score import REPAIR
from compress.run.score import STAGE as SCORE
from compress.run.session import Session
from compress.student.candidate import Candidate
from compress.student.grids import grids_of, on_grids
from compress.student.surgery import load_candidate, same_candidate, save_candidate
from compress.sweep.stack import stack_at
from compress.sweep.states import StoredStates, stored_states
from compress.train.checkpoints import forget
from compress.train.distill import DistillSettings
from compress.train.distill import Teacher as Lesson
from compress.train.distill import distill as train_on_teacher
from compress.train.loop import digest
from compress.train.masters import roundings
from compress.train.optimizers import weights_dtype
from compress.train.precision import numerics_of, quantized
from compress.train.world import world

# Directories of a run with one directory per candidate.
PER_CANDIDATE = ("candidates", "distill", "rounded", "export")
SHORT = ".short"
STUDENT = "student"
# Of a training, where local distillation leaves what distillation begins with.
LOCAL = "local"
# The teacher's final hidden states of training texts, while anything is trained on them.
STATES = "states"
# Of a training: KL before and after it on the same text, and its tokens.
RESULT = "result.json"


def find_candidate(session: Session, name: str | None) -> tuple[Candidate, Student]:
    """The candidate of a name, or the selected one, and its row of ``candidates.json``.

    Raises:
        InputError: none or several of that name, or the teacher is not the one that was searched.
    """
    run, teacher = session.run.path, read_teacher(session.run.path)
    students = read_students(run)
    if not teacher or not students:
        raise InputError(no_candidates(session, teacher))
    require_same_teacher(session, teacher)
    found = [each for each in students if (each.id == name if name else each.selected)]
    if not found:
        known = ", ".join(each.id for each in students[:8])
        raise InputError(f"no candidate {name} in {run}; the best are {known}")
    if len(found) > 1:
        listed = ", ".join(f"{each.id} ({format_bytes(each.budget)})" for each in found)
        raise InputError(
            f"{run} has a chosen candidate for each of its {len(found)} budgets: "
            f"{listed}; name one as {session.run.name}:{found[0].id}"
        )
    return load_candidate(run / "candidates" / found[0].id, found[0].kind), found[0]


def no_candidates(session: Session, teacher: Teacher | None) -> str:
    """Why a run has no candidates, and what gives it some."""
    run = session.run.path
    unasked = session.teacher_is_small and session.recipe.space is None
    if teacher and unasked and (total := teacher.footprint.total) <= teacher.budget:
        return (
            f"{run} has no candidates: the teacher fits as it is, {format_bytes(total)} within "
            f"{format_bytes(teacher.budget)}; compress search --space joint makes a smaller one "
            "all the same"
        )
    return f"{run} has no candidates yet; run compress search first"


def require_replaceable(run: Run) -> None:
    """Refuse a search that would delete students that were trained or exported in its run.

    What a search made itself, candidates and their short distillation, goes without asking.
    """
    made = [
        f"{folder}/{directory.name}"
        for folder in ("distill", "export")
        for directory in sorted((run.path / folder).glob("*"))
        if not directory.name.endswith(SHORT)
    ]
    if made:
        raise InputError(
            f"{run.path} holds {', '.join(made)} of a search with other settings, which this one "
            "would delete; search with another --run NAME, or delete them first"
        )


def require_same_teacher(session: Session, teacher: Teacher) -> None:
    """InputError where the session's teacher is not the one of the search."""
    known, found = teacher.files, session.files
    if changed := sorted(n for n in known.keys() | found.keys() if known.get(n) != found.get(n)):
        raise InputError(
            f"the teacher in {session.path} is not the one that {session.run.path} was searched "
            f"for: {', '.join(changed)} changed; put that one back, or search this one with "
            "another --run NAME"
        )


def keep_students(run: Run, candidates: Sequence[Candidate]) -> None:
    """Write the candidates; students that are theirs already stay, those of others go.

    A name stands for another candidate after a search with other settings, and the same choice
    for other weights after another teacher.
    """
    inputs = {"score": run.fingerprint(SCORE), "repair": run.fingerprint(REPAIR)}
    same_teacher, home = run.stage_done("students", inputs), run.path / "candidates"
    kept = {one.id for one in candidates if same_teacher and same_candidate(one, home / one.id)}
    for folder in PER_CANDIDATE:
        for directory in (run.path / folder).glob("*"):
            if directory.name.removesuffix(CUT).removesuffix(SHORT) not in kept:
                shutil.rmtree(directory)
    run.sign("students", inputs)
    for candidate in candidates:
        if candidate.id not in kept:
            save_candidate(candidate, home / candidate.id)


def is_cut(session: Session, candidate: Candidate) -> bool:
    """Whether a candidate lacks anything of its teacher besides bits."""
    whole = len(session.architecture.blocks)
    return len(candidate.keep["blocks"]) < whole or len(candidate.keep) > 1


def is_changed(session: Session, candidate: Candidate) -> bool:
    """Whether a candidate's weights are not its teacher's."""
    return is_cut(session, candidate) or candidate.architecture.formats != {"bf16"}


def latest(session: Session, candidate: Candidate) -> Path:
    """The student, as it is served, of the longest training that made it better, else untrained."""
    for name in (candidate.id, candidate.id + SHORT):
        directory = session.run.path / "distill" / name
        if (directory / STUDENT).is_dir() and helped(directory):
            return directory / STUDENT
    return untrained(session, candidate)


def helped(directory: Path) -> bool:
    """Whether the training of a directory left the student closer to its teacher.

    Raises:
        InputError: nothing says so: the training was killed, or is of an earlier version.
    """
    file = directory / RESULT
    if not file.is_file():
        again = "search" if directory.name.endswith(SHORT) else "distill"
        raise InputError(
            f"{directory} has a student but no {RESULT}, which says whether training made it "
            f"better; run compress {again} again"
        )
    result = read_json(file)
    return bool(result["after"] < result["before"])


def train_inputs(
    session: Session, candidate: Candidate, tokens: int, local_tokens: int = 0
) -> dict[str, Any]:
    """What decides a student of so many tokens of training, its blocks alone before."""
    recipe, repaired = session.recipe, sorted(candidate.repaired)
    return ({"local": local_tokens} if local_tokens else {}) | {
        "session": session.identity(),
        "settings": [tokens, recipe.distill_batch_tokens, recipe.learning_rate, recipe.optimizer],
        "length": recipe.distill_length,
        "precision": recipe.precision,
        "loss": [recipe.loss, recipe.validate_every, recipe.patience],
        "architecture": to_json(candidate.architecture),
        "rounding": rounding_of(session, candidate.architecture),
        "keep": {key: index.tolist() for key, index in candidate.keep.items()},
        "repaired": [repaired, recipe.repair_tokens] if repaired else [],
    }


def train(
    session: Session, candidate: Candidate, tokens: int, name: str, local_tokens: int = 0
) -> Path:
    """Directory of the student, as it is served, after so many tokens of training on its teacher.

    Before it, after ``local_tokens`` of local distillation in BF16; either may be 0. ``name`` is
    the training's directory in the run, whose checkpoints it goes on from and leaves.
    """
    directory, begins = session.run.path / "distill" / name, pruned(session, candidate)
    beginning = candidate.id + CUT
    if local_tokens:
        inputs = train_inputs(session, candidate, 0, local_tokens)
        begins = localized(session, candidate, begins, directory / LOCAL, local_tokens, inputs)
        beginning = f"{candidate.id}.{LOCAL}"
    begins = served(session, candidate, begins, beginning)
    if tokens:
        start = fingerprint(train_inputs(session, candidate, tokens, local_tokens))
        settings = DistillSettings(
            tokens=tokens, batch_tokens=session.recipe.distill_batch_tokens,
            learning_rate=session.recipe.learning_rate, seed=session.recipe.seed,
            optimizer=session.recipe.optimizer, precision=session.recipe.precision, start=start,
            loss=session.recipe.loss, validate_every=session.recipe.validate_every,
            patience=session.recipe.patience,
        )  # fmt: skip
        tensors = trained_tensors(session, candidate, settings, begins, directory)
        store_student(begins, directory / STUDENT, candidate.architecture, tensors)
    else:
        with atomic_directory(directory / STUDENT) as student:
            shutil.copytree(begins, student, dirs_exist_ok=True)
    return directory / STUDENT


def trained_tensors(
    session: Session, candidate: Candidate, settings: DistillSettings, begins: Path, directory: Path
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, as they are stored, of a student after a distillation from where it begins."""
    recipe, placement, architecture = session.recipe, session.placement, candidate.architecture
    rows = session.training_rows(settings.tokens, recipe.distill_length)
    states = teacher_states(session, rows)
    if (ours := world()).leads:
        told = {
            "run": str(session.run.path), "recipe": recipe.model_dump(), "candidate": candidate.id,
            "kind": candidate.kind, "settings": asdict(settings), "begins": str(begins),
            "directory": str(directory),
        }  # fmt: skip
        ours.told({"distill": told})
    # From here on the student is alone in memory.
    session.stack.release()
    session.store.clear()
    student = load_model(begins, weights_dtype(recipe.optimizer, placement))
    scales = input_scales(open_checkpoint(begins), architecture)
    round_inputs(student, architecture, scales)
    grids = grids_of(begins, architecture, placement.device)
    numerics = numerics_of(recipe.precision, recipe.emulate, placement)
    with session.stack.head() as head, quantized(student, architecture, numerics):
        lesson = Lesson(states, head, candidate.keep.get("hidden"))
        train_on_teacher(
            lesson, student, rows, settings, placement, directory,
            roundings=roundings(architecture, grids), numerics=numerics,
        )  # fmt: skip
    trained = chain(disk_tensors(student, architecture), open_checkpoint(begins).mtp())
    return on_grids(in_bf16(trained, architecture), grids)


def teacher_states(session: Session, rows: Tensor) -> StoredStates:
    """The teacher's final hidden states of training rows, kept in the run until ``forget_states``.

    Students of one search that are trained on the same rows share them.
    """
    place = session.placement
    known = {"teacher": session.files, "rows": digest(rows), "arithmetic": str(place.dtype)}
    file = session.run.path / STATES / f"{fingerprint(known)[:16]}.safetensors"
    with progress("distill: the teacher's states", len(rows)) as advance:
        return stored_states(session.stack, rows, file, lambda count: advance(count, ""))


def forget_states(run: Run) -> None:
    """Delete what ``teacher_states`` keeps in a run: 2 bytes x hidden for every training token."""
    shutil.rmtree(run.path / STATES, ignore_errors=True)


def distilled(
    session: Session, candidate: Candidate, tokens: int, name: str, local_tokens: int = 0
) -> Path:
    """Directory of the student trained on its teacher for so many tokens, if not yet.

    ``name`` is the training's, of which ``RESULT`` is unlinked where the student is made anew.
    """
    directory = session.run.path / "distill" / name
    stage = f"distill:{name}"
    inputs = train_inputs(session, candidate, tokens, local_tokens)
    if not session.run.stage_done(stage, inputs, directory / STUDENT):
        (directory / RESULT).unlink(missing_ok=True)
        train(session, candidate, tokens, name, local_tokens)
        session.run.sign(stage, inputs)
        forget(directory)
    return directory / STUDENT


def trained(
    session: Session, candidate: Candidate, tokens: int, name: str, text: Reference,
    local_tokens: int = 0,
) -> tuple[float, float | None]:  # fmt: skip
    """KL on a text of a candidate's student as it is served, untrained and trained.

    None where it is the teacher itself: then nothing is trained. Otherwise ``RESULT`` has both.
    """

    def kl(directory: Path) -> float:
        return mean_kl(stack_at(directory, session.placement), text)

    before = kl(untrained(session, candidate))
    if not is_changed(session, candidate):
        return before, None
    student = distilled(session, candidate, tokens, name, local_tokens)
    after = kl(student)
    write_json(
        student.parent / RESULT,
        {"before": before, "after": after, "tokens": tokens, "local_tokens": local_tokens},
    )
    return before, after
