"""A quantized model is a teacher: searched dequantized, its bytes those that it has on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from packers import CASES, FILE, write_quantized
from quantized import with_formats
from tiny_models import search_arguments

from compress import cli
from compress.core.files import read_json
from compress.export.student import export_student
from compress.export.verify import tensor_bytes
from compress.memory.footprint import Deployment, footprint
from compress.memory.plan import make_plan
from compress.model.checkpoint import open_checkpoint
from compress.run.directory import Run
from compress.run.recipe import check
from compress.run.session import Session

NAME = "INT4 by compressed-tensors"
SERVED = Deployment(context=64)
SHORT = ["--trials", "2", "--baselines", "none", "--space", "formats", "--budget", "60%"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    write_quantized(tmp_path / "teacher", *CASES[NAME])
    return tmp_path / "teacher"


def test_its_bytes_are_those_on_disk(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(teacher, SERVED)
    in_bf16 = footprint(open_checkpoint(teacher).architecture, SERVED)
    assert plan.stored
    assert plan.stored.formats == NAME
    assert plan.stored.weights == tensor_bytes([teacher / FILE]) < in_bf16.weights
    assert plan.footprint == in_bf16
    assert plan.served == replace(in_bf16, weights=plan.stored.weights)
    session = Session(Run(teacher / "run"), check({"model": str(teacher), "context": "64"}, "test"))
    assert session.teacher_bytes == in_bf16.total
    assert session.served_bytes == plan.served.total
    cli.app(["plan", str(teacher), "--context", "64", "--budget", "1MiB"], standalone_mode=False)
    said = capsys.readouterr().out
    assert f"as it is on disk, {NAME}: " in said
    assert "in BF16, as a search reads it: " in said
    cli.app(["plan", str(teacher), "--context", "64", "--json"], standalone_mode=False)
    stored = json.loads(capsys.readouterr().out)["stored"]
    assert stored == {
        "formats": NAME, "weights": plan.stored.weights, "total": plan.served.total
    }  # fmt: skip


def test_without_weights_the_index_says_what_they_take(teacher: Path) -> None:
    (teacher / FILE).unlink()
    assert (found := make_plan(teacher, SERVED).stored)
    assert (found.formats, found.weights) == ("compressed-tensors", None)
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model-00001.safetensors"}}
    (teacher / f"{FILE}.index.json").write_text(json.dumps(index))
    assert (found := make_plan(teacher, SERVED).stored)
    assert found.weights == 12345


def test_a_search_says_what_its_teacher_was(
    teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    cli.app([*search_arguments(teacher, run, text_file), *SHORT], standalone_mode=False)
    written = read_json(run / "teacher.json")
    assert written["note"] == f"dequantized from {NAME}"
    cli.app(["export", str(run)], standalone_mode=False)
    [card] = (run / "export").glob("*/README.md")
    assert f"dequantized from {NAME}" in card.read_text()


def test_an_export_is_searched_again(text_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    architecture = with_formats(open_checkpoint(tiny_llama).architecture, ["nvfp4", "bf16"])
    export_student(tiny_llama, tmp_path / "first", architecture, "vllm", {})
    run = tmp_path / "run"
    arguments = search_arguments(tmp_path / "first", run, text_file)
    cli.app([*arguments, *SHORT], standalone_mode=False)
    assert read_json(run / "teacher.json")["note"] == "dequantized from NVFP4 by compress"
    best = read_json(run / "candidates.json")[0]
    assert best["bytes"] <= read_json(run / "teacher.json")["budget"]
    assert best["measured_kl"] > 0
