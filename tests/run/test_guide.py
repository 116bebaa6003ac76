from pathlib import Path

import pytest
from search_files import architecture, student, write_search

from compress.core.errors import InputError
from compress.core.files import read_json, write_json, write_text
from compress.report.rows import read_students
from compress.run.directory import Run, run_at
from compress.run.guide import next_step, possessions
from compress.run.recipe import Recipe, write_recipe


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    write_recipe(Recipe(budget="60%"), Path("runs/a/recipe.yaml"))
    return run_at("a")


def test_the_next_step_is_the_first_whose_files_are_missing(run: Run) -> None:
    assert next_step(run) == "compress search --run a --budget 60%"
    write_search(run.path)
    assert next_step(run) == "compress search --run a --budget 60% --space joint"
    rows = student("c1", architecture(16), selected=False), student("c2", architecture(8))
    write_search(run.path, *rows)
    assert next_step(run) == "compress distill a"
    write_text(run.path / "distill/c1/curve.jsonl", "")
    assert next_step(run) == "compress distill a"
    write_text(run.path / "distill/c2/curve.jsonl", "")
    assert next_step(run) == "compress export a"
    write_text(run.path / "export/c2/config.json", "{}")
    assert next_step(run) == "compress eval a"
    write_json(run.path / "eval/results.json", {})
    assert next_step(run) == "compress plan runs/a/export/c2"


def test_students_in_other_formats_only_are_trained_the_teacher_itself_is_not(run: Run) -> None:
    write_search(run.path, student("c1", architecture(16, "fp8")))
    assert next_step(run) == "compress distill a"
    write_search(run.path, student("c1", architecture(16)))
    assert next_step(run) == "compress export a"


def test_possessions_are_what_is_there(run: Run) -> None:
    assert len(list(possessions(run))) == 1
    write_search(run.path, student("c1", architecture(8)))
    write_text(run.path / "export/c1/config.json", "{}")
    write_text(run.path / "report/index.html", "")
    lines = "\n".join(possessions(run))
    assert "compress.load('runs/a/export/c1')" in lines
    assert "runs/a/report/index.html" in lines
    assert "table.json" not in lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measured_kl": "much"}, "candidates.json, 1.measured_kl is 'much'"),
        ({"surprise": 1}, "candidates.json, unknown key '1.surprise'"),
        ({"bytes": None}, "candidates.json, 1.bytes is None"),
        ({"architecture": {}}, "candidates.json, 1.architecture.family is missing"),
    ],
)
def test_a_row_that_is_none_is_named(run: Run, change: dict[str, object], said: str) -> None:
    rows = [student(name, architecture(8)) for name in ("c1", "c2")]
    write_search(run.path, *rows)
    assert read_students(run.path) == tuple(rows)
    written = read_json(run.path / "candidates.json")
    write_json(run.path / "candidates.json", [written[0], written[1] | change])
    with pytest.raises(InputError) as error:
        next_step(run)
    assert said in str(error.value)
