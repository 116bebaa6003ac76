"""What names given to eval stand for, and what its tables show."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.core.errors import InputError
from compress.flags import beside
from compress.memory.budget import Budget
from compress.report.figures import plus_minus
from compress.report.tables import print_results, print_table
from compress.run.directory import find_run, is_run
from compress.run.evaluate import recipe_for, resolved, table_rows
from compress.run.recipe import Recipe, located, write_recipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model ``tiny`` and runs ``tiny``, ``embedded`` and ``other``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")
    for name in ("tiny", "embedded", "other"):
        write_recipe(
            Recipe(model=located(name), trials=7), tmp_path / "runs" / name / "recipe.yaml"
        )
    return tmp_path


@pytest.mark.parametrize(
    ("names", "runs", "labels"),
    [
        (["tiny"], [True], ["tiny"]),
        (["tiny", "tiny"], [False, True], ["tiny", "runs/tiny"]),
        (["tiny", "runs/tiny"], [False, True], ["tiny", "runs/tiny"]),
        (["./tiny", "tiny"], [False, True], ["./tiny", "tiny"]),
        (["tiny", "tiny:c1", "tiny:c2"], [False, True, True], ["tiny", "tiny:c1", "tiny:c2"]),
        (["embedded", "embedded"], [False, True], ["embedded", "runs/embedded"]),
        (["other", "other"], [True, True], ["other", "runs/other"]),
        (["./tiny", "./tiny"], [False, False], ["./tiny", "./tiny (2)"]),
        (["tiny", "other"], [True, True], ["tiny", "other"]),
    ],
)
def test_every_name_is_a_row_and_a_teacher_is_not_mistaken_for_its_student(
    names: list[str], runs: list[bool], labels: list[str], home: Path
) -> None:
    found = resolved(names)
    assert [named.name for named in found] == names
    assert [named.run is not None for named in found] == runs
    assert [named.label for named in found] == labels
    # Flags change the recipe of the first run; the teacher is the first name or that run's.
    recipe = recipe_for(names, {"seed": 3})
    assert recipe.model == located(names[0].partition(":")[0])
    assert (recipe.seed, recipe.trials) == (3, 7 if any(runs) else 100)


def test_the_next_step_names_a_run_by_path_where_its_teacher_has_its_name(home: Path) -> None:
    tiny, embedded = Recipe(model=str(home / "tiny")), Recipe()
    assert beside(tiny, "tiny") == "runs/tiny"
    assert beside(tiny, "tiny:c1") == "runs/tiny:c1"
    assert beside(embedded, "embedded") == "runs/embedded"
    assert beside(embedded, "other") == "other"


def test_a_teacher_that_was_trained_into_runs_is_no_run(home: Path) -> None:
    teacher = home / "runs/teacher"
    shutil.copytree(home / "tiny", teacher)
    (teacher / "recipe.yaml").write_text("steps: 1\n")
    assert not any(is_run(name) for name in ("teacher", "runs/teacher", "", ".", ".."))
    with pytest.raises(InputError, match="is not a run"):
        find_run("teacher")
    assert resolved(["runs/teacher"])[0].run is None


def results(names: list[str], tasks: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation of one row says: figures without errors."""
    figures = {"kl": 0.1, "nats_per_token": 2.0, "bits_per_byte": None}
    row = {"bytes": 7, **figures, "stderr": dict.fromkeys(figures), "tasks": tasks}
    pair = {"a": names[-2], "b": names[-1], "metric": "kl", "difference": 0.5, "stderr": None}
    return {
        "models": dict.fromkeys(names, row),
        "paired": [pair],
        "text": {"tokens": 8, "sequences": 1, "bytes": 7},
        "notes": ["one thing to know"],
    }


@pytest.mark.parametrize("tasks", [{}, {"choice": {"acc": 0.25, "stderr": None}}])
def test_tables_have_no_column_without_figures_and_no_error_of_one_row(
    tasks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(["teacher", "prune", "joint"], tasks)
    best: Any = {kind: SimpleNamespace(id=f"{kind}-001") for kind in ("prune", "joint")}
    rows = table_rows(found, best, [{"kind": "formats"}])
    print_table(rows, found, Budget(bytes=7, asked=7), whole=14)
    print_results(found)
    said = capsys.readouterr()
    assert ("choice" in said.out) == bool(tasks)
    assert ("0.250" in said.out) == bool(tasks)
    assert "±" not in said.out + said.err
    assert "joint minus prune: KL +0.5000" in said.err
    assert "one thing to know" in said.err


def test_figures_are_shown_with_their_errors() -> None:
    assert plus_minus(None, 1.0) == ""
    assert plus_minus(0.5) == "0.5000"
    assert plus_minus(0.5, 0.25, 2, "+") == "+0.50 ± 0.25"
