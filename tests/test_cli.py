import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from published import HYBRID_9B, PUBLISHED
from search_files import architecture, student, write_search

import compress
from compress.cli import app, main
from compress.core.errors import Infeasible, VerificationFailed
from compress.run.evaluate import Asked
from compress.run.recipe import Recipe, write_recipe

COMMANDS = [
    *("plan", "score", "search", "prune", "distill", "quantize", "export", "eval"),
    *("pretrain", "run", "report", "quickstart", "fetch"),
]
# Whatever it is called for, importing these takes seconds.
HEAVY = ("torch", "transformers", "scipy", "optuna", "matplotlib", "modelopt")


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


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HYBRID_9B))
    return str(file)


def in_fresh_process(*arguments: str) -> tuple[str, set[str], float]:
    """Output of a command, the heavy packages it imported, and its seconds."""
    code = (
        "import sys; from compress.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    begun = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(compress.__file__).parent.parent)},
    )
    imported = json.loads(done.stderr.splitlines()[-1].replace("'", '"'))
    # Seconds of work, not of waiting for a core that other tests use.
    ended = os.times()
    seconds = ended.children_user + ended.children_system
    return done.stdout, set(imported), seconds - begun.children_user - begun.children_system


def test_every_stage_is_a_command_with_help_and_without_torch() -> None:
    assert [
        command.name or command.callback.__name__ for command in app.registered_commands
    ] == COMMANDS
    output, imported, seconds = in_fresh_process("--help")
    assert imported == set()
    assert seconds < 1
    assert all(f"  {name} " in output for name in COMMANDS)
    assert "Exit codes: 0 done, 2 wrong usage or input, 3 budget infeasible, 4 not" in output


def test_plan_answers_in_json_without_torch(config: str) -> None:
    output, imported, seconds = in_fresh_process(
        "plan", config, "--context", "128k", "--budget", "22GiB", "--json"
    )
    assert imported == set()
    assert seconds < 1
    assert json.loads(output) == {
        "family": "nemotron_h",
        "layers": 56,
        "parameters": {"total": 8888227328, "active": 8888227328},
        "bytes": {
            "weights": 17776454656,
            "kv_cache": 2147483648,
            "ssm_state": 141557760,
            "conv_state": 1990656,
            "mtp": 0,
            "workspace": 0,
            "total": 20067486720,
        },
        "budget": 23622320128,
        "fits": True,
        "largest_context": 348041,
        "largest_batch": 2,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_counts_every_family_without_torch(name: str, tmp_path: Path) -> None:
    written, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    output, imported, _ = in_fresh_process("plan", str(tmp_path), "--json")
    assert imported == set()
    assert json.loads(output)["parameters"]["total"] == count


def test_plan_says_what_the_work_takes_without_torch(config: str) -> None:
    command = ("plan", config, "--work", "--on", "a10g")
    output, imported, _ = in_fresh_process(*command, "--json")
    assert imported == set()
    work = json.loads(output)["work"]
    assert work["machine"]["name"] == "a10g"
    fits = {stage["stage"]: stage["fits"] for stage in work["stages"]}
    assert fits == {"score": True, "search": False, "distill": False, "export": True}
    printed, imported, _ = in_fresh_process(*command)
    assert imported == set()
    lines = printed.splitlines()
    table = lines[next(at for at, line in enumerate(lines) if "the work on a10g" in line) :]
    assert [word for word in fits if any(word in line for line in table)] == list(fits)
    assert all(len(line.rstrip()) <= 80 for line in table if "│" in line)


def test_plan_prints_a_row_for_all_blocks_that_are_alike(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", config, "--device", "a10g", "--budget", "40GiB") == 0
    output = capsys.readouterr().out
    assert output.count("kv_head 8, query 5, head_dim 128") == 1
    assert output.count("nvfp4, bf16") == 1
    assert "fp8 KV caches are left out: a10g is not sure to run them" in output
    assert "a10g offers 22.060 GiB (binds; budget 40.000 GiB)" in output


def test_models_side_by_side_fit_into_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["Nemotron-Nano-12B-v2", "Nemotron-Nano-9B-v2", "Qwen3-8B", "Qwen3-30B-A3B"]
    for name in names:
        (tmp_path / name.removeprefix("Nemotron-")).mkdir()
        file = tmp_path / name.removeprefix("Nemotron-") / "config.json"
        file.write_text(json.dumps(PUBLISHED[name][0]))
    paths = [str(file.parent) for file in sorted(tmp_path.glob("*/config.json"))]
    served = ("--context", "128k", "--device", "a10g")
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "plan", "--compare", *paths, *served) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if "│" in line]
    assert all(len(line.rstrip()) <= 80 for line in table)
    rows = {cells[0]: cells[1:] for line in table if (cells := line.strip("│ ").split("│"))}
    rows = {key.strip(): [cell.strip() for cell in cells] for key, cells in rows.items()}
    # In the order of their names: Nano-12B, Nano-9B, Qwen3-30B, Qwen3-8B.
    assert rows["active"] == ["12.310B", "8.888B", "3.353B", "8.191B"]
    assert rows["weights"] == ["22.929 GiB", "16.556 GiB", "56.871 GiB", "15.256 GiB"]
    assert rows["KV cache"] == ["3.000 GiB", "2.000 GiB", "12.000 GiB", "18.000 GiB"]
    assert rows["fits"] == ["no", "yes", "no", "no"]
    assert rows["largest batch"] == ["0", "2", "0", "0"]
    assert run(monkeypatch, "plan", *paths, *served, "--compare", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert [planned[path]["largest_batch"] for path in paths] == [0, 2, 0, 0]
    assert run(monkeypatch, "plan", *paths) == 2
    assert "--compare puts several side by side" in capsys.readouterr().err
    assert run(monkeypatch, "plan", paths[1], *served, "--max-batch") == 0
    assert "largest batch that fits: 2" in capsys.readouterr().out


def test_plan_asks_what_if_by_format(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--context", "128k", "--format", "fp8", "--kv-format", "fp8", "--json")
    assert run(monkeypatch, "plan", config, *asked) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["bytes"]["kv_cache"] == 2147483648 // 2
    assert planned["bytes"]["weights"] < 17776454656 * 0.6
    assert planned["budget"] is planned["fits"] is planned["largest_context"] is None


def test_plan_says_where_memory_is_not_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HYBRID_9B | {"max_position_embeddings": 131072}))
    for budget, said in (("22GiB", True), ("17GiB", False)):
        assert run(monkeypatch, "plan", str(file), "--budget", budget) == 0
        assert ("made for 131,072 tokens" in capsys.readouterr().out) == said


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
