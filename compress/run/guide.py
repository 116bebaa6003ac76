"""What a run has so far, and which command comes next; reads files only, no torch."""

import shlex
from collections.abc import Iterator

from compress.core.terminal import command
from compress.model.architecture import Architecture, Block, without_formats
from compress.report.rows import TEACHER, Student, read_students, read_teacher, selected_of
from compress.run.directory import Run, shown
from compress.run.recipe import read_recipe


def is_changed(run: Run, student: Student) -> bool:
    """Whether a student lacks anything of its teacher, bits of its weights too."""
    teacher, made = read_teacher(run.path), student.architecture
    same = teacher is not None and structure(made) == structure(teacher.architecture)
    return not same or made.formats != {"bf16"}


def structure(architecture: Architecture) -> tuple[int, list[Block]]:
    """An architecture's sizes, without formats."""
    return architecture.hidden, list(without_formats(architecture).blocks)


def next_step(run: Run) -> str:
    """The command that continues a run: the first of the path whose files are not there."""
    name, rows = shown(run), selected_of(read_students(run.path))
    if not rows:
        recipe = read_recipe(run.path / "recipe.yaml")
        # Without candidates a search has not run, or found that the teacher fits as it is.
        space = ["--space", "joint"] if (run.path / TEACHER).is_file() else []
        return command("search", "--run", name, "--budget", recipe.budget or "70%", *space)
    sweep = len(rows) > 1
    for row in rows:
        if not (run.path / "export" / row.id).is_dir():
            # What is the teacher itself is not trained.
            trained = not is_changed(run, row) or (run.path / "distill" / row.id).is_dir()
            which = f"{name}:{row.id}" if sweep else name
            return command("export" if trained else "distill", which)
    if not (run.path / "eval" / "results.json").is_file():
        # A table at equal bytes is of one budget: of a sweep the chosen ones are compared.
        models = [f"{name}:{row.id}" for row in rows] if sweep else [name]
        return command("eval", *models)
    return command("plan", str(run.path / "export" / rows[0].id))


def possessions(run: Run) -> Iterator[str]:
    """What a finished run leaves to its user, a line each; nothing that is not there."""
    for row in selected_of(read_students(run.path)):
        if (student := run.path / "export" / row.id).is_dir():
            yield f"the student, verified: {student}"
            yield f"  from Python: compress.load({str(student)!r}).generate(...)"
    for file, what in (
        ("report/index.html", "the report, one page: "),
        ("table.json", "the last table: "),
        ("recipe.yaml", "what was run, to change and run again: compress run "),
    ):
        if (run.path / file).is_file():
            yield f"{what}{shlex.quote(str(run.path / file))}"
