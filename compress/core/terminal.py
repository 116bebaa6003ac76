"""What a terminal shows: tables on stdout, notes and progress on stderr; plain lines in a pipe."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich import progress as bars
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

PLAIN_LINE_SECONDS = 15
# A pipe has no width: tables must not be folded to a guess.
PIPE_WIDTH = 160
# A blank where no cell is folded.
STICKY = "\N{NO-BREAK SPACE}"


def console(*, stderr: bool = False) -> Console:
    """A console on the present stdout or stderr, made anew so that redirection is seen."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def note(text: str) -> None:
    """One line for the person at the terminal; on stderr, so that stdout stays data."""
    console(stderr=True).print(text, markup=False, soft_wrap=True)


def command(*arguments: str) -> str:
    """A command of ours as a person can type it again: what the shell would read is quoted."""
    return shlex.join(["compress", *arguments])


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table on stdout; the first ``left`` columns are texts, the others numbers.

    On a narrow terminal cells fold at their blanks; columns that still have no room follow below,
    beside the first one again, which is never folded nor cut.
    """
    screen, heading = console(), title
    for part in parts(columns, list(rows), screen.width):
        built = Table(title=heading, title_justify="left", title_style="bold")
        for number, (width, lines) in part.items():
            side: Literal["left", "right"] = "left" if number < left else "right"
            built.add_column(lines[0], justify=side, width=width, overflow="fold")
        for row in zip(*(lines[1:] for _, lines in part.values()), strict=True):
            built.add_row(*row)
        screen.print(built, markup=False)
        heading = ""


def parts(
    columns: Sequence[str], rows: Sequence[Sequence[str]], room: int
) -> Iterator[dict[int, tuple[int, list[str]]]]:
    """Parts of a table that are no wider than ``room``: by column its width and its folded cells.

    Every part has the first column, whole.
    """
    cells = [[heading, *(row[number] for row in rows)] for number, heading in enumerate(columns)]
    widest = [max(map(cell_len, texts)) for texts in cells]
    least = [max(cell_len(word) for text in texts for word in words(text)) for texts in cells]
    widths = [widest[0], *least[1:]]
    # A column is its text, a blank on both sides and a line; one more line ends the table.
    room -= 1
    groups: list[list[int]] = [[]]
    for number in range(1, len(columns)):
        group = groups[-1]
        if group and sum(widths[n] + 3 for n in (0, *group, number)) > room:
            groups.append(group := [])
        group.append(number)
    for group in groups:
        spare = room - sum(widths[n] + 3 for n in (0, *group))
        for number in group:
            more = max(0, min(spare, widest[number] - widths[number]))
            widths[number] += more
            spare -= more
        yield {n: (widths[n], [folded(t, widths[n]) for t in cells[n]]) for n in (0, *group)}


def words(text: str) -> list[str]:
    """Where a cell may be folded: a number keeps its unit, an error its sign."""
    return re.sub(r"(?<=\d) (?=[KMGT]?i?B\b)|(?<=±) ", STICKY, text).split(" ")


def folded(text: str, width: int) -> str:
    """A cell in lines of at most ``width``; a word that is wider has one of its own."""
    lines: list[str] = []
    for word in words(text):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines).replace(STICKY, " ")


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
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[status]}"),
    )  # fmt: skip
    with bars.Progress(*columns, console=console(stderr=True)) as bar:
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
        if (done < total or not steps) and now - last < PLAIN_LINE_SECONDS:
            return
        last = now
        left = (now - begun) / max(done, 1) * max(total - done, 0)
        note(f"{what}: {done}/{total}, {now - begun:.0f} s, {left:.0f} s to go  {status}".rstrip())

    return advance
