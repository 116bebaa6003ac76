from pathlib import Path
from typing import Any

import pytest

from compress.core.files import write_json, write_text
from compress.run.directory import Run, run_at
from compress.run.guide import next_step, possessions
from compress.run.recipe import Recipe, write_recipe


def architecture(ffn: int, format: str = "bf16") -> dict[str, Any]:
    return {"hidden": 8, "blocks": [{"kind": "ffn", "layer": 0, "ffn": ffn, "format": format}]}


TEACHER = {"architecture": architecture(16)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    write_recipe(Recipe(budget="60%"), Path("runs/a/recipe.yaml"))
    return run_at("a")


def test_the_next_step_is_the_first_whose_files_are_missing(run: Run) -> None:
    assert next_step(run) == "compress search --run a --budget 60%"
    write_json(run.path / "teacher.json", TEACHER)
    assert next_step(run) == "compress search --run a --budget 60% --space joint"
    rows: list[dict[str, Any]] = [{"id": "c1", "selected": False}]
    rows.append({"id": "c2", "selected": True, "architecture": architecture(8)})
    write_json(run.path / "candidates.json", rows)
    assert next_step(run) == "compress distill a"
    write_text(run.path / "distill/c1/curve.jsonl", "")
    assert next_step(run) == "compress distill a"
    write_text(run.path / "distill/c2/curve.jsonl", "")
    assert next_step(run) == "compress export a"
    write_text(run.path / "export/c2/config.json", "{}")
    assert next_step(run) == "compress eval a"
    write_json(run.path / "eval/results.json", {})
    assert next_step(run) == "compress plan runs/a/export/c2"


def test_students_in_other_formats_only_are_not_trained(run: Run) -> None:
    write_json(run.path / "teacher.json", TEACHER)
    rows = [{"id": "c1", "selected": True, "architecture": architecture(16, "fp8")}]
    write_json(run.path / "candidates.json", rows)
    assert next_step(run) == "compress export a"


def test_possessions_are_what_is_there(run: Run) -> None:
    assert len(list(possessions(run))) == 1
    write_json(run.path / "candidates.json", [{"id": "c1", "kind": "joint", "selected": True}])
    write_text(run.path / "export/c1/config.json", "{}")
    write_text(run.path / "report/index.html", "")
    lines = "\n".join(possessions(run))
    assert "compress.load('runs/a/export/c1')" in lines
    assert "runs/a/report/index.html" in lines
    assert "table.json" not in lines
