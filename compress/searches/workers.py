"""Several processes on one study: a search hires them, hands out studies, replaces the dead.

A worker reads JSON lines from its stdin: what it needs to set up, then a study each. It says a word
on its stdout after every trial, and the kind of a study at its end. Its stdin ends with the search
that hired it, and so does the worker.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from compress.core.errors import CompressError
from compress.core.terminal import note
from compress.searches.journal import (
    alone,
    claiming,
    close_running,
    close_waiting,
    open_study,
)
from compress.searches.problem import Problem
from compress.searches.proposals import require_feasible
from compress.searches.study import StudySettings, Trial, finished, results

WORKER = (sys.executable, "-m", "compress.run.worker")
# So many deaths in one study, and it is not chance.
DEATHS = 3


@dataclass(frozen=True)
class Worker:
    """A process and the file that its stderr goes to."""

    process: "subprocess.Popen[bytes]"
    stderr: IO[bytes]

    def hand(self, job: Mapping[str, Any]) -> None:
        """Give it a line to read; one that is dead is noticed by its closed stdout."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def said(self) -> list[str] | None:
        """The words that are there to read; None when it is dead."""
        assert self.process.stdout is not None
        text = os.read(self.process.stdout.fileno(), 65536)
        return text.decode().split() if text else None

    def last_words(self) -> str:
        """How it ended, and the last line of its stderr."""
        code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return how + (f", {lines[-1]}" if lines else "")

    def fileno(self) -> int:
        """Its stdout, for ``select``."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def end(self) -> None:
        """Kill it: the study takes no harm."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            assert stream is not None
            # What was handed to a dead worker is still in the buffer.
            with suppress(BrokenPipeError):
                stream.close()


@dataclass
class Crew:
    """The workers of one search, hired when first needed; see ``crew``."""

    count: int
    setup: Mapping[str, Any]
    lock: int
    command: Sequence[str] = WORKER
    workers: list[Worker] = field(default_factory=list)

    def explore(
        self,
        problem: Problem,
        settings: StudySettings,
        progress: Callable[[float], None] = lambda best: None,
    ) -> list[Trial]:
        """What ``study.explore`` does, by the workers.

        Raises:
            Infeasible: nothing in the space fits the budget.
            CompressError: workers die again and again.
        """
        require_feasible(problem)
        job = {
            "space": problem.space.model_dump(mode="json"),
            "blind_to_rounding": problem.blind_to_rounding,
            "settings": asdict(settings) | {"journal": str(settings.journal)},
        }
        study = open_study(settings.journal, settings.name)
        close_running(study)
        close_waiting(study)
        counted, deaths = len(finished(study)), 0
        if counted < settings.trials:
            while len(self.workers) < self.count:
                self.workers.append(self.hire())
            for worker in self.workers:
                worker.hand(job)
        ended: set[int] = set()
        while counted < settings.trials and len(ended) < len(self.workers):
            ready: list[Worker] = select.select(self.workers, [], [])[0]
            for worker in ready:
                words = worker.said()
                if words is None:
                    deaths += 1
                    self.replace(worker, deaths).hand(job)
                    # Not while another one closes what it had only enqueued.
                    with claiming(settings.journal):
                        close_running(study, worker.process.pid)
                    ended.discard(worker.process.pid)
                elif settings.kind in words:
                    ended.add(worker.process.pid)
            # A trial that was told just before its worker's death counts as well.
            for _ in range(counted, len(finished(study))):
                counted += 1
                progress(study.best_value)
        return results(study, problem, settings)

    def replace(self, worker: Worker, deaths: int) -> Worker:
        """Hire another worker for a dead one; too many deaths in a study are an error."""
        how = worker.last_words()
        if deaths > DEATHS:
            raise CompressError(
                f"a worker of the search died for the {deaths}th time ({how}); the same command "
                f"continues, and fewer --workers than {self.count} need less memory"
            )
        note(f"a worker died ({how}); another one continues")
        worker.end()
        self.workers.remove(worker)
        self.workers.append(self.hire())
        return self.workers[-1]

    def hire(self) -> Worker:
        """A new worker, with its setup."""
        # Not a pipe, which would have to be read.
        descriptor, name = tempfile.mkstemp()
        os.unlink(name)
        stderr = os.fdopen(descriptor, "w+b")
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=(self.lock,),
            # Ctrl-C is for the search, which ends its workers.
            start_new_session=True,
        )
        hired = Worker(process, stderr)
        hired.hand(self.setup)
        return hired


@contextmanager
def crew(
    count: int, journal: Path, setup: Mapping[str, Any], command: Sequence[str] = WORKER
) -> Iterator[Crew]:
    """So many workers, who end with the block; no other search uses the journal meanwhile."""
    with alone(journal) as lock:
        hired = Crew(count, setup, lock, command)
        try:
            yield hired
        finally:
            for worker in hired.workers:
                worker.end()
