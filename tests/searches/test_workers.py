"""Several workers on one study: nothing twice, nothing lost, whoever is killed and whenever."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from tiny_models import ONE_THREAD, search_command
from torch import Tensor

from compress import cli
from compress.core.errors import CompressError
from compress.core.files import read_json
from compress.searches.journal import alone, open_study
from compress.searches.study import finished, results, take_part
from compress.searches.workers import crew
from compress.student.candidate import Candidate
from teachers import Teacher, settings

TRIALS = 10


@pytest.fixture(scope="module")
def hybrid(tiny_hybrid: Path) -> Teacher:
    return Teacher(tiny_hybrid)


def keys_of(study: optuna.Study) -> list[str]:
    return [trial.user_attrs["key"] for trial in finished(study)]


def test_workers_measure_as_many_different_candidates_as_asked_and_no_more(
    hybrid: Teacher, tmp_path: Path
) -> None:
    problem, wanted = hybrid.problem("joint", 0.5), settings(tmp_path / "journal.log", 12)
    together = threading.Barrier(3)

    def work(number: int) -> int:
        measured = 0

        def measure(candidate: Candidate) -> Iterator[Tensor]:
            nonlocal measured
            if not measured:
                # Each one's first is claimed while the others' firsts are measured.
                together.wait()
            measured += 1
            return hybrid.measure(candidate)

        study = open_study(wanted.journal, wanted.name)
        # What a worker has in its memory is its own.
        take_part(study, hybrid.problem("joint", 0.5), wanted, measure)
        return measured

    with ThreadPoolExecutor(3) as pool:
        shares = list(pool.map(work, range(3)))
    study = open_study(wanted.journal, wanted.name)
    assert sum(shares) == len(set(keys_of(study))) == len(finished(study)) == 12
    found = results(study, problem, wanted)
    assert len({trial.candidate.architecture for trial in found}) == 12
    assert [t.complete for t in found] == sorted((t.complete for t in found), reverse=True)


def test_half_a_line_is_taken_away_by_the_next_who_writes(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    one, two = open_study(journal, "a"), open_study(journal, "a")
    one.enqueue_trial({}, user_attrs={"key": "x"})
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "work')
    assert len(two.get_trials()) == 1
    two.enqueue_trial({}, user_attrs={"key": "y"})
    one.enqueue_trial({}, user_attrs={"key": "z"})
    for study in (one, two, open_study(journal, "a")):
        assert [trial.user_attrs["key"] for trial in study.get_trials()] == ["x", "y", "z"]


def test_workers_that_die_again_and_again_are_an_error_that_says_why(
    hybrid: Teacher, tmp_path: Path
) -> None:
    wanted = settings(tmp_path / "journal.log", 3)
    dying = (sys.executable, "-c", "import sys; sys.exit('no room')")
    with (
        crew(2, wanted.journal, {}, dying) as hired,
        pytest.raises(CompressError, match=r"4th time \(exit code 1, no room\)"),
    ):
        hired.explore(hybrid.problem("joint", 0.5), wanted)


# On the command line


def begun(journal: Path, after: int = 0) -> list[int]:
    """Process ids of the workers whose trials are in a journal, behind some bytes."""
    whole = journal.read_bytes()[after:] if journal.is_file() else b""
    return [int(found) for found in re.findall(rb'"worker":(\d+)', whole)]


def kill_next(journal: Path, after: int, killed: set[int], over: Callable[[], bool]) -> None:
    """Kill the next worker that has a trial behind some bytes of a journal."""
    while not over():
        if found := [worker for worker in begun(journal, after) if worker not in killed]:
            killed.add(found[0])
            os.kill(found[0], signal.SIGKILL)
            return
        time.sleep(0.01)


def test_a_search_of_two_workers_ends_whoever_is_killed(
    searched: Path, run_copy: Path, tiny_hybrid: Path, text_file: Path
) -> None:
    shutil.rmtree(run_copy / "study")
    journal = run_copy / "study" / "journal.log"
    arguments = search_command(tiny_hybrid, run_copy, text_file)
    more = ("--trials", str(TRIALS), "--workers", "2")
    process = subprocess.Popen([*arguments, *more], env=ONE_THREAD, stderr=subprocess.DEVNULL)
    while not begun(journal) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended too early"
    # The lock is free when the workers are dead as well.
    with alone(journal):
        left = journal.stat().st_size

    over, killed = threading.Event(), set[int]()

    def kill_both() -> None:
        for _ in range(2):
            kill_next(journal, left, killed, over.is_set)

    killer = threading.Thread(target=kill_both)
    killer.start()
    try:
        # The run's recipe has the workers.
        cli.app(["search", "--run", str(run_copy)], standalone_mode=False)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    assert set(begun(journal, left)) > killed, "nobody took the place of the dead"

    rows = read_json(run_copy / "candidates.json")
    joint = {row["id"] for row in rows if row["kind"] == "joint"}
    assert joint == {f"joint-{number:03}" for number in range(TRIALS)}
    assert [row["selected"] for row in rows].count(True) == 1
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    for name in optuna.get_all_study_names(storage):
        keys = keys_of(optuna.load_study(study_name=name, storage=storage))
        assert len(set(keys)) == len(keys)
        assert len(keys) == (TRIALS if name.startswith("joint@") else len(keys))
    # What a candidate measures does not depend on who measures it.
    alike = [
        (row["measured_kl"], other["measured_kl"])
        for row in rows
        for other in read_json(searched / "candidates.json")
        if row["architecture"] == other["architecture"]
        and row["measured_sequences"] == other["measured_sequences"]
    ]
    assert len(alike) >= 4
    assert all(one == pytest.approx(two, abs=1e-6) for one, two in alike)
