"""Commands of several processes: the first runs them, the others join its trainings.

``torchrun --nproc-per-node N -m compress.cli distill RUN``; without it there is one process, which
nobody joins. What a joining process reads is on disk by then: the student as it was cut, the
teacher's states, the recipe of a teacher.
"""

import os
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from compress.run.directory import Run
from compress.run.recipe import check
from compress.run.session import Session
from compress.run.students import trained_tensors
from compress.student.surgery import load_candidate
from compress.train.distill import DistillSettings
from compress.train.pretrain import pretrain
from compress.train.world import world


def led(run: Callable[[], Any]) -> Any:
    """What a command returns in the first process; 0 in the others, which join its trainings."""
    if not world().leads:
        join()
        return 0
    code = run()
    world().told({})
    return code


def join() -> None:
    """Join what the first process trains until its command ends."""
    # The first one speaks.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        while True:
            try:
                told = world().told(None)
            except RuntimeError as error:
                raise SystemExit(1) from error  # the first one is gone, and has said why
            if "pretrain" in told:
                recipe, out = map(Path, told["pretrain"])
                pretrain(recipe, out)
            elif "distill" in told:
                distill(**told["distill"])
            else:
                return


def distill(
    run: str, recipe: dict[str, Any], candidate: str, kind: str, settings: dict[str, Any],
    begins: str, directory: str,
) -> None:  # fmt: skip
    """Train a candidate's student beside the first process."""
    session = Session(Run(Path(run)), check(recipe, "the first process's recipe"))
    found = load_candidate(session.run.path / "candidates" / candidate, kind)
    asked = DistillSettings(**settings), Path(begins), Path(directory)
    trained_tensors(session, found, *asked)
