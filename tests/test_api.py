from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import QUICK

import compress
from compress.core.errors import InputError
from compress.core.files import read_json
from compress.memory.budget import teacher_bytes
from compress.memory.footprint import Deployment
from compress.model.architecture import block_name
from compress.model.checkpoint import open_checkpoint

IDS = torch.arange(2, 26)[None]


@pytest.fixture
def settings(text_file: Path, run_copy: Path) -> dict[str, Any]:
    """Those of the searched run."""
    return {**QUICK, "data": str(text_file), "run": str(run_copy)}


def test_a_plan_is_what_the_command_prints_as_json(tiny: Path) -> None:
    found = compress.plan(str(tiny), context="64", budget="50%")
    whole = teacher_bytes(open_checkpoint(tiny).architecture, Deployment(context=64))
    assert found["bytes"]["total"] == whole
    assert found["budget"] == whole // 2
    assert found["fits"] is False
    with pytest.raises(InputError, match="did you mean budget"):
        compress.plan(str(tiny), bugdet="50%")


def test_scores_cover_every_block_and_are_kept_in_the_run(
    tiny_hybrid: Path, settings: dict[str, Any]
) -> None:
    file = Path(settings["run"]) / "scores" / "scores.safetensors"
    before = file.stat().st_mtime_ns
    found = compress.score(str(tiny_hybrid), **settings)
    blocks = open_checkpoint(tiny_hybrid).architecture.blocks
    assert set(found.removals) == {block_name(block) for block in blocks}
    assert found.length == QUICK["score_length"]
    assert file.stat().st_mtime_ns == before


def test_a_search_gives_the_rows_of_its_file(tiny_hybrid: Path, settings: dict[str, Any]) -> None:
    found = compress.search(str(tiny_hybrid), **settings)
    assert found == read_json(Path(settings["run"]) / "candidates.json")
    assert sum(row["selected"] for row in found) == 1


def test_a_search_of_a_teacher_that_fits_gives_nothing(
    tiny_hybrid: Path, settings: dict[str, Any]
) -> None:
    assert compress.search(str(tiny_hybrid), **settings | {"budget": "1GiB", "space": None}) == []


@pytest.mark.parametrize("made", ["distill/joint-000", "export/prune-001"])
@pytest.mark.parametrize("changed", [{"budget": "42%"}, {"budget": "1GiB", "space": None}])
def test_a_search_with_other_settings_deletes_no_students(
    made: str, changed: dict[str, Any], tiny_hybrid: Path, settings: dict[str, Any]
) -> None:
    run = Path(settings["run"])
    (run / made).mkdir(parents=True)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    with pytest.raises(InputError, match=f"holds {made} .* --run NAME"):
        compress.search(str(tiny_hybrid), **settings | changed)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_every_directory_loads_as_a_module_that_generates(run_copy: Path, tiny: Path) -> None:
    finalists = [row for row in read_json(run_copy / "candidates.json") if row["finalist"]]
    students = [run_copy / "candidates" / row["id"] for row in finalists]
    for path in (tiny, *students):
        model = compress.load(path)
        assert isinstance(model, torch.nn.Module)
        assert model.dtype == torch.float32
        logits = model(input_ids=IDS).logits
        assert logits.shape == (*IDS.shape, 128)
        assert torch.isfinite(logits).all()
        longer = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert longer.shape == (1, IDS.shape[1] + 3)
        assert int(longer[0, IDS.shape[1]]) == int(logits[0, -1].argmax())


def test_an_evaluation_is_what_the_command_prints_as_json(
    tiny_hybrid: Path, run_copy: Path
) -> None:
    found = compress.evaluate([str(tiny_hybrid), str(run_copy)])
    assert set(found) >= {"models", "paired"}
    for row in found["models"].values():
        assert set(row) >= {"bytes", "kl", "nats_per_token", "bits_per_byte", "tasks"}
    assert {pair["metric"] for pair in found["paired"]} >= {"kl", "nats_per_token"}
    again = read_json(run_copy / "eval" / "results.json")
    assert again == found
