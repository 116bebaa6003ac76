"""What commands are given: arguments, and a flag for every recipe key, with its type and help."""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.core.errors import InputError
from compress.core.terminal import note
from compress.export.readers import Reader
from compress.model.find import resolve_model
from compress.run.directory import Run, by_path, find_run, is_run, require_free, run_at
from compress.run.recipe import (
    Recipe,
    check,
    near,
    read_recipe,
    require_model,
    to_yaml,
)
from compress.run.sources import checked_files

Command = Callable[..., None]

# What commands are given besides settings.
Model = Annotated[
    str | None, typer.Argument(help="A directory, a short name or a hub id. [default: embedded]")
]
Planned = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Directories, config.json files, or as for search."),
]
Target = Annotated[
    str, typer.Argument(metavar="RUN[:CANDIDATE]", help="A run, by default its best candidate.")
]
RunName = Annotated[
    str | None,
    typer.Option("--run", help="Name under runs/, or a path. [default: MODEL or MODEL-SPACE]"),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
]
Exported = Annotated[Path, typer.Argument(metavar="DIR", help="What export wrote.")]
ReaderName = Annotated[Reader | None, typer.Option(help="Who reads it. [default: compress]")]
ReaderPython = Annotated[
    Path | None, typer.Option(metavar="PATH", help="A Python that has the reader's package.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

PLACED = ("compute", "memory")
SERVED = ("budget", "context", "batch_size", "ssm_format", "workspace", "device")
# What weights are rounded on are sequences to train on.
ROUNDED = ("rounding", "calibration_tokens", "distill_length")
SCORED = (
    "revision", "space", "data", "seed", "sequence_length", "score_tokens", "score_length",
    "draws", "replay_tokens", *ROUNDED, *PLACED,
)  # fmt: skip
TRAINED = (
    "distill_batch_tokens",
    "learning_rate",
    "optimizer",
    "precision",
    "emulate",
    "loss",
    "validate_every",
    "patience",
)
EVALUATED = (
    "revision",
    "data",
    "eval_data",
    "final_tokens",
    "sequence_length",
    "seed",
    *ROUNDED,
    *PLACED,
)
DISTILLED = ("local_tokens", "distill_tokens", *TRAINED, *ROUNDED, *PLACED)
SEARCHED = (
    *SERVED, "active_parameters", "profile", "min_tokens_per_second", "max_latency", "baselines",
    "target", "mtp", "ranking", "trials",
    "reselect_rounds", "finalists", "short_distill_tokens", "select_tokens", "repair_tokens",
    "eval_data", "final_tokens", "workers", *SCORED, *TRAINED,
)  # fmt: skip


def settings(*keys: str) -> Callable[[Command], Command]:
    """Give a command a flag for each recipe key; it receives those that were given.

    Types and help come from the recipe, so that flags and keys cannot differ.
    """

    def decorate(command: Command) -> Command:
        only = inspect.Parameter.KEYWORD_ONLY
        flags = [inspect.Parameter(k, only, default=None, annotation=flag(k)) for k in keys]
        own = [
            p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            absent = {key for key in keys if arguments[key] is None}
            command(**{key: value for key, value in arguments.items() if key not in absent})

        typed: Any = run
        typed.__signature__ = inspect.Signature([*own, *flags])
        return run

    return decorate


def flag(key: str) -> Any:
    """The annotation that makes typer offer a recipe key; absent is None."""
    field = Recipe.model_fields[key]
    default = "" if field.default is None else f" [default: {field.default}]"
    option = typer.Option(f"--{key.replace('_', '-')}", help=f"{field.description}{default}")
    kind: Any = field.annotation
    return Annotated[kind | None, option]


def begin(
    name: str | None, model: str | None, given: dict[str, Any], print_config: bool
) -> tuple[Run, Recipe]:
    """The run and recipe of a command that may make a run.

    A run that exists keeps its recipe; the flags change it, and what they change is redone.
    What a look at the files can refuse is refused here, before there is a run.

    Raises:
        InputError: a wrong setting, a run of another model, no such model, family or text.
    """
    fresh = check(({} if model is None else {"model": model}) | given, "command line")
    run = run_at(name or "-".join(slug(part) for part in (fresh.model, fresh.space) if part))
    require_free(run)
    recipe, file = fresh, run.path / "recipe.yaml"
    if model is not None:
        require_model(fresh.model, run)
    if file.is_file():
        pinned = {} if fresh.revision is None else {"revision": fresh.revision}
        recipe = read_recipe(file).changed(**given | pinned)
    if print_config:
        stop_with(recipe)
    recipe = checked_files(recipe)
    if file.is_file():
        kept = set(recipe.model_dump().items()) - set(fresh.model_dump().items())
        listed = ", ".join(f"{key} {value}" for key, value in sorted(kept))
        note(f"{run.path} exists: continuing it" + (f" with its {listed}" if listed else ""))
    return run, recipe


def require_known(name: str) -> None:
    """Refuse a name that is neither a run's nor a model's."""
    try:
        resolve_model(name, config_only=True)
    except InputError as error:
        raise InputError(f"{error}; nor is it a run") from error


def compared(names: list[str], recipe: Recipe) -> list[str]:
    """The names to evaluate: a candidate alone has no table, and is compared with its teacher."""
    alone = len(names) == 1 and is_run(names[0]) and ":" in names[0]
    return [near(recipe.model), *names] if alone else names


def beside(recipe: Recipe, target: str) -> str:
    """RUN or RUN:CANDIDATE beside its teacher in a command, by path if that has its name."""
    run, candidate = find_run(target)
    return by_path(run, candidate) if run.name == near(recipe.model) else target


def require_limit(recipe: Recipe) -> None:
    """Refuse a search without any limit on bytes."""
    if recipe.budget is None and recipe.device is None:
        raise InputError("a search needs --budget (160MiB, 70%) or --device (a10g)")


def resume(
    target: str, print_config: bool = False, /, **given: Any
) -> tuple[Run, Recipe, str | None]:
    """The run, recipe and candidate that RUN[:CANDIDATE] names, the recipe changed by the flags."""
    run, candidate = find_run(target)
    recipe = read_recipe(run.path / "recipe.yaml").changed(**given)
    if print_config:
        stop_with(recipe)
    return run, recipe, candidate


def stop_with(recipe: Recipe) -> None:
    """Print the recipe as YAML and end the command."""
    print(to_yaml(recipe), end="")
    raise typer.Exit


def slug(name: str) -> str:
    """A model's or a space's name as part of a directory name."""
    last = Path(name).resolve().name if name in (".", "..") else Path(name).name
    return re.sub(r"[^a-z0-9.]+", "-", last.removesuffix(".yaml").lower()).strip("-.") or "model"


def require_comparable(models: Sequence[str], compare: bool, work: bool) -> None:
    """InputError on several models that are not to be compared, and on the work of several."""
    if len(models) > 1 and not compare:
        raise InputError(f"{models[1]} is one model more; --compare puts several side by side")
    if compare and work:
        raise InputError("--compare says what models take; --work and --on are of one model")
