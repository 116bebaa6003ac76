"""Several processes on one run: one result, whoever is killed; other settings are refused."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny_models import ONE_THREAD, search_command

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.run.directory import Run
from compress.run.recipe import read_recipe
from compress.run.together import alone, joined
from runs import again, rows_of, same

TRIALS = 10


def workers(journal: Path) -> set[str]:
    """Names of those whose trials are in a journal."""
    whole = journal.read_text() if journal.is_file() else ""
    return set(re.findall(r'"worker":"(\w+)"', whole))


def test_a_search_of_two_processes_is_finished_by_the_one_that_is_left(
    searched: Path, run_copy: Path, tiny_hybrid: Path, text_file: Path
) -> None:
    shutil.rmtree(run_copy / "study")
    (run_copy / "candidates.json").unlink()
    journal = run_copy / "study" / "journal.log"
    arguments = [
        *search_command(tiny_hybrid, run_copy, text_file),
        *("--trials", str(TRIALS), "--baselines", "none", "--short-distill-tokens", "0"),
        *("--workers", "2", "--distill-tokens", "512"),
    ]
    process = subprocess.Popen(arguments, env=ONE_THREAD, stderr=subprocess.DEVNULL)
    while len(workers(journal)) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended too early"
    # Waits for the other one, which finishes what both began.
    recipe = read_recipe(run_copy / "recipe.yaml")
    again(run_copy)
    assert recipe.workers == 2
    rows = rows_of(run_copy)
    assert {row["id"] for row in rows} == {f"joint-{number:03}" for number in range(TRIALS)}
    assert [row["selected"] for row in rows].count(True) == 1
    assert len({str(row["architecture"]) for row in rows}) == TRIALS
    # What a candidate measures does not depend on who measures it.
    alike = [
        (row["measured_kl"], other["measured_kl"])
        for row in rows
        for other in read_json(searched / "candidates.json")
        if row["architecture"] == other["architecture"]
        and row["measured_sequences"] == other["measured_sequences"]
        and not row["reselected"] + other["reselected"]
    ]
    assert len(alike) >= 3
    assert all(one == pytest.approx(two, abs=1e-6) for one, two in alike)


def test_one_with_other_settings_is_refused_and_one_with_the_same_joins(
    run_copy: Path, searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recipe = Run(run_copy), read_recipe(run_copy / "recipe.yaml")
    with joined(run, recipe) as first:
        assert first
        for changes in ({"trials": 8}, {"budget": "50%"}, {"seed": 1, "draws": 3}):
            with (
                pytest.raises(InputError, match=r"being searched with \w+ .*, or take another"),
                joined(run, recipe.changed(**changes)),
            ):
                pass
        assert read_recipe(run_copy / "recipe.yaml") == recipe
        with joined(run, recipe) as first:
            assert not first
        assert "this process takes part" in capsys.readouterr().err
        with alone(run):
            pass
        again(run_copy)
    assert same(rows_of(run_copy), rows_of(searched))
    with joined(run, recipe.changed(trials=8)) as first:
        assert first
