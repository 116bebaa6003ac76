"""Several processes on one search: all measure candidates, what only one can do is done by one.

A search of a run that is being searched joins it. None of them leads: whoever is killed leaves its
trial to the others, who finish the search.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from compress.core.errors import InputError
from compress.core.locks import locked, opened, share, took
from compress.core.terminal import note
from compress.run.directory import Run, shown
from compress.run.recipe import Recipe, keep_recipe, read_recipe


@contextmanager
def joined(run: Run, recipe: Recipe) -> Iterator[bool]:
    """Search a run, alone or beside others with the same recipe, which it has from now on.

    Yields:
        Whether nobody searched it before.

    Raises:
        InputError: it is being searched with other settings.
    """
    with opened(lock_file(run, "search")) as lock:
        if first := took(lock):
            keep_recipe(recipe, run)
        share(lock)
        under_way = read_recipe(run.path / "recipe.yaml").model_dump()
        for key, value in recipe.model_dump().items():
            if under_way[key] != value:
                raise InputError(
                    f"{run.path} is being searched with {key} {under_way[key]}, not {value}: "
                    "wait for the end of that search, or take another --run"
                )
        if not first:
            note(f"{run.path} is being searched: this process takes part")
        yield first


def alone(run: Run) -> AbstractContextManager[None]:
    """Do what only one process of a run's search can do; the others wait, and find it done."""
    return locked(lock_file(run, "alone"), "another process of this search is ahead: waiting")


def lock_file(run: Run, name: str) -> Path:
    """Where a lock of a run's search is."""
    directory = run.path / "study"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{name}.lock"


@contextmanager
def helped(run: Run, count: int) -> Iterator[None]:
    """So many more searches of a run, which join this one and end with the block.

    They share this process's threads and its group, so that Ctrl-C reaches all.
    """
    threads = torch.get_num_threads()
    each = max(1, threads // (count + 1))
    command = [sys.executable, "-m", "compress.cli", "search", "--run", str(run.path.resolve())]
    quiet = subprocess.DEVNULL
    helpers = [
        subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet,
            env=os.environ | {"OMP_NUM_THREADS": str(each)},
        )
        for _ in range(count)
    ]  # fmt: skip
    torch.set_num_threads(each)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for helper in helpers:
            if (code := helper.poll()) is not None:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                note(
                    f"a worker of the search ended early ({how}); compress search --run "
                    f"{shown(run)} beside this one would have said why"
                )
            helper.kill()
            helper.wait()
