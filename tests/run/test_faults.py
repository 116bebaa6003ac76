"""Every fault is one clear line and a documented exit code, and leaves nothing half-written."""

import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Shared
from damages import (
    bad_index,
    beyond,
    header_only,
    not_finite,
    other_shape,
    truncated,
    without,
)
from tiny_models import LLAMA

from compress.cli import app, main

# A search of seconds.
SMALL = [
    *("--target", "compress"),
    *("--sequence-length", "32", "--score-tokens", "64", "--draws", "1", "--replay-tokens", "32"),
    *(
        "--select-tokens",
        "64",
        "--calibration-tokens",
        "512",
        "--final-tokens",
        "64",
        "--trials",
        "4",
        "--finalists",
        "1",
    ),
    *("--short-distill-tokens", "0", "--context", "64"),
]
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "runs", "away")


def write_text(file: Path, documents: int = 80) -> Path:
    """Documents that differ, enough of them for every split."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(documents):
        chosen = torch.randint(len(WORDS), (60,), generator=generator).tolist()
        rows.append(json.dumps({"text": " ".join(WORDS[index] for index in chosen)}))
    file.write_text("\n".join(rows) + "\n")
    return file


class Command:
    """Runs commands in a directory of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, list[str]]:
        """Exit code and lines on stderr."""
        self.monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), self.capsys.readouterr().err.splitlines()

    def fails(self, code: int, *arguments: str | Path, early: bool = False) -> str:
        """The one line that a command fails with; ``early`` faults say nothing before it."""
        found, lines = self(*arguments)
        errors = [line for line in lines if line.startswith("error: ")]
        assert (found, errors) == (code, lines[-1:]), lines
        assert not early or lines == errors
        assert "Traceback" not in "".join(lines)
        assert leftovers(Path()) == []
        return errors[0]

    def search(self, model: Path, *more: str | Path) -> tuple[str | Path, ...]:
        """Arguments of a small search."""
        return "search", model, "--run", "a", "--budget", "70%", *SMALL, *more


def leftovers(directory: Path) -> list[Path]:
    """What a failure must not leave."""
    return [path for path in directory.rglob("*") if path.name.endswith((".partial", ".old"))]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def formats_searched(shared: Shared, tiny_llama: Path) -> Path:
    """A run with candidates, to copy."""
    text = shared("few.jsonl", write_text)

    def search(run: Path) -> None:
        flags = ("--run", run, "--budget", "70%", "--data", text, "--space", "formats", *SMALL)
        app(["search", str(tiny_llama), *map(str, flags)], standalone_mode=False)

    return shared("formats_searched", search)


@pytest.fixture
def finished(command: Command, formats_searched: Path) -> Path:
    """A run with candidates."""
    return Path(shutil.copytree(formats_searched, "runs/a"))


def test_a_model_that_does_not_exist(command: Command) -> None:
    error = command.fails(2, *command.search(Path("no-such")), early=True)
    assert "model 'no-such' does not exist; a model is" in error
    assert "nor is it a run" in command.fails(2, "eval", "no-such", early=True)
    assert not Path("runs").exists()


def test_a_family_that_is_not_known(command: Command, model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    assert "gpt2" in command.fails(2, *command.search(model), early=True)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is not JSON"),
        ('{"model_type": "llama"}', "config.json has no"),
        (json.dumps(LLAMA | {"hidden_size": "many"}), "hidden_size is 'many', not a whole number"),
    ],
)
def test_a_config_that_cannot_be_read(
    config: str, said: str, command: Command, model: Path
) -> None:
    (model / "config.json").write_text(config)
    error = command.fails(2, *command.search(model), early=True)
    assert said in error
    assert str(model) in error


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "model.safetensors is corrupt"),
        (header_only, "model.safetensors is corrupt"),
        (without, "has no tensor model.norm.weight"),
        (beyond, "holds tensor model.surprise.weight, which no table of llama knows"),
        (other_shape, "tensor model.norm.weight in"),
        (not_finite, "tensor model.layers.1.mlp.up_proj.weight in"),
        (bad_index, "model.safetensors.index.json is not JSON"),
        (Path.unlink, "holds no safetensors file"),
    ],
)
def test_weights_that_are_not_a_model(
    damage: Callable[[Path], None], said: str, command: Command, model: Path, text: Path
) -> None:
    damage(model / "model.safetensors")
    assert said in command.fails(2, *command.search(model, "--data", text))
    assert not Path("runs/a/candidates.json").exists()
    assert not Path("runs/a/state.json").exists()


def test_a_tokenizer_that_is_missing_or_broken(command: Command, model: Path, text: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is corrupt" in command.fails(2, *command.search(model, "--data", text))
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in command.fails(2, *command.search(model, "--data", text))


def test_a_budget_that_nothing_reaches_names_the_floor(
    command: Command, tiny_llama: Path, text: Path
) -> None:
    search = command.search(tiny_llama, "--data", text, "--space", "formats", "--budget", "1KiB")
    error = command.fails(3, *search)
    assert "budget 1.000 KiB is below the smallest size this space reaches" in error
    assert not Path("runs/a/candidates.json").exists()


@pytest.mark.parametrize("stage", ["score", "search"])
def test_memory_that_is_not_there_leaves_no_run(
    stage: str, command: Command, tiny_llama: Path, text: Path
) -> None:
    asked = {
        "score": ("score", tiny_llama, "--run", "a"),
        "search": command.search(tiny_llama, "--data", text),
    }[stage]
    assert "is more than the" in command.fails(2, *asked, "--memory", "900000GiB")
    assert not Path("runs/a/recipe.yaml").exists()


def test_a_recipe_key_that_does_not_exist(command: Command) -> None:
    Path("r.yaml").write_text("buget: 70%\n")
    error = command.fails(2, "run", "r.yaml", early=True)
    assert error == "error: r.yaml: unknown key 'buget'; did you mean budget?"
    Path("r.yaml").write_text("a: [")
    assert "r.yaml is not YAML" in command.fails(2, "run", "r.yaml", early=True)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no documents"),
        (b'\n{"text": \n', "d.jsonl:2 is not JSON"),
        (b'\n{"txt": "b"}\n', "d.jsonl:2 has no text"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
        (b'{"text": "only this"}\n', "give more text, in more rows, or ask for fewer tokens"),
    ],
)
def test_text_that_is_none(
    content: bytes, said: str, command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    Path("d.jsonl").write_bytes(content)
    assert said in command.fails(2, *command.search(tiny_llama, "--data", "d.jsonl"))
    missing = command.search(tiny_llama, "--data", "none.jsonl")
    assert "none.jsonl does not exist" in command.fails(2, *missing, early=True)


def test_a_space_that_is_none(command: Command, tiny_llama: Path, text: Path) -> None:
    for content, said in (
        (b"remove: [", "is not YAML"),
        (b"\xff\xfe", "is not YAML"),
        (b"removes: block", "s.yaml: unknown key 'removes'; did you mean remove?"),
        (b"", "s.yaml holds no keys"),
    ):
        Path("s.yaml").write_bytes(content)
        search = command.search(tiny_llama, "--data", text, "--space", "s.yaml")
        assert said in command.fails(2, *search)
    search = command.search(tiny_llama, "--data", text, "--space", "jint")
    said = "space 'jint' is neither a file nor one of formats, gguf, joint"
    assert said in command.fails(2, *search)


def test_runs_and_candidates_that_do_not_exist(command: Command, finished: Path) -> None:
    for stage in ("prune", "distill", "quantize", "export", "report"):
        error = command.fails(2, stage, "b", early=True)
        assert "runs/b is not a run (no recipe.yaml); known: a" in error
    for stage in ("prune", "distill", "quantize", "export"):
        assert "no candidate c99 in runs/a; the best are" in command.fails(2, stage, "a:c99")
    assert not (finished / "export").exists()


def test_a_target_that_cannot_express_the_student(command: Command, finished: Path) -> None:
    before = (finished / "recipe.yaml").read_text()
    error = command.fails(2, "export", "a", "--target", "transformers")
    assert "target 'transformers' takes" in error
    assert not list(finished.glob("export/*"))
    # The run is what it was: its search is not redone for another target.
    assert (finished / "recipe.yaml").read_text() == before
    assert "--target" in command.fails(2, "export", "a", "--target", "gguf", early=True)


def test_tasks_without_rows(command: Command, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    evaluate = ("eval", tiny_llama, "--data", text, "--sequence-length", "32")
    evaluate = (*evaluate, "--final-tokens", "64", "--tasks", "no_such_task")
    (tmp_path / "rows/piqa").mkdir(parents=True)
    write_text(tmp_path / "rows/piqa/validation.jsonl", 2)
    error = command.fails(2, *evaluate, "--task-data", "rows")
    assert "rows has no file for task 'no_such_task'; it has: piqa" in error
    error = command.fails(2, *evaluate, "--task-data", "nowhere")
    assert "task data nowhere is not a directory" in error


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_while_an_export_is_written(command: Command, finished: Path) -> None:
    with small_disk(20_000):
        error = command.fails(2, "export", "a")
    assert "File too large" in error
    assert not list(finished.glob("export/*"))
    code, lines = command("export", "a")
    assert code == 0, lines


def test_a_disk_that_fills_while_a_search_writes(
    command: Command, tiny_llama: Path, text: Path
) -> None:
    with small_disk(20_000):
        error = command.fails(2, *command.search(tiny_llama, "--data", text))
    assert "File too large" in error
    assert not Path("runs/a/candidates.json").exists()


def test_an_interrupted_search_continues(
    command: Command, tiny_llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = command.search(tiny_llama, "--data", text, "--space", "formats")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compress.run.search.with_finalists", interrupted)
        error = command.fails(130, *search)
    assert error == "error: interrupted; the same command continues"
    assert not Path("runs/a/candidates.json").exists()
    code, lines = command(*search)
    assert code == 0, lines
    assert lines[-1].startswith("next: compress distill a")
    assert Path("runs/a/candidates.json").is_file()
