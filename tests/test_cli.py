from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from commands import in_fresh_process, run
from search_files import architecture, student, write_search

from compress.cli import app
from compress.core.errors import Infeasible, VerificationFailed
from compress.run.evaluate import Asked
from compress.run.recipe import Recipe, write_recipe

COMMANDS = [
    *("plan", "score", "search", "prune", "distill", "quantize", "export", "verify"),
    *("bench", "profile", "eval"),
    *("pretrain", "run", "report", "quickstart", "fetch"),
]


class Called(SimpleNamespace):
    """Stages that note how they were called."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def __getattr__(self, name: str) -> Any:
        def note(*arguments: Any) -> list[str]:
            self.calls.append((name, arguments))
            if name == "search":
                made, recipe = arguments
                write_recipe(recipe, made.path / "recipe.yaml")
            return ["small"] if name == "finish" else []

        return note


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Called:
    called = Called()
    monkeypatch.setattr("compress.run.stages", called, raising=False)
    monkeypatch.chdir(tmp_path)
    return called


def test_every_stage_is_a_command_with_help_and_without_torch() -> None:
    assert [
        command.name or command.callback.__name__ for command in app.registered_commands
    ] == COMMANDS
    output, imported, seconds = in_fresh_process("--help")
    assert imported == set()
    assert seconds < 1
    assert all(f"  {name} " in output for name in COMMANDS)
    assert "Exit codes: 0 done, 2 wrong usage or input, 3 budget infeasible, 4 not" in output


@pytest.mark.parametrize("command", ["score", "search", "distill", "export", "eval", "run"])
def test_flags_are_recipe_keys(command: str) -> None:
    [registered] = [
        each for each in app.registered_commands if (each.name or each.callback.__name__) == command
    ]
    own = {"model", "models", "run", "print_config", "json", "recipe"}
    own |= {"tasks", "task_data", "limit"}
    flags = set(registered.callback.__signature__.parameters) - own
    assert flags
    assert flags <= set(Recipe.model_fields)


def test_print_config_shows_the_resolved_recipe(
    stages: Called, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "search", "--budget", "70%", "--trials", "5", "--print-config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == Recipe(budget="70%", trials=5).model_dump()
    assert stages.calls == []
    assert not Path("runs").exists()


def test_search_passes_its_recipe_and_names_the_next_command(
    stages: Called, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(Recipe(budget="60%"), Path("runs/embedded/recipe.yaml"))
    write_search(Path("runs/embedded"), student("c1", architecture(8)))
    assert run(monkeypatch, "search", "--budget", "70%") == 0
    [(name, (made, recipe))] = stages.calls
    assert name == "search"
    assert str(made.path) == "runs/embedded"
    assert recipe == Recipe(budget="70%")
    assert "next: compress distill embedded" in capsys.readouterr().err


def test_a_run_keeps_its_recipe_and_flags_change_it(
    stages: Called, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "search", "--run", "a", "--budget", "70%", "--trials", "7")
    run(monkeypatch, "search", "--run", "a", "--budget", "60%")
    run(monkeypatch, "distill", "a:c2", "--learning-rate", "1e-4")
    assert stages.calls[1][1][1] == Recipe(budget="60%", trials=7)
    changed = Recipe(budget="60%", trials=7, learning_rate=1e-4)
    assert stages.calls[2] == ("distill", (stages.calls[0][1][0], changed, "c2"))
    saved = yaml.safe_load(Path("runs/a/recipe.yaml").read_text())
    assert saved == changed.model_dump()
    assert "runs/a exists: continuing it with its trials 7" in capsys.readouterr().err
    assert run(monkeypatch, "search", "other", "--run", "a") == 2


def test_eval_passes_tasks_and_a_candidate_is_compared_with_its_teacher(
    stages: Called, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--tasks", "choice, piqa", "--task-data", "rows", "--limit", "5", "--seed", "3")
    assert run(monkeypatch, "eval", "embedded", *asked) == 0
    recipe, tasks = Recipe(seed=3), ["choice", "piqa"]
    assert stages.calls[0][1] == (["embedded"], Asked(tasks, Path("rows"), 5), recipe, False)
    assert capsys.readouterr().err == "next: compress search embedded --budget 70%\n"
    write_recipe(Recipe(trials=7), Path("runs/a/recipe.yaml"))
    for names, compared in ((["a"], ["a"]), (["a:c2"], ["embedded", "a:c2"])):
        assert run(monkeypatch, "eval", *names) == 0
        assert stages.calls[-1][1] == (compared, Asked([]), Recipe(trials=7), False)
        assert capsys.readouterr().err == "next: compress report a\n"


def test_run_goes_through_all_stages(
    stages: Called, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("small.yaml").write_text("budget: 70%\ntrials: 5\n")
    monkeypatch.setattr("compress.cli.report", lambda name: stages.calls.append(("report", name)))
    assert run(monkeypatch, "run", "small.yaml", "--seed", "3") == 0
    # Finishing trains and exports what was chosen at every budget.
    assert [name for name, _ in stages.calls] == ["search", "finish", "evaluate", "report"]
    assert stages.calls[0][1][1] == Recipe(budget="70%", trials=5, seed=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serch"], "No such command 'serch'"),
        (["search", "--budgett", "3"], "--budgett"),
        (["search", "--budget", "lots"], "budget 'lots' is not understood"),
        (["search", "--trials", "0", "--budget", "70%"], "trials is 0"),
        (["search"], "a search needs --budget"),
        (["search", "--device", "h101"], "known: a10g"),
        (["plan"], "Missing argument"),
        (["plan", "no-such-model"], "does not exist"),
        (["distill", "no-such-run"], "is not a run"),
        (["run", "missing.yaml"], "cannot be read"),
        (["pretrain", "missing.yaml"], "does not exist"),
        (["fetch", "gpt-5"], "cannot be fetched; known: smollm2-135m"),
    ],
)
def test_wrong_usage_and_input_exit_2_with_one_line(
    arguments: list[str],
    message: str,
    stages: Called,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (Infeasible("budget 1 B is below the floor"), 3, "below the floor"),
        (VerificationFailed("logits differ"), 4, "logits differ"),
        (
            OSError(28, "No space left on device", "runs/a/x"),
            2,
            "No space left on device: runs/a/x",
        ),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ],
)
def test_failures_have_their_documented_codes(
    failure: BaseException,
    code: int,
    message: str,
    stages: Called,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise failure

    stages.search = fail
    assert run(monkeypatch, "search", "--budget", "70%") == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_broken_configs_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in (("{", "is not JSON"), ("{}", "no model_type"), ("[]", "no settings")):
        (tmp_path / "config.json").write_text(text)
        assert run(monkeypatch, "plan", str(tmp_path)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
