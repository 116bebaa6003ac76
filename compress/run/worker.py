"""A worker process of a search: builds the bench of a run once, then takes part in its studies."""

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from compress.run.bench import Bench
from compress.run.directory import Run
from compress.run.recipe import check
from compress.run.score import ranked, scores_file
from compress.run.search import selection_text
from compress.run.session import Session
from compress.scores.costs import load_scores
from compress.searches.journal import open_study
from compress.searches.space import Space
from compress.searches.study import StudySettings, take_part

Job = dict[str, Any]


def jobs() -> "queue.Queue[Job]":
    """The lines of stdin as they come; the process ends, wherever it is, when stdin does."""
    found: queue.Queue[Job] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        # The search is over or dead. The journal survives a death at any moment.
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return found


def say(word: str) -> None:
    """Wake the search up."""
    print(word, flush=True)


def bench_of(setup: Job) -> Bench:
    """The bench of a search, from its recipe and the scores in its run directory."""
    torch.set_num_threads(setup["threads"])
    session = Session(Run(Path(setup["run"])), check(setup["recipe"], "recipe"))
    text, _ = selection_text(session)
    return Bench(session, ranked(session, load_scores(scores_file(session.run))), text)


def main() -> None:
    """Run as ``python -m compress.run.worker`` by a search."""
    todo = jobs()
    bench = bench_of(todo.get())
    while True:
        job = todo.get()
        settings = StudySettings(**job["settings"] | {"journal": Path(job["settings"]["journal"])})
        problem = bench.problem(
            Space.model_validate(job["space"]), blind_to_rounding=job["blind_to_rounding"]
        )
        study = open_study(settings.journal, settings.name)
        tell = bench.linearize(problem)
        take_part(study, problem, settings, bench.measure, lambda _: say("measured"), tell)
        say(settings.kind)


if __name__ == "__main__":
    main()
