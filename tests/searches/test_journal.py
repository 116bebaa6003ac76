"""Several on one study: nothing twice, nothing lost, whoever dies; a damaged journal is said."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from torch import Tensor

from compress.core.errors import InputError
from compress.searches.journal import (
    alive,
    attending,
    claiming,
    close_dead,
    finished,
    lock_of,
    open_study,
)
from compress.searches.study import explore
from compress.student.candidate import Candidate
from teachers import Teacher, invented, settings


@pytest.fixture(scope="module")
def hybrid(tiny_hybrid: Path) -> Teacher:
    return Teacher(tiny_hybrid)


def choices_of(study: optuna.Study) -> list[str]:
    return [json.dumps([trial.user_attrs["choice"], trial.params]) for trial in finished(study)]


def test_all_together_measure_as_many_different_candidates_as_asked_and_no_more(
    hybrid: Teacher, tmp_path: Path
) -> None:
    wanted = settings(tmp_path / "journal.log", 12)
    together = threading.Barrier(3)

    def work(number: int) -> tuple[int, list[str]]:
        measured = 0

        def measure(candidate: Candidate) -> Iterator[Tensor]:
            nonlocal measured
            if not measured:
                # Each one's first is claimed while the others' firsts are measured.
                together.wait()
            measured += 1
            return invented(candidate)

        # What one has in its memory is its own.
        found = explore(hybrid.problem("joint", 0.5), wanted, measure)
        assert [t.complete for t in found] == sorted((t.complete for t in found), reverse=True)
        assert len({trial.candidate.architecture for trial in found}) == 12
        return measured, [trial.candidate.id for trial in found]

    with ThreadPoolExecutor(3) as pool:
        shares = list(pool.map(work, range(3)))
    study = open_study(wanted.journal, wanted.name)
    assert sum(share for share, _ in shares) == len(set(choices_of(study))) == len(finished(study))
    assert len(finished(study)) == 12
    assert shares[0][1] == shares[1][1] == shares[2][1]
    assert not list(tmp_path.glob("process-*"))


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


def begun(journal: Path, worker: str) -> optuna.Study:
    """A study with a running trial of a worker."""
    study = open_study(journal, "a")
    study.enqueue_trial({}, user_attrs={"worker": worker})
    study.ask()
    return study


def test_a_trial_is_closed_once_nobody_measures_it(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    with attending(journal) as worker:
        study = begun(journal, worker)
        with claiming(journal):
            close_dead(study, journal)
        assert [trial.state for trial in study.get_trials()] == [TrialState.RUNNING]
    with claiming(journal):
        close_dead(study, journal)
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL]


def test_one_that_was_killed_is_not_alive(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from compress.searches.journal import attending\n"
        "with attending(Path(sys.argv[1])) as name: print(name, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, journal], stdout=subprocess.PIPE)
    assert process.stdout is not None
    name = process.stdout.readline().decode().strip()
    with claiming(journal):
        assert alive(journal, name)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert lock_of(journal, name).is_file()
    with claiming(journal):
        assert not alive(journal, name)
    assert not lock_of(journal, name).is_file()


def cut_short(lines: list[bytes]) -> None:
    lines[len(lines) // 2] = lines[len(lines) // 2][:20] + b"\n"


def of_another_kind(lines: list[bytes]) -> None:
    lines[len(lines) // 2] = b"[1, 2]\n"


def no_text(lines: list[bytes]) -> None:
    lines[len(lines) // 2] = b"\xff\xfe\x00\n"


def no_operation(lines: list[bytes]) -> None:
    lines[len(lines) // 2] = b'{"op_code": 99}\n'


def values_gone(lines: list[bytes]) -> None:
    lines[:] = [line for line in lines if b'"values":[' not in line or b'"state"' in line]


@pytest.fixture(scope="module")
def journal(hybrid: Teacher, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("study") / "journal.log"
    explore(hybrid.problem("joint", 0.5), settings(file, 3), invented)
    return file.read_bytes()


@pytest.mark.parametrize("damage", [cut_short, of_another_kind, no_text, no_operation, values_gone])
def test_a_damaged_journal_is_named_with_what_to_delete(
    damage: Callable[[list[bytes]], None], journal: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "journal.log"
    lines = journal.splitlines(keepends=True)
    damage(lines)
    file.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=f"{file} is damaged .*; delete it") as caught:
        open_study(file, "joint")
    assert "\n" not in str(caught.value)
