"""Run directories: stages sign their work last, so that running again redoes what is missing.

A stage writes to a temporary place, renames, then signs ``state.json`` with a fingerprint of its
inputs. A stage names the fingerprints of the stages before it among its inputs, so that a changed
setting redoes that stage and what follows, and nothing before.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import fingerprint, read_json, write_json

RUNS = Path("runs")


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

    def stage_done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage was completed with exactly these inputs."""
        return self.fingerprint(stage) == fingerprint(inputs)

    def sign(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Mark a stage complete; its artifacts must be in place."""
        write_json(self.path / "state.json", self.signatures() | {stage: fingerprint(inputs)})

    def event(self, **fields: Any) -> None:
        """Append a line to events.jsonl, with the time; durable against a killed process."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": round(time.time(), 3), **fields}) + "\n"
        with (self.path / "events.jsonl").open("ab+") as log:
            if log.tell():
                log.seek(-1, os.SEEK_END)
                # A killed process may have left half a line: it must not swallow this one.
                line = line if log.read(1) == b"\n" else "\n" + line
            log.write(line.encode())

    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl; half-written ones are left out."""
        file = self.path / "events.jsonl"
        found = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


def run_at(name: str) -> Run:
    """The run of a name under ``runs/``, or of a path (anything with a separator)."""
    if not name or name in (".", ".."):
        raise InputError(f"run name {name!r} is not a name")
    return Run(Path(name) if os.sep in name or Path(name).is_absolute() else RUNS / name)


def is_run(name: str) -> bool:
    """Whether RUN or RUN:CANDIDATE names a run that exists."""
    return bool(name) and (run_at(name.partition(":")[0]).path / "recipe.yaml").is_file()


def find_run(target: str) -> tuple[Run, str | None]:
    """The existing run and candidate that RUN or RUN:CANDIDATE names; None stands for the best."""
    name, _, candidate = target.partition(":")
    run = run_at(name)
    if not (run.path / "recipe.yaml").is_file():
        known = sorted(file.parent.name for file in RUNS.glob("*/recipe.yaml"))
        raise InputError(
            f"{run.path} is not a run (no recipe.yaml); "
            + (f"known: {', '.join(known)}" if known else "make one with: compress search")
        )
    return run, candidate or None


def shown(run: Run) -> str:
    """How to name the run in the next command."""
    return run.name if run.path.parent == RUNS else str(run.path)
