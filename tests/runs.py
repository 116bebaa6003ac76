"""Commands on a run, and what there is in it."""

from pathlib import Path
from typing import Any

import pytest

from compress import cli
from compress.core.files import read_json
from compress.run import stages
from compress.run.directory import Run
from compress.run.recipe import read_recipe


def command(*arguments: object) -> None:
    cli.app([str(part) for part in arguments], standalone_mode=False)


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(run / "candidates.json")
    return rows


def again(run: Path, **changes: Any) -> None:
    """Search again in a run, with other settings."""
    stages.search(Run(run), read_recipe(run / "recipe.yaml").changed(**changes))


def stamps(run: Path, pattern: str) -> dict[str, int]:
    return {str(f.relative_to(run)): f.stat().st_mtime_ns for f in run.glob(pattern)}


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether candidates are the same, in the same order, and measured the same."""
    exact = ("id", "kind", "bytes", "architecture", "reselected", "finalist", "selected")
    close = ("measured_kl", "measured_se", "predicted_kl", "distilled_kl")
    return len(found) == len(expected) and all(
        [one[key] for key in exact] == [two[key] for key in exact]
        and [one[key] for key in close] == pytest.approx([two[key] for key in close], abs=1e-6)
        for one, two in zip(found, expected, strict=True)
    )
