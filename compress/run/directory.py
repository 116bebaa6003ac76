"""Run directories: stages sign their work last, so that running again redoes what is missing.

A stage writes to a temporary place, renames, then signs ``state.json`` with a fingerprint of its
inputs. A stage names the fingerprints of the stages before it among its inputs, so that a changed
setting redoes that stage and what follows, and nothing before.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import PARTIAL, fingerprint, read_json, write_json

RUNS = Path("runs")
# What a run has before its recipe: one that was killed there is begun again.
BEFORE_RECIPE = {"digests.json", "study", "recipe.yaml"}


@dataclass(frozen=True)
class Run:
    """The directory of one run; made when first written to."""

    path: Path

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name

    def signatures(self) -> dict[str, str]:
        """Fingerprint by stage, of the stages that are complete."""
        file = self.path / "state.json"
        if not file.exists():
            return {}
        state = read_json(file)
        if not isinstance(state, dict):
            raise InputError(f"{file} does not map stages to fingerprints; delete it to start over")
        return state

    def fingerprint(self, stage: str) -> str | None:
        """The signature of a stage, for the inputs of the stages after it; None if not done."""
        return self.signatures().get(stage)

    def stage_done(self, stage: str, inputs: Mapping[str, Any], file: Path | None = None) -> bool:
        """Whether the stage was completed with exactly these inputs, and its file is there."""
        return self.fingerprint(stage) == fingerprint(inputs) and (file is None or file.exists())

    def sign(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Mark a stage complete; its artifacts must be in place."""
        write_json(self.path / "state.json", self.signatures() | {stage: fingerprint(inputs)})


def run_at(name: str) -> Run:
    """The run of a name under ``runs/``, or of a path (anything with a separator).

    Raises:
        InputError: a name that other commands could not be given.
    """
    last = os.path.basename(os.path.expanduser(name).rstrip(os.sep))
    if last in ("", ".", "..") or last[0] == "-" or ":" in last or not name.isprintable():
        raise InputError(
            f"run name {name!r} is not a name that commands can be given; take one without ':' "
            "that does not begin with '-', or the path of a directory"
        )
    return split(name)[0]


def split(target: str) -> tuple[Run, str | None]:
    """The run and candidate that RUN or RUN:CANDIDATE names, whether they exist or not."""
    head, last = os.path.split(target)
    name, colon, candidate = last.partition(":")
    path = os.path.expanduser(os.path.join(head, name))
    return Run(Path(path) if os.sep in path else RUNS / path), candidate if colon else None


def is_run(target: str) -> bool:
    """Whether RUN or RUN:CANDIDATE names a run that exists; a teacher with its recipe is none."""
    path = split(target)[0].path
    return (path / "recipe.yaml").is_file() and not (path / "config.json").is_file()


def find_run(target: str) -> tuple[Run, str | None]:
    """The existing run and candidate that RUN or RUN:CANDIDATE names; None stands for the best."""
    run, candidate = split(target)
    if not is_run(target):
        known = sorted(file.parent.name for file in RUNS.glob("*/recipe.yaml"))
        raise InputError(
            f"{run.path} is not a run (no recipe.yaml); "
            + (f"known: {', '.join(known)}" if known else "make one with: compress search")
        )
    return run, candidate or None


def require_free(run: Run) -> None:
    """Refuse to make a run of a file, or where something else is kept."""
    if not run.path.is_dir():
        taken = run.path.exists()
    else:
        names = {file.name.removesuffix(PARTIAL) for file in run.path.iterdir()}
        taken = not names <= BEFORE_RECIPE and not is_run(str(run.path.absolute()))
    if taken:
        raise InputError(f"{run.path} exists and is no run; take another --run")


def by_path(run: Run, candidate: str | None) -> str:
    """RUN or RUN:CANDIDATE with the path of the run, which is no model's name."""
    return str(run.path) if candidate is None else f"{run.path}:{candidate}"


def shown(run: Run) -> str:
    """How to name the run in the next command."""
    if run.path.parent == RUNS:
        return run.name
    return str(run.path) if os.sep in str(run.path) else f".{os.sep}{run.path}"
