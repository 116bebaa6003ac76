"""The Python interface: the commands as functions from values to values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.formats.table import Format, KvFormat
from compress.memory.plan import Plan, make_plan
from compress.model.find import resolve_model
from compress.report.rows import STUDENTS
from compress.run.directory import require_free, run_at
from compress.run.recipe import Recipe, check
from compress.run.sources import checked_files

if TYPE_CHECKING:
    from compress.run.session import Session
    from compress.scores.costs import Scores


def plan(model: str, **settings: Any) -> dict[str, Any]:
    """What a model takes and whether it fits, as ``compress plan --json`` prints it.

    Args:
        model: a directory, a config.json, a short name or a hub id.
        **settings: recipe keys: budget, context, batch_size, device, ...
    """
    return planned(model, check({"model": model} | settings, "plan")).to_json()


def planned(
    model: str,
    recipe: Recipe,
    format: Format | None = None,
    kv_format: KvFormat | None = None,
    head_format: Format | None = None,
) -> Plan:
    """The plan of a model under a recipe, or of it in other formats."""
    return make_plan(
        resolve_model(model, config_only=True), recipe.deployment, budget=recipe.limit,
        device=recipe.preset, format=format, kv_format=kv_format, head_format=head_format,
        mtp=recipe.mtp != "drop",
    )  # fmt: skip


def score(model: str = "embedded", *, run: str, **settings: Any) -> "Scores":
    """Scores of a model's units, blocks and formats, kept in a run directory."""
    from compress.run.score import score as compute

    return compute(session_of(model, run, settings))


def search(model: str = "embedded", *, run: str, **settings: Any) -> list[dict[str, Any]]:
    """The rows of ``candidates.json``, best first; empty where the teacher fits as it is.

    Raises:
        InputError: a wrong setting, or a run with students of other settings, which would be lost.
    """
    from compress.run.search import search as find

    rows: list[dict[str, Any]] = STUDENTS.dump_python(
        find(session_of(model, run, settings)), mode="json"
    )
    return rows


def evaluate(models: Sequence[str], tasks: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """Models and runs against the first, as ``compress eval --json`` prints it."""
    from compress.run.evaluate import Asked, recipe_for
    from compress.run.evaluate import evaluate as measure

    return measure(models, Asked(tasks), recipe_for(models, settings))


def session_of(model: str, run: str, settings: dict[str, Any]) -> "Session":
    """The session of a call, its settings, model, files and run checked."""
    from compress.run.session import Session

    recipe, chosen = check({"model": model} | settings, "settings"), run_at(run)
    require_free(chosen)
    return Session(chosen, checked_files(recipe))
