"""Every recipe key that a command uses is one of its flags."""

from pathlib import Path
from typing import Any

import pytest

from compress.flags import SCORED, SEARCHED
from compress.run import stages
from compress.run.directory import Run
from compress.run.recipe import Recipe, read_recipe


class Watched(Recipe):
    """A recipe that notes which of its keys are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in Recipe.model_fields:
            READ.add(name)
        return super().__getattribute__(name)


READ: set[str] = set()


@pytest.mark.parametrize("command", ["score", "search"])
def test_a_command_has_a_flag_for_every_key_that_it_reads(command: str, run_copy: Path) -> None:
    settings = read_recipe(run_copy / "recipe.yaml").model_dump()
    # Another search than the one that is done, of few trials.
    changed = {"trials": 5, "baselines": "uniform", "draws": 1}
    recipe = Watched.model_validate(settings | changed)
    READ.clear()
    getattr(stages, command)(Run(run_copy), recipe)
    flags = {"score": SCORED, "search": SEARCHED}[command]
    # All splits of the text are read, that of the last table too.
    assert {"model", "eval_data", *flags} >= READ
    # Nor is there a flag that does nothing, but where a limit has two.
    assert {*flags} <= {"device", *READ}


def test_a_whole_run_has_a_flag_for_every_key() -> None:
    from typer.main import get_command

    from compress.cli import app

    [run] = [c for name, c in get_command(app).commands.items() if name == "run"]
    assert {parameter.name for parameter in run.params} >= Recipe.model_fields.keys() - {"model"}
