"""The journal of a run's studies: locks that die with their holder, and what a killed one left."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from compress.core.terminal import note

# A trial is stopped once the chance of values as bad as its own is under this, if it were as good
# as the best one. Most steps fail: half of their text is better spent on the next one.
STOP_P_VALUE = 0.25


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[int]:
    """Hold the lock of a file, which is made where missing; say ``busy`` before a wait.

    Yields:
        The descriptor that holds it. The lock is free when every process that has the descriptor
        closed it or is dead, however it died.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy:
                note(busy)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def alone(journal: Path) -> Iterator[int]:
    """Be the only search that uses a journal: wait until another, and its workers, have ended.

    Yields:
        The descriptor that holds the lock, for workers to inherit.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another search uses {journal}: waiting for its end"
    with locked(journal.with_name("search.lock"), busy) as descriptor:
        yield descriptor


def claiming(journal: Path) -> AbstractContextManager[int]:
    """Be the only one that opens trials, or closes another's: so that none is closed by two."""
    return locked(journal.with_name("claim.lock"))


class JournalLock(JournalFileOpenLock):
    """Optuna's lock on a journal, as one that a killed process cannot leave behind.

    Optuna's own is a file: the others wait for a dead holder's 30 seconds, or forever where the
    path is relative. And nobody takes away the half line that a killed process wrote, to which the
    next one would add.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self.journal = journal
        self.held = ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock; the journal then ends with a whole line."""
        self.held.enter_context(locked(self.journal))
        mend(self.journal)
        return True

    def release(self) -> None:
        """Let the next one write."""
        self.held.close()


def mend(journal: Path) -> None:
    """Take away half a line at the end; only the holder of the journal's lock may."""
    with journal.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
    os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def open_study(journal: Path, name: str) -> optuna.Study:
    """The study of a run, new or as other processes made it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalFileBackend(str(journal), lock_obj=JournalLock(journal))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=name,
            load_if_exists=True,
            pruner=optuna.pruners.WilcoxonPruner(p_threshold=STOP_P_VALUE),
        )


def close_running(study: optuna.Study, worker: int | None = None) -> None:
    """Close the trials that a dead worker was measuring, by its process id, or those of all."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if worker is None or trial.user_attrs.get("worker") == worker:
            study.tell(trial.number, state=TrialState.FAIL)


def close_waiting(study: optuna.Study) -> None:
    """Close the trials that were enqueued and never asked for."""
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)
