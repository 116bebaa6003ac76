"""What a run has so far, and which command comes next; reads files only, no torch."""

import shlex
from collections.abc import Iterator
from typing import Any

from compress.core.files import read_json
from compress.core.terminal import command
from compress.run.directory import Run, shown
from compress.run.recipe import read_recipe


def selected(run: Run) -> list[dict[str, Any]]:
    """Rows of the candidates that the run stands for, one per budget; empty before a search."""
    file = run.path / "candidates.json"
    rows: list[dict[str, Any]] = read_json(file) if file.is_file() else []
    return [row for row in rows if row["selected"]]


def is_cut(run: Run, row: dict[str, Any]) -> bool:
    """Whether a candidate lacks anything of its teacher besides bits."""
    teacher: dict[str, Any] = read_json(run.path / "teacher.json")["architecture"]
    return structure(row["architecture"]) != structure(teacher)


def structure(architecture: dict[str, Any]) -> list[Any]:
    """An architecture's sizes as JSON holds them, without formats."""
    blocks = [{k: v for k, v in block.items() if k != "format"} for block in architecture["blocks"]]
    return [architecture["hidden"], blocks]


def next_step(run: Run) -> str:
    """The command that continues a run: the first of the path whose files are not there."""
    name, rows = shown(run), selected(run)
    if not rows:
        recipe = read_recipe(run.path / "recipe.yaml")
        # Without candidates a search has not run, or found that the teacher fits as it is.
        space = ["--space", "joint"] if (run.path / "teacher.json").is_file() else []
        return command("search", "--run", name, "--budget", recipe.budget or "70%", *space)
    sweep = len(rows) > 1
    for row in rows:
        if not (run.path / "export" / row["id"]).is_dir():
            # Students that only differ in formats are not trained.
            trained = not is_cut(run, row) or (run.path / "distill" / row["id"]).is_dir()
            which = f"{name}:{row['id']}" if sweep else name
            return command("export" if trained else "distill", which)
    if not (run.path / "eval" / "results.json").is_file():
        # A table at equal bytes is of one budget: of a sweep the chosen ones are compared.
        models = [f"{name}:{row['id']}" for row in rows] if sweep else [name]
        return command("eval", *models)
    return command("plan", str(run.path / "export" / rows[0]["id"]))


def possessions(run: Run) -> Iterator[str]:
    """What a finished run leaves to its user, a line each; nothing that is not there."""
    for row in selected(run):
        if (student := run.path / "export" / row["id"]).is_dir():
            yield f"the student, verified: {student}"
            yield f"  from Python: compress.load({str(student)!r}).generate(...)"
    for file, what in (
        ("report/index.html", "the report, one page: "),
        ("table.json", "the last table: "),
        ("recipe.yaml", "what was run, to change and run again: compress run "),
    ):
        if (run.path / file).is_file():
            yield f"{what}{shlex.quote(str(run.path / file))}"
