"""A run from search to report, what a changed setting redoes, and kills at every stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from killed import killed_at_every_write
from tiny_models import search_arguments

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.run import search as searching
from compress.run import stages, students
from compress.run.directory import Run
from compress.run.recipe import read_recipe
from compress.scores import reselect
from runs import again, command, rows_of, same, stamps


def refuse(*arguments: Any, **_: Any) -> None:
    raise AssertionError("a finished stage was redone")


def test_candidates_of_every_kind_fit_best_first(searched: Path) -> None:
    rows, teacher = rows_of(searched), read_json(searched / "teacher.json")
    assert all(0 < row["bytes"] <= teacher["budget"] for row in rows)
    assert teacher["budget"] < teacher["bytes"]["total"]
    unfit = {row["kind"] for row in read_json(searched / "baselines.json")}
    kinds = {"joint", "prune", "formats", "prune_then_quantize", "uniform", "random"}
    assert {row["kind"] for row in rows} | unfit == kinds
    finalists = [row for row in rows if row["finalist"]]
    assert rows[: len(finalists)] == finalists
    assert [row["selected"] for row in rows].count(True) == 1
    after = [row["distilled_kl"] for row in finalists]
    assert after == sorted(after)
    others = [row["measured_kl"] for row in rows[len(finalists) :]]
    assert others == sorted(others)
    assert all(row["distilled_kl"] is None for row in rows[len(finalists) :])
    found = {directory.name for directory in (searched / "candidates").iterdir()}
    assert found == {row["id"] for row in rows}


def test_the_model_card_says_how_many_blocks_were_repaired(run_copy: Path) -> None:
    rows = rows_of(run_copy)
    repaired = next(row for row in rows if row["repaired"])
    plain = next(row for row in rows if not row["repaired"])
    for row in (repaired, plain):
        command("export", f"{run_copy}:{row['id']}")
        text = (run_copy / "export" / row["id"] / "README.md").read_text()
        blocks = len(row["architecture"]["blocks"])
        said = f"{len(row['repaired'])} of {blocks} blocks are repaired"
        assert (said in text) == bool(row["repaired"])
        assert ("repaired" in text) == bool(row["repaired"])


def test_from_search_to_report(
    run_copy: Path, tiny_hybrid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(row["id"] for row in rows_of(run_copy) if row["selected"])
    command("distill", run_copy, "--distill-tokens", 768)
    assert (run_copy / "distill" / name / "student" / "model.safetensors").is_file()
    command("export", run_copy)
    command("export", f"{run_copy}:uniform-000")
    exported = sorted(path.name for path in (run_copy / "export").iterdir())
    assert exported == sorted([name, "uniform-000"])
    capsys.readouterr()
    other = f"{run_copy}:random-000"
    command("eval", tiny_hybrid, run_copy, other, "--json")
    found = json.loads(capsys.readouterr().out)
    assert list(found["models"]) == [str(tiny_hybrid), str(run_copy), other]
    assert found["models"][str(tiny_hybrid)]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["models"][str(run_copy)]["kl"] > 0
    bytes_of = {row["id"]: row["bytes"] for row in rows_of(run_copy)}
    assert found["models"][str(run_copy)]["bytes"] == bytes_of[name]
    assert found["models"][other]["bytes"] == bytes_of["random-000"]
    command("report", run_copy)
    page = (run_copy / "report" / "index.html").read_text()
    assert name in page


def test_a_finished_stage_is_not_redone(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command("distill", f"{run_copy}:uniform-000")
    before = stamps(run_copy, "**/*.safetensors") | stamps(run_copy, "candidates.json")
    monkeypatch.setattr(searching, "studied", refuse)
    monkeypatch.setattr(students, "train_on_teacher", refuse)
    again(run_copy)
    command("distill", f"{run_copy}:uniform-000")
    assert before == stamps(run_copy, "**/*.safetensors") | stamps(run_copy, "candidates.json")


def test_a_changed_setting_redoes_what_it_decides_and_nothing_before(alone_copy: Path) -> None:
    command("distill", f"{alone_copy}:joint-000")
    (alone_copy / "table.json").write_text("[]")
    scores, old = stamps(alone_copy, "scores/*"), rows_of(alone_copy)
    before = stamps(alone_copy, "**/*")
    with pytest.raises(InputError, match=r"distill/joint-000 .* another --run NAME"):
        again(alone_copy, budget="42%")
    assert stamps(alone_copy, "**/*") == before
    shutil.rmtree(alone_copy / "distill" / "joint-000")
    again(alone_copy, budget="42%")
    rows = rows_of(alone_copy)
    assert stamps(alone_copy, "scores/*") == scores
    assert max(row["bytes"] for row in rows) > max(row["bytes"] for row in old)
    # What was said and made under the old budget speaks for no new candidate of the same name.
    assert not (alone_copy / "table.json").exists()
    moved = {row["id"] for row in rows if row["architecture"] not in
             [o["architecture"] for o in old if o["id"] == row["id"]]}  # fmt: skip
    assert "joint-000" in moved
    # The budget before gives the candidates before.
    again(alone_copy, budget="36%")
    assert same(rows_of(alone_copy), old)
    # Text that only the evaluation reads changes nothing.
    candidates = stamps(alone_copy, "candidates.json")
    recipe = read_recipe(alone_copy / "recipe.yaml")
    again(alone_copy, eval_data=recipe.data)
    assert stamps(alone_copy, "candidates.json") == candidates
    # What is rounded otherwise is priced and measured anew.
    again(alone_copy, rounding="nearest")
    assert stamps(alone_copy, "scores/scores*").items().isdisjoint(scores.items())
    assert not same(rows_of(alone_copy), old)
    scores = stamps(alone_copy, "scores/scores*")
    again(alone_copy, draws=3)
    assert stamps(alone_copy, "scores/scores*") != scores


def test_units_chosen_again_lower_the_kl_at_the_same_sizes(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So little text is no proof of anything: here whatever looks better is taken.
    monkeypatch.setattr(reselect, "MOST_TRUST", 1.0)
    monkeypatch.setattr(reselect, "CERTAIN", 1.0)
    again(run_copy, reselect_rounds=3, baselines="prune")
    with_them = {row["id"]: row for row in rows_of(run_copy)}
    again(run_copy, reselect_rounds=0)
    without = {row["id"]: row for row in rows_of(run_copy)}
    assert with_them.keys() == without.keys()
    assert not any(row["reselected"] for row in without.values())
    for name, row in with_them.items():
        assert row["architecture"] == without[name]["architecture"]
        if row["reselected"]:
            assert row["measured_kl"] < without[name]["measured_kl"]
        else:
            assert row["measured_kl"] == without[name]["measured_kl"]
    assert any(row["reselected"] for row in with_them.values())


def test_too_little_selection_text_to_choose_units_again_is_said(
    alone_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(alone_copy, select_tokens=4 * 32, short_distill_tokens=0)
    said = " ".join(capsys.readouterr().err.split())
    assert f"4 sequences of select text prove nothing better; --select-tokens {5 * 32}" in said
    assert not any(row["reselected"] for row in rows_of(alone_copy))
    again(alone_copy, reselect_rounds=0, select_tokens=4 * 32, short_distill_tokens=0)
    assert "prove nothing" not in capsys.readouterr().err


def test_other_selection_text_is_another_study(alone_copy: Path) -> None:
    again(alone_copy, select_tokens=256, short_distill_tokens=0)
    sequences = {row["measured_sequences"] for row in rows_of(alone_copy)}
    assert sequences == {256 // 32}
    assert all(row["distilled_kl"] is None for row in rows_of(alone_copy))


def test_a_run_whose_teacher_fits_says_so_in_every_later_stage(alone_copy: Path) -> None:
    again(alone_copy, budget="100%", space=None)
    assert not (alone_copy / "candidates.json").exists()
    recipe = read_recipe(alone_copy / "recipe.yaml")
    for stage in (stages.prune, stages.distill, stages.quantize, stages.export):
        with pytest.raises(InputError, match="the teacher fits as it is"):
            stage(Run(alone_copy), recipe)
    with pytest.raises(InputError, match="the teacher fits as it is"):
        command("eval", recipe.model, alone_copy)
    command("report", alone_copy)


def test_an_unknown_candidate_lists_known_ones(run_copy: Path) -> None:
    with pytest.raises(InputError, match=r"no candidate joint-999 .* the best are .*joint"):
        command("export", f"{run_copy}:joint-999")


def test_killed_at_every_write_a_search_ends_as_if_it_had_not_been(
    alone: Path, tiny_hybrid: Path, text_file: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "killed", tmp_path / "log"
    arguments = [*search_arguments(tiny_hybrid, run, text_file), "--baselines", "none"]
    kinds = killed_at_every_write(arguments, run, log)
    assert same(rows_of(run), rows_of(alone))
    assert not list(run.rglob("*.partial"))
    assert not list((run / "scores").glob("parts-*"))
    for kind in ("scores/parts-", "journal: ", "study/reselected/", "candidates/", "distill/"):
        assert any(found.startswith(kind) for found in kinds)
