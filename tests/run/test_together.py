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
from compress.run.together import alone, helped, joined
from runs import again, rows_of, same

TRIALS = 10


def workers(journal: Path) -> set[str]:
    """Names of those whose trials are in a journal."""
    whole = journal.read_text() if journal.is_file() else ""
    return set(re.findall(r'"worker":"(\w+)"', whole))


def test_a_search_of_two_processes_is_finished_by_the_one_that_is_left(
    searched: Path, run_copy: Path, tiny_hybrid: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.rmtree(run_copy / "study")
    (run_copy / "candidates.json").unlink()
    journal = run_copy / "study" / "journal.log"
    arguments = [
        *search_command(tiny_hybrid, run_copy, text_file),
        *("--trials", str(TRIALS), "--baselines", "none", "--short-distill-tokens", "0"),
    ]
    said = [tmp_path / "one.txt", tmp_path / "two.txt"]
    # Both are held up where only one may go on, so that they begin together.
    with alone(Run(run_copy)):
        both = [
            subprocess.Popen(
                arguments, env=ONE_THREAD, stdout=file.open("w"), stderr=subprocess.STDOUT
            )
            for file in said
        ]
        while not all("waiting" in file.read_text() for file in said):
            assert [process.poll() for process in both] == [None, None]
            time.sleep(0.05)
    while len(workers(journal)) < 2 and both[0].poll() is None:
        time.sleep(0.002)
    both[0].send_signal(signal.SIGKILL)
    assert both[0].wait() == -signal.SIGKILL, "it ended too early"
    assert both[1].wait() == 0, said[1].read_text()
    assert sum("takes part" in file.read_text() for file in said) == 1
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


def test_helpers_end_with_the_block_and_one_that_ended_early_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helper = tmp_path / "helper"
    helper.write_text(f'#!/bin/sh\necho $$ "$@" >> {tmp_path}/said; [ $1 = -m ] && exec sleep 600')
    helper.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(helper))
    run = Run(tmp_path / "run")

    def started() -> list[list[str]]:
        file = tmp_path / "said"
        return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []

    with helped(run, 2):
        while len(started()) < 2:
            time.sleep(0.01)
        os.kill(int(started()[0][0]), signal.SIGTERM)
        time.sleep(0.1)
    assert "ended early (signal 15)" in capsys.readouterr().err
    for process, *arguments in started():
        assert arguments == ["-m", "compress.cli", "search", "--run", str(run.path)]
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
    with helped(run, 0):
        pass
    assert len(started()) == 2


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
