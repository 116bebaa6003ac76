"""What a terminal shows: tables on stdout, notes and progress on stderr; plain lines in a pipe."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PLAIN_LINE_SECONDS = 15
# A pipe has no width: tables must not be folded to a guess.
PIPE_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    """A console on the present stdout or stderr, made anew so that redirection is seen."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def note(text: str) -> None:
    """One line for the person at the terminal; on stderr, so that stdout stays data."""
    console(stderr=True).print(text, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table on stdout; the first ``left`` columns are texts, the others numbers."""
    built = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        built.add_column(column, justify="left" if number < left else "right", no_wrap=number > 0)
    for row in rows:
        built.add_row(*row)
    console().print(built, markup=False)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar with an ETA for one stage; in a pipe a plain line now and then.

    Yields:
        ``advance(steps, status)``: so many more of ``total`` are done, and what to say about it.
    """
    if not sys.stderr.isatty():
        yield plain_progress(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, status="")

        def advance(steps: int, status: str) -> None:
            bar.update(task, advance=steps, status=status)

        yield advance


def plain_progress(what: str, total: int) -> Callable[[int, str], None]:
    """The ``advance`` of a bar that prints a line every few seconds and at the end."""
    begun = last = time.monotonic()
    done = 0

    def advance(steps: int, status: str) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if done < total and now - last < PLAIN_LINE_SECONDS:
            return
        last = now
        left = (now - begun) / max(done, 1) * max(total - done, 0)
        note(f"{what}: {done}/{total}, {now - begun:.0f} s, {left:.0f} s to go  {status}".rstrip())

    return advance
