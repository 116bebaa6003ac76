"""Students as they are before any training: cut in BF16, then rounded to their formats on text."""

from pathlib import Path
from typing import Any

from compress.core.files import digests
from compress.core.terminal import progress
from compress.export.student import round_student
from compress.model.architecture import Architecture, to_json
from compress.run.score import gram_file
from compress.run.session import DIGESTS, Session
from compress.student.candidate import Candidate
from compress.student.surgery import prune

# Of a rounded student: as it was cut, nothing trained.
CUT = ".cut"


def pruned(session: Session, candidate: Candidate) -> Path:
    """Directory of the candidate's BF16 student, cut now if it was not before."""
    directory = session.run.path / "candidates" / candidate.id
    if not (directory / "config.json").is_file():
        grams = gram_file(session) if candidate.repaired else None
        prune(session.checkpoint, candidate, directory, grams)
    return directory


def untrained(session: Session, candidate: Candidate) -> Path:
    """Directory of the candidate's student as it is served, cut and rounded, nothing trained."""
    return served(session, candidate, pruned(session, candidate), candidate.id + CUT)


def served(session: Session, candidate: Candidate, directory: Path, name: str) -> Path:
    """The BF16 student of a directory in the candidate's formats, rounded now if not yet."""
    if candidate.architecture.formats == {"bf16"}:
        return directory
    return rounded(session, candidate.architecture, directory, name)


def rounded(session: Session, architecture: Architecture, directory: Path, name: str) -> Path:
    """The BF16 student of a directory rounded to its formats on training text, now if not yet.

    It is in the run's directory of that name. What is there is what is measured, trained and
    exported.
    """
    recipe, run = session.recipe, session.run
    out, files = run.path / "rounded" / name, sorted(directory.glob("*.safetensors"))
    inputs = {
        "student": list(digests(files, run.path / DIGESTS).values()),
        "architecture": to_json(architecture),
        "rounding": rounding_of(session, architecture),
        "session": session.identity(),
    }
    stage = f"rounded:{name}"
    if not run.stage_done(stage, inputs, out):
        rows = session.training_rows(recipe.calibration_tokens, recipe.distill_length)
        with progress(f"rounding {name}", architecture.layers) as advance:
            round_student(
                directory, out, architecture, rows, recipe.rounding, session.placement,
                lambda layers: advance(layers, ""),
            )  # fmt: skip
        run.sign(stage, inputs)
    return out


def rounding_of(session: Session, architecture: Architecture) -> list[Any]:
    """How weights come to their formats; empty where all are in BF16."""
    recipe = session.recipe
    if architecture.formats == {"bf16"}:
        return []
    return [recipe.rounding, recipe.calibration_tokens, recipe.distill_length]
