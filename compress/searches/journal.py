"""The journal of a run's studies: who takes part in one, and what a killed one left."""

import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from compress.core.errors import InputError
from compress.core.locks import locked, opened, took

# A trial is stopped once the chance of values as bad as its own is under this, if it were as good
# as the best one. Most steps fail: half of their text is better spent on the next one.
STOP_P_VALUE = 0.25


def claiming(journal: Path) -> AbstractContextManager[None]:
    """Be the only one that opens trials, or closes another's: so that none is closed by two."""
    return locked(journal.with_name("claim.lock"))


@contextmanager
def attending(journal: Path) -> Iterator[str]:
    """A name for the trials of one who takes part, whose lock is free once it is dead or done."""
    name = secrets.token_hex(4)
    lock = lock_of(journal, name)
    with ExitStack() as held:
        # ``alive`` takes the files of free locks away, but not between making and holding this one.
        with claiming(journal):
            held.enter_context(locked(lock))
        yield name
        lock.unlink(missing_ok=True)


def lock_of(journal: Path, name: str) -> Path:
    """The lock of one who takes part."""
    return journal.with_name(f"process-{name}.lock")


def alive(journal: Path, name: str) -> bool:
    """Whether one who took part still does; only while ``claiming``."""
    with opened(lock_of(journal, name)) as lock:
        if not took(lock):
            return True
        lock_of(journal, name).unlink()
        return False


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
    """The study of a run, new or as other processes made it.

    Raises:
        InputError: a line of the journal is damaged or gone.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(journal), lock_obj=JournalLock(journal))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=name,
                load_if_exists=True,
                pruner=optuna.pruners.WilcoxonPruner(p_threshold=STOP_P_VALUE),
            )
            for trial in finished(study):
                # Told last, so that a trial which lacks it has lost a line.
                _ = trial.user_attrs["values"]
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            # What optuna's replay of a line that is not one of its own ends with.
            raise InputError(
                f"{journal} is damaged ({type(error).__name__}: {error}); delete it, and the same "
                "command measures its candidates again"
            ) from error
    return study


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were measured, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def elsewhere(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that others are measuring, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def close_dead(study: optuna.Study, journal: Path) -> None:
    """Close the trials that nobody measures any more; only while ``claiming``."""
    for trial in elsewhere(study):
        if not alive(journal, trial.user_attrs["worker"]):
            study.tell(trial.number, state=TrialState.FAIL)


def close_waiting(study: optuna.Study) -> None:
    """Close the trials that were enqueued and never asked for."""
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)
